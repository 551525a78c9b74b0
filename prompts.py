"""The multi-mode prompt trainer: K prompts a class, whose pictures show the class and differ from one another.

    python generate.py --class kite --modes 20

is the command; this file is Eq. (12) and (14)-(17). What is learned are a few pseudo-tokens in front of the class name,
vectors in the space of the text encoder's word embeddings. Generator, text encoder and classifier stay as they are.
"""
import functools
import json
import math
import os
import re

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vitq import BadInput

TEMPLATE = "a photo of"
SLOT = "*"  # marks in a prompt's text where its pseudo-tokens stand
PSEUDO_TOKENS = 4  # m
STEPS = 40
RECORD_AT = 2  # the step that is recorded on a GPU; the libraries have settled by then
LEARNING_RATE = 0.05  # in units of the size of an embedding's numbers: generators differ in it by a factor of ten
PROMPT_WEIGHT, IMAGE_WEIGHT = 0.1, 1.0  # b_p and b_i of Eq. (17)
CANDIDATES = 16  # random prompts for each mode, from which the start is chosen
START_WEIGHT = 3.0  # of the cosine there, which is that of the nearest pair, where b_i weighs the mean of all pairs
NOISE_PICTURES = 64  # of the bare class prompt, to see what noise changes
# the baseline's "a <adjective> photo of <adjective> <class>"
ADJECTIVES = ["small", "large", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "striped",
              "dotted", "checkered"]


# -------------------- Eq. (12): from prompts to what the generator is conditioned on

def token_ids(tokenizer, text, pseudo_tokens):
    """The ids of one prompt, filled up to the tokenizer's full length, and where its pseudo-tokens begin.

    A class name too long for the encoder is cut; the end token stays, which causal encoders gather the prompt in.
    """
    before, _, after = text.partition(SLOT)
    before, after = (tokenizer(part, add_special_tokens=False).input_ids for part in (before, after))
    start = 1 + len(before)
    # the pseudo-tokens' places hold the id of the start token, since their embedding will be replaced, and since the
    # encoder finds the end of the prompt by looking for the end token's id
    ids = [tokenizer.bos_token_id, *before, *[tokenizer.bos_token_id] * pseudo_tokens, *after]
    ids = [*ids[:tokenizer.model_max_length - 1], tokenizer.eos_token_id]
    return ids + [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(ids)), start


@functools.lru_cache
def ids_of_prompts(tokenizer, texts, pseudo_tokens, device):
    """The ids of K texts, (K, tokens), and where the pseudo-tokens begin in all of them. Cached: each step asks again."""
    ids, starts = zip(*(token_ids(tokenizer, text, pseudo_tokens) for text in texts))
    return torch.tensor(ids, device=device), starts[0]


def encode(text_encoder, tokenizer, texts, pseudo_tokens):
    """Eq. (12): K texts and their pseudo-tokens (K, m, d) -> e_ck (K, tokens, width). m = 0 encodes plain texts.

    All texts must have their pseudo-tokens at the same place. Differentiable in the pseudo-tokens.
    """
    count = pseudo_tokens.shape[1]
    ids, start = ids_of_prompts(tokenizer, tuple(texts), count, text_encoder.device)

    def splice(embedding, inputs, embedded):  # (K, tokens, d); positions are added afterwards, to the spliced row
        return torch.cat([embedded[:, :start], pseudo_tokens.to(embedded.dtype), embedded[:, start + count:]], 1)

    handle = text_encoder.get_input_embeddings().register_forward_hook(splice) if count else None
    try:
        return text_encoder(ids)[0]
    finally:
        if handle:
            handle.remove()


# -------------------- Eq. (14)-(17): the losses

def class_loss(logits, label):
    """Eq. (14): the picture shows the class. logits (K, classes)."""
    return F.cross_entropy(logits, torch.full((len(logits),), label, device=logits.device))


