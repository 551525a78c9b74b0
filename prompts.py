"""The multi-mode prompt trainer: K prompts per class, whose pictures show the class and differ.

    python generate.py --class kite --modes 20

is the command; this file is Eq. (12) and (14)-(17). Learning several prompts per class, and asking
their embeddings and the features of their pictures to differ, is [paper]. The form of each equation
and every constant is [ours]. What is learned are pseudo-tokens before the class's name: vectors in
the space of the text encoder's word embeddings. Generator, encoder and classifier stay frozen.
"""
import functools
import json
import math
import re

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch.utils.checkpoint import checkpoint

import vitq
from checkpoints import reading, require, write_whole

TEMPLATE = "a photo of"
SLOT = "*"  # marks in a prompt's text where its pseudo-tokens stand
PSEUDO_TOKENS = 4  # m
STEPS = 10
LEARNING_RATE = 0.05  # relative to the rms of the word embeddings, which differs by generator
PROMPT_WEIGHT, IMAGE_WEIGHT = 0.1, 1.0  # mu_v and mu_x of Eq. (17)
CANDIDATES = 16  # random prompts per mode, from which the start is chosen
START_WEIGHT = 3.0  # of the cosine with the nearest mode chosen so far
NOISE_PICTURES = 64  # of the bare class prompt, to see what noise changes
# of the baseline "a <adjective> photo of <adjective> <class>" [paper]; the words are [ours]
ADJECTIVES = ["small", "large", "red", "orange", "yellow", "green", "blue", "purple", "pink",
              "brown", "striped", "dotted", "checkered"]


# -------------------- Eq. (12): from prompts to what the generator is conditioned on

@functools.lru_cache
def token_ids(tokenizer, texts, pseudo_tokens, length, device):
    """The ids of K texts, (K, length), and where their pseudo-tokens begin. A long name is cut.

    The places of the pseudo-tokens hold the start token, whose embedding will be replaced there.
    Cached: each step asks again.
    """
    if pseudo_tokens:  # plain texts have no slot, but may have a star
        slots = tokenizer.bos_token * pseudo_tokens
        texts = [text.replace(SLOT, slots, 1) for text in texts]
    ids = tokenizer([*texts], padding="max_length", truncation=True, max_length=length,
                    return_tensors="pt").input_ids
    first = ids[0, 1:].tolist().index(tokenizer.bos_token_id) + 1 if pseudo_tokens else 1
    return ids.to(device), first


def encode(text_encoder, tokenizer, texts, v):
    """Eq. (12): t_ck = T("a photo of  v_ck1 ... v_ckm  <class>"). [ours]

    K texts and their pseudo-tokens v (K, m, d) -> (K, tokens, width). m = 0 encodes plain texts.
    """
    m = v.shape[1]
    ids, first = token_ids(tokenizer, tuple(texts), m, text_encoder.config.max_position_embeddings,
                           text_encoder.device)

    def splice(embedding, inputs, embedded):  # (K, tokens, d), before the positions are added
        return torch.cat([embedded[:, :first], v.to(embedded), embedded[:, first + m:]], 1)

    with text_encoder.get_input_embeddings().register_forward_hook(splice):
        return text_encoder(ids)[0]


# -------------------- Eq. (14)-(17): the losses

def class_loss(logits, label):
    """Eq. (14): L_cls = mean over k of CE(f(x_ck), c). logits (K, classes). [ours]"""
    return F.cross_entropy(logits, torch.full((len(logits),), label, device=logits.device))


def mean_cosine(vectors):
    """Eq. (15): L_prompt = mean over k < k' of cos(v_ck, v_ck').
    Eq. (16): L_image = mean over k < k' of cos(P phi(x_ck), P phi(x_ck')).

    That prompts and features are asked to differ is [paper], the cosines are [ours].

    vectors (K, ...). The pairs need no loop: with unit vectors u, |sum_k u_k|^2 is K plus twice the
    sum of all cosines.
    """
    u = F.normalize(vectors.flatten(1), dim=1)
    return (u.sum(0).square().sum() - len(u)) / max(len(u) * (len(u) - 1), 1)


