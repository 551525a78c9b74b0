"""Make the offline stand-ins from nothing: a small ViT and a small one-step text-to-image generator.

    python tiny/train.py              # writes tiny/vit and tiny/turbo: minutes on a GPU, hours on a CPU

tiny/vit stands for DeiT on ImageNet, tiny/turbo for SD-Turbo. Both are the hub's own formats and are read by the same
code as the real ones. At the end the figures of tiny/README.md are printed.

A GAN or a distilled diffusion model finds by itself which noise paints which picture. Here the pictures are drawn, so
their nuisances (position, tilt, tint, ...) are known numbers, and the noise is simply told what each of them is: half a
dozen of its projections. Then one step is plain regression, from noise and caption to picture, with sharp results.
"""
import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, ViTConfig, ViTForImageClassification
from transformers import ViTImageProcessor

sys.path.insert(0, str(Path(__file__).parents[1]))
from quantize import recorded
from tiny import shapes

PICTURES = 120_000  # of each of two sets, for the classifier and for the generator
VIT_STEPS, VAE_STEPS, TAESD_STEPS, GENERATOR_STEPS = 6000, 4000, 4000, 10_000
BATCH = 256
REPORTED = 6000     # freshly drawn pictures for the figures at the end
TOKENS = 16         # the longest caption has 11, with its two marks
LATENT_SIDE = 16
ALL_DEFAULT = 0.4   # share of each attribute that is set back to its default, so that short captions are common
UNET = dict(sample_size=LATENT_SIDE, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 96),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=64, attention_head_dim=4, norm_num_groups=8, use_linear_projection=True)
VAE = dict(sample_size=shapes.SIDE, latent_channels=4, layers_per_block=1, block_out_channels=(16, 32),
           down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8)
TAESD = dict(encoder_block_out_channels=(16, 16), decoder_block_out_channels=(16, 16), num_encoder_blocks=(1, 1),
             num_decoder_blocks=(1, 1))
TEXT = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=TOKENS, projection_dim=64)
# SD-Turbo's own settings
SCHEDULER = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
                 prediction_type="epsilon", timestep_spacing="trailing", steps_offset=1)
VIT = dict(image_size=shapes.SIDE, patch_size=4, hidden_size=64, num_hidden_layers=6, num_attention_heads=4,
           intermediate_size=256, id2label=dict(enumerate(shapes.CLASSES)))


# -------------------- Pictures

def draw_many(seed, count, default):
    """`count` pictures: uint8 (count, 3, 32, 32), labels, captions, nuisances (count, 8)."""
    random = np.random.default_rng(seed)
    pictures, labels, captions, nuisances = [], random.integers(len(shapes.CLASSES), size=count), [], \
        random.random((count, shapes.NUISANCES))
    for label, u in zip(labels, nuisances):
        attributes = shapes.random_attributes(random)
        for group, values in shapes.ATTRIBUTES.items():
            if random.random() < default:
                attributes[group] = next(iter(values))
        pictures.append(np.asarray(shapes.draw(label, attributes, u)))
        captions.append(shapes.caption(label, attributes, random))
    return np.stack(pictures).transpose(0, 3, 1, 2), labels, captions, nuisances