def mean_cosine(vectors):
    """Eq. (15) of the pseudo-tokens, Eq. (16) of the pictures' features: the mean over k < k' of their cosine.

    vectors (K, ...). The pairs need no loop: with unit vectors, |sum_k u_k|^2 = K + 2 sum_{k < k'} cos(u_k, u_k').
    """
    units = F.normalize(vectors.flatten(1), dim=1)
    count = len(units)
    return (units.sum(0).square().sum() - count) / max(count * (count - 1), 1)


# -------------------- The trainer

def look(sampler, classifier, texts, pseudo_tokens, noise):
    """Eq. (12) and (13), then the classifier: logits (K, classes) and phi (K, features) of a picture of each prompt."""
    embeddings = encode(sampler.text_encoder, sampler.tokenizer, texts, pseudo_tokens)
    return classifier.features((sampler(embeddings, noise, sampler.taesd) + 1) / 2)


def noise_directions(phi):
    """Orthonormal directions (N - 1, features) in which phi (N, features) of N pictures of one prompt differ.

    They are what noise alone changes: position and tilt, say. Fresh noise brings that for nothing, so Eq. (16) leaves it
    out of phi. With it, a picture by night and one by day would look as near as two pictures of the same prompt, and the
    modes would differ in size and class, which weigh most in a classifier's features, but hardly in colour or place.
    """
    return torch.linalg.svd(phi - phi.mean(0), full_matrices=False).Vh[:-1]


def choose(losses, phi, count):
    """Where to start: the indices of `count` of N candidates, chosen one after the other.

    Each time the one with the least Eq. (14), `losses` (N,), plus START_WEIGHT times the cosine of its phi (N, features)
    with the nearest of those chosen already.
    """
    units, chosen = F.normalize(phi, dim=1), [losses.argmin().item()]
    while len(chosen) < count:
        scores = losses + START_WEIGHT * (units @ units[chosen].T).amax(1)
        scores[chosen] = math.inf
        chosen.append(scores.argmin().item())
    return chosen


def whole_words(tokenizer):
    """The ids of the tokens that are a word of three letters or more; the others are pieces, digits, signs."""
    return torch.tensor(sorted(i for token, i in tokenizer.get_vocab().items() if re.fullmatch("[a-z]{3,}</w>", token)))