def features(classifier, images):
    """f and phi of Eq. (14) and (16): logits (B, classes), phi (B, channels of all blocks). [ours]

    images: float (B, 3, H, W) in [0, 1], of any size, on the model's device. phi: the mean token of
    every block's output, each scaled to unit length, so that all blocks count alike. The head's own
    input would not do: a good classifier's is nearly the same for all pictures of a class, while
    the layers below still tell them apart.
    """
    with vitq.block_outputs(classifier.model) as h:
        logits = classifier.model(classifier.preprocessing.of_pictures(images)).logits
    return logits, torch.cat([F.normalize(output.mean(1)) for output in h], 1)


def noise_directions(phi):
    """Orthonormal directions, (N - 1, features), in which the pictures of one prompt differ.

    phi (N, features), N at most the features. Noise alone moves the pictures there: position and
    tilt, say. P of Eq. (16) takes these directions out. Otherwise modes could lower Eq. (16)
    by what fresh noise brings anyway, and would hardly differ in colour or background.
    """
    return torch.linalg.svd(phi - phi.mean(0), full_matrices=False).Vh[:-1]


def project(phi, directions):
    """P phi of Eq. (16): phi (K, features) without its part in `directions`. That features are to
    differ is [paper], P is [ours]."""
    return phi - phi @ directions.T @ directions


def prompt_loss(logits, label, v, phi, directions):
    """Eq. (17): L = L_cls + mu_v L_prompt + mu_x L_image. [ours]"""
    return (class_loss(logits, label) + PROMPT_WEIGHT * mean_cosine(v)
            + IMAGE_WEIGHT * mean_cosine(project(phi, directions)))


# -------------------- The trainer

def paint_and_classify(sampler, classifier, text, v, noise, micro_batch):
    """Eq. (12) and (13), then the classifier: logits (K, classes) and phi (K, features).

    v (K, m, d), noise (K, 4, h, w). If K exceeds `micro_batch`, no more than that go through the
    generator at a time, and a second time in the backward pass, which bounds the memory.
    """
    def paint(v, noise):
        t = encode(sampler.text_encoder, sampler.tokenizer, [text] * len(v), v)
        return features(classifier, (sampler(t, noise, sampler.taesd) + 1) / 2)

    if len(v) <= micro_batch:
        return paint(v, noise)
    parts = [checkpoint(paint, *part, use_reentrant=False, preserve_rng_state=False)
             for part in zip(v.split(micro_batch), noise.split(micro_batch))]
    return [torch.cat(outputs) for outputs in zip(*parts)]


def choose(losses, projected, count):
    """Where to start: the indices of `count` of N candidates, chosen one after the other.

    Each is the one with the least Eq. (14), `losses` (N,), plus START_WEIGHT times the cosine of
    its P phi (N, features) with the nearest one chosen already.
    """
    u, chosen = F.normalize(projected, dim=1), [losses.argmin().item()]
    while len(chosen) < count:
        scores = losses + START_WEIGHT * (u @ u[chosen].T).amax(1)
        scores[chosen] = math.inf
        chosen.append(scores.argmin().item())
    return chosen


def whole_words(tokenizer):
    """The ids of the tokens that are a word of three letters or more: no pieces, digits, signs."""
    return torch.tensor(sorted(i for token, i in tokenizer.get_vocab().items()
                               if re.fullmatch("[a-z]{3,}</w>", token)))


def rng_of(*numbers):
    """A source of random numbers of its own for each seed, class, ..."""
    # SeedSequence ignores zeros at the end, so how many numbers there are comes first
    state = np.random.SeedSequence([len(numbers), *numbers]).generate_state(1)[0]
    return torch.Generator().manual_seed(int(state))