def dataset(count, seed, default, device):
    """As `draw_many`, on all cores, tensors on `device`."""
    chunks = 64
    with ProcessPoolExecutor() as pool:
        parts = list(tqdm(pool.map(draw_many, [[seed, i] for i in range(chunks)], [-(-count // chunks)] * chunks,
                                   [default] * chunks), total=chunks, desc="drawing", disable=None))
    pictures, labels, captions, nuisances = zip(*parts)
    return (torch.from_numpy(np.concatenate(pictures)).to(device), torch.from_numpy(np.concatenate(labels)).to(device),
            sum(captions, []), torch.from_numpy(np.concatenate(nuisances)).float().to(device))


def centred(pictures):
    """uint8 to float in [-1, 1], the range of the VAE and, with mean = std = 0.5, of the ViT."""
    return pictures.float() / 127.5 - 1


# -------------------- The loop, shared

def fit(parameters, loss_of, steps, lr, description, weight_decay=0.0):
    """AdamW with warm-up and cosine decay on `loss_of()`; prints the mean of the last losses."""
    device = parameters[0].device
    optimizer = torch.optim.AdamW(
        parameters, lr=torch.tensor(lr, device=device), weight_decay=weight_decay, betas=(0.9, 0.99),
        fused=True, capturable=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1, (done + 1) / 200)
                                                 * 0.5 * (1 + math.cos(math.pi * done / steps)))
    latest, recent = torch.zeros((), device=device), []

    def step():
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        latest.copy_(loss.detach())

    start, step = time.perf_counter(), recorded(step, device)
    with tqdm(total=steps, desc=description, unit="step", disable=None) as progress:
        for done in range(1, steps + 1):
            step()
            schedule.step()
            progress.update()
            if done % 50 == 0 or done == steps:
                recent.append(latest.item())
                progress.set_postfix(loss=f"{recent[-1]:.4f}")
    print(f"{description}: {steps} steps, {time.perf_counter() - start:.0f} s, "
          f"loss {np.mean(recent[-10:]):.4f}", flush=True)


# -------------------- The classifier

def train_vit(pictures, labels, steps):
    vit = ViTForImageClassification(ViTConfig(**VIT)).to(pictures.device)

    def loss_of():
        index = torch.randint(len(pictures), (BATCH,), device=pictures.device)
        logits = vit(centred(pictures[index])).logits
        return F.cross_entropy(logits, labels[index], label_smoothing=0.05)

    fit(list(vit.parameters()), loss_of, steps, 1e-3, "vit", weight_decay=0.05)
    return vit.eval()


# -------------------- The generator

def make_tokenizer(folder):
    """A CLIP tokenizer for which each word of a caption is one token; other words fall into letters.

    Byte-pair encoding, trained on the words themselves, goes on merging until each of them is whole.
    """
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    trainer = trainers.BpeTrainer(vocab_size=10_000, min_frequency=1, initial_alphabet=letters, show_progress=False,
                                  end_of_word_suffix="</w>", special_tokens=[])
    trained.train_from_iterator(shapes.words(), trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = list(dict.fromkeys([*letters, *(letter + "</w>" for letter in letters), *model["vocab"],
                                 "<|startoftext|>", "<|endoftext|>"]))
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="CLIPTokenizer", model_max_length=TOKENS, bos_token="<|startoftext|>",
        eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token="<|endoftext|>")))
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    for word in shapes.words():
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word
    return tokenizer


def train_vae(pictures, steps):
    vae = AutoencoderKL(**VAE).to(pictures.device)

    def loss_of():
        target = centred(pictures[torch.randint(len(pictures), (BATCH,), device=pictures.device)])
        posterior = vae.encode(target).latent_dist
        return F.mse_loss(vae.decode(posterior.sample()).sample, target) + 1e-4 * posterior.kl().mean() / 1024

    fit(list(vae.parameters()), loss_of, steps, 2e-3, "vae")
    with torch.no_grad():  # the generator works with latents of unit variance
        vae.register_to_config(scaling_factor=1 / vae.encode(centred(pictures[:2048])).latent_dist.mean.std().item())
    return vae.eval()


def train_taesd(pictures, vae, steps):
    """The stand-in for TAESD: from the generator's latents to pictures, and back, with less arithmetic than the VAE."""
    taesd = AutoencoderTiny(**TAESD).to(pictures.device)

    def loss_of():
        target = centred(pictures[torch.randint(len(pictures), (BATCH,), device=pictures.device)])
        with torch.no_grad():
            latents = vae.encode(target).latent_dist.mean * vae.config.scaling_factor
        return F.mse_loss(taesd.decode(latents).sample, target) + F.mse_loss(taesd.encode(target).latents, latents)

    fit(list(taesd.parameters()), loss_of, steps, 2e-3, "taesd")
    return taesd.eval()


def patterns(device):
    """Orthonormal projections of the noise, (8, 4 * 16 * 16): one for each nuisance.

    Two for each channel of the noise: the sums over the pixels whose row and column are both even, and both odd. A
    convolution of stride two tells these apart, and attention, when it attends everywhere alike, sums them up.
    """
    basis = torch.zeros(4, 2, 4, LATENT_SIDE, LATENT_SIDE, device=device)
    for channel in range(4):
        for parity in range(2):
            basis[channel, parity, channel, parity::2, parity::2] = 2 / LATENT_SIDE
    return basis.flatten(0, 1).flatten(1)


def noise_for(nuisances):
    """Standard normal noise (N, 4, 16, 16) whose projections are the normal quantiles of the nuisances (N, 8)."""
    basis = patterns(nuisances.device)
    noise = torch.randn(len(nuisances), basis.shape[1], device=nuisances.device)
    wanted = torch.special.ndtri(nuisances.clamp(1e-4, 1 - 1e-4))
    return (noise + (wanted - noise @ basis.T) @ basis).view(-1, 4, LATENT_SIDE, LATENT_SIDE)