def learn(sampler, classifier, label, name, modes, seed, steps, micro_batch, progress=None):
    """K = `modes` prompts of the class `label`, called `name`: their texts and their pseudo-tokens (K, m, d).

    sampler: of generate.py, Eq. (13). classifier: f and phi of Eq. (14) and (16), of eval.py. `micro_batch` modes go
    through the generator at a time, which bounds the memory; Eq. (15) and (16) see all K of them nevertheless.
    progress: called with the loss after each step. Raises BadInput at a non-finite loss.
    """
    table = sampler.text_encoder.get_input_embeddings().weight.float()  # (vocabulary, d)
    scale = table.square().mean().sqrt().item()  # of one number of an embedding: 0.1 in tiny/turbo, 0.01 in SD-Turbo
    random = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, label]).generate_state(1)[0]))
    text = f"{TEMPLATE} {SLOT} {name}"

    @torch.no_grad()
    def look_at_all(text, pseudo_tokens):
        noise = sampler.noise(len(pseudo_tokens), random)
        at_once = 2 * micro_batch  # without gradients, that many fit
        parts = [look(sampler, classifier, [text] * len(part), part, its_noise)
                 for part, its_noise in zip(pseudo_tokens.split(at_once), noise.split(at_once))]
        return (torch.cat(outputs) for outputs in zip(*parts))

    _, phi = look_at_all(f"{TEMPLATE} {name}", table.new_zeros(NOISE_PICTURES, 0, table.shape[1]))
    directions = noise_directions(phi)

    def visible(phi):
        return phi - phi @ directions.T @ directions

    # The start: words at random. Gradients alone, from near the class's name, find few of the colours, places and
    # poses that the generator knows a word for.
    words = whole_words(sampler.tokenizer)
    drawn = words[torch.randint(len(words), (CANDIDATES * modes, PSEUDO_TOKENS), generator=random)].to(table.device)
    logits, phi = look_at_all(text, table[drawn])
    labels = torch.full((len(logits),), label, device=logits.device)
    chosen = choose(F.cross_entropy(logits, labels, reduction="none"), visible(phi), modes)
    pseudo_tokens = table[drawn[chosen]].requires_grad_(True)

    optimizer = torch.optim.AdamW([pseudo_tokens], lr=LEARNING_RATE * scale)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    parts = [slice(first, first + micro_batch) for first in range(0, modes, micro_batch)]

    noise, total = sampler.noise(modes, random), torch.zeros((), device=table.device)

    def gradient():
        """Sets the pseudo-tokens' gradient to that of Eq. (17), and `total` to the loss."""
        optimizer.zero_grad()
        others = None
        if len(parts) > 1:
            with torch.no_grad():
                others = torch.cat([look(sampler, classifier, [text] * len(noise[part]), pseudo_tokens[part],
                                         noise[part])[1] for part in parts])
        loss = PROMPT_WEIGHT * mean_cosine(pseudo_tokens)  # Eq. (15)
        loss.backward()
        total.copy_(loss.detach())
        for part in parts:
            logits, phi = look(sampler, classifier, [text] * len(noise[part]), pseudo_tokens[part], noise[part])
            # the features of the other modes are constants here; the parts' gradients add up to that of Eq. (16)
            everyone = phi if others is None else torch.cat([others[:part.start], phi, others[part.stop:]])
            share = len(phi) / modes
            classes, images = share * class_loss(logits, label), IMAGE_WEIGHT * mean_cosine(visible(everyone))
            (classes + images).backward()  # Eq. (17), these modes' part of it
            total.add_((classes + share * images).detach())

    # Launching the thousands of small kernels of a gradient, most of them the text encoder's, takes a GPU longer than running
    # them: one gradient is recorded as a CUDA graph and replayed as a whole. Recording needs a stream of its own.
    on_gpu = table.is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream() if on_gpu else None):
        for step in range(steps):
            if step:
                noise.copy_(sampler.noise(modes, random))  # fresh: a prompt must hold for any noise, not for one
            if on_gpu and step == RECORD_AT:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    gradient()
                gradient = graph.replay
            gradient()
            optimizer.step()
            schedule.step()
            loss = total.item()  # waits for all of that
            if not math.isfinite(loss):
                raise BadInput(f"class {name!r}: the loss of its prompts is not finite at step {step + 1} of {steps}; they "
                               "were not written. Try another --seed")
            if progress:
                progress(loss)
    return [text] * modes, pseudo_tokens.detach()


def plain(kind, label, name, modes, seed):
    """The baselines: K texts without pseudo-tokens. kind "class": the bare class; "text": with two adjectives."""
    if kind == "class":
        return [f"{TEMPLATE} {name}"] * modes
    random = np.random.default_rng([seed, label])
    return ["a {} photo of {} {}".format(*random.choice(ADJECTIVES, 2, replace=False), name) for _ in range(modes)]


# -------------------- Files

def save_prompts(path, texts, pseudo_tokens, settings):
    """One class's prompts: the pseudo-tokens in float16, 164 kB for 20 modes of SD-Turbo; all else as metadata of strings.

    Their numbers are about 0.01 large, and every generator of half precision rounds them more coarsely still.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({"pseudo_tokens": pseudo_tokens.half().cpu().contiguous()}, aside,
              {"texts": json.dumps(texts), "settings": json.dumps(settings)})
    os.replace(aside, path)


def load_prompts(path, settings):
    """The texts and the pseudo-tokens (K, m, d) of `save_prompts`. Raises BadInput if they were made otherwise."""
    try:
        with safe_open(path, "pt") as file:
            pseudo_tokens, metadata = file.get_tensor("pseudo_tokens"), file.metadata()
        texts, made_with = json.loads(metadata["texts"]), json.loads(metadata["settings"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path}: damaged or cut short ({error}); remove {path.parent} to have it made again") from error
    different = [f"{key} {made_with.get(key)}, not {value}" for key, value in settings.items()
                 if made_with.get(key) != value]
    if different:
        raise BadInput(f"{path}: was made with {'; '.join(different)}. Give another --out, or remove {path.parent}")
    return texts, pseudo_tokens