def learn(sampler, classifier, label, name, modes, seed, micro_batch):
    """K = `modes` prompts of the class `label`, called `name`: texts, and pseudo-tokens (K, m, d).

    sampler: of generate.py, Eq. (13). classifier: a `checkpoints.Classifier`, f of Eq. (14).
    Raises BadInput at a loss that is not finite.
    """
    embeddings = sampler.text_encoder.get_input_embeddings().weight.float()  # (vocabulary, d)
    rng = rng_of(seed, label)
    text = f"{TEMPLATE} {SLOT} {name}"
    bare = embeddings.new_zeros(NOISE_PICTURES, 0, embeddings.shape[1])
    _, phi = paint_and_classify(sampler, classifier, f"{TEMPLATE} {name}", bare,
                                sampler.noise(NOISE_PICTURES, rng), micro_batch)
    directions = noise_directions(phi)
    # Words at random: gradients alone, from near the class's name, find few of the colours,
    # places and poses that the generator knows a word for.
    words = whole_words(sampler.tokenizer)
    picks = torch.randint(len(words), (CANDIDATES * modes, PSEUDO_TOKENS), generator=rng)
    candidates = embeddings[words[picks].to(embeddings.device)]
    logits, phi = paint_and_classify(sampler, classifier, text, candidates,
                                     sampler.noise(len(candidates), rng), micro_batch)
    losses = -logits.log_softmax(1)[:, label]  # Eq. (14) of each
    v = candidates[choose(losses, project(phi, directions), modes)].requires_grad_(True)

    optimizer = torch.optim.Adam([v], lr=LEARNING_RATE * embeddings.square().mean().sqrt().item())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        noise = sampler.noise(modes, rng)  # fresh: a prompt must hold for any noise
        logits, phi = paint_and_classify(sampler, classifier, text, v, noise, micro_batch)
        loss = prompt_loss(logits, label, v, phi, directions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        require(loss.isfinite(), f"class {name!r}", "the loss is not finite at step "
                f"{step + 1} of {STEPS}; its prompts were not written", "try another --seed")
    return [text] * modes, v.detach()


def baseline_texts(kind, label, name, modes, seed):
    """The baselines: K texts. kind "class": the bare class; "text": with two adjectives."""
    if kind == "class":
        return [f"{TEMPLATE} {name}"] * modes
    rng = np.random.default_rng([seed, label])
    return ["a {} photo of {} {}".format(*rng.choice(ADJECTIVES, 2, replace=False), name)
            for _ in range(modes)]


# -------------------- Files

def constants():
    """What learned prompts depend on besides the command line."""
    return {name.lower(): value for name, value in globals().items()
            if name.isupper() and isinstance(value, (int, float, str))}


def save_prompts(path, texts, pseudo_tokens, settings):
    """One class's prompts: the pseudo-tokens in float16 (164 kB for 20 modes of SD-Turbo), since
    their numbers are about 0.01, where float16 is finer than bfloat16; the settings as a tensor of
    bytes; the texts as metadata."""
    settings = torch.tensor([*json.dumps(settings).encode()], dtype=torch.uint8)
    tensors = {"pseudo_tokens": pseudo_tokens.half().cpu(), "settings": settings}
    # one item of metadata: of several, the order would vary
    write_whole(path, save(tensors, {"texts": json.dumps(texts)}))


def load_prompts(path, settings):
    """Texts and pseudo-tokens (K, m, d) of `save_prompts`. Raises BadInput if made otherwise."""
    with reading(path, f"remove {path.parent} to make it again"), safe_open(path, "pt") as file:
        v, texts = file.get_tensor("pseudo_tokens"), json.loads(file.metadata()["texts"])
        made_with = json.loads(bytes(file.get_tensor("settings").tolist()))
        if texts != [*map(str, texts)] or not len(texts) == len(v) == made_with["modes"] \
                or v.dim() != 3 or not v.isfinite().all():
            raise ValueError("they are no prompts")
    for key, value in settings.items():
        require(made_with.get(key) == value, path, f"was made with {key} {made_with.get(key)}, "
                f"not {value}", f"remove {path.parent}, or name another folder")
    return texts, v