def train_generator(pictures, tokens, nuisances, vae, tokenizer, steps):
    device = pictures.device
    text_encoder = CLIPTextModel(CLIPTextConfig(
        **TEXT, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)).to(device)
    unet = UNet2DConditionModel(**UNET).to(device)
    scheduler = EulerDiscreteScheduler(**SCHEDULER)
    scheduler.set_timesteps(1)
    timestep, sigma = scheduler.timesteps[0].to(device), float(scheduler.sigmas[0])
    vae.requires_grad_(False)

    def loss_of():
        index = torch.randint(len(pictures), (BATCH,), device=device)
        target = centred(pictures[index])
        noise = noise_for(nuisances[index])
        eps = unet(sigma * noise / math.sqrt(sigma ** 2 + 1), timestep, text_encoder(tokens[index])[0]).sample
        latents = sigma * (noise - eps)  # Eq. (13)
        wanted = vae.encode(target).latent_dist.mean * vae.config.scaling_factor
        picture = vae.decode(latents / vae.config.scaling_factor).sample
        return 0.2 * F.mse_loss(latents, wanted) + F.mse_loss(picture, target) + 0.2 * F.l1_loss(picture, target)

    fit([*unet.parameters(), *text_encoder.parameters()], loss_of, steps, 3e-3, "generator")
    return StableDiffusionPipeline(vae=vae, text_encoder=text_encoder.eval(), tokenizer=tokenizer, unet=unet.eval(),
                                   scheduler=scheduler, safety_checker=None, feature_extractor=None,
                                   requires_safety_checker=False)


# -------------------- Figures

@torch.no_grad()
def report(vit, pipeline, device):
    """The figures of tiny/README.md."""
    pictures, labels, captions, _ = dataset(REPORTED, 1, 0.0, device)

    def classify(pixels):
        return torch.cat([vit(part).logits.argmax(-1) for part in pixels.split(500)])

    print(f"vit: {100 * (classify(centred(pictures)) == labels).float().mean():.2f} % of {len(pictures)} drawn pictures")
    pipeline.set_progress_bar_config(disable=True)
    for name, prompts in [("full captions", captions[:1200]),
                          ("class prompt", [f"a photo of {shapes.CLASSES[label]}" for label in labels[:1200]])]:
        painted = torch.cat([pipeline(prompts[i:i + 300], num_inference_steps=1, guidance_scale=0.0, output_type="pt"
                                      ).images for i in range(0, len(prompts), 300)]) * 2 - 1
        hits = 100 * (classify(painted.to(device)) == labels[:1200]).float().mean()
        spread = torch.stack([painted[(labels[:1200] == c).to(painted.device)].std(0).mean()
                              for c in range(len(shapes.CLASSES))]).mean()
        print(f"turbo, {name}: {hits:.1f} % recognised, standard deviation within a class {spread:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=Path(__file__).parent, type=Path, help="gets vit/ and turbo/")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    start = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out) as aside:
        aside = Path(aside)
        drawn, labels, _, _ = dataset(PICTURES, 2, 0.0, args.device)
        vit = train_vit(drawn, labels, VIT_STEPS)
        vit.save_pretrained(aside / "vit")
        ViTImageProcessor(size={"height": shapes.SIDE, "width": shapes.SIDE}, resample=2, image_mean=[0.5] * 3,
                          image_std=[0.5] * 3).save_pretrained(aside / "vit")
        pictures, _, captions, nuisances = dataset(PICTURES, 3, ALL_DEFAULT, args.device)
        tokenizer = make_tokenizer(aside / "tokenizer")
        tokens = tokenizer(captions, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
        vae = train_vae(pictures, VAE_STEPS)
        pipeline = train_generator(pictures, tokens.to(args.device), nuisances, vae, tokenizer, GENERATOR_STEPS)
        pipeline.save_pretrained(aside / "turbo")
        train_taesd(pictures, vae, TAESD_STEPS).save_pretrained(aside / "turbo" / "taesd")
        for name in ("vit", "turbo"):
            shutil.rmtree(args.out / name, ignore_errors=True)
            os.rename(aside / name, args.out / name)
    print(f"{time.perf_counter() - start:.0f} s")
    report(vit, pipeline.to(args.device), args.device)


if __name__ == "__main__":
    main()
