"""Paint a classifier's calibration images with a one-step text-to-image generator, SD-Turbo.

    python generate.py --class kite --modes 20                    # learn 20 prompts, then paint
    python generate.py --class all --model deit_s                 # all classes of the model
    torchrun --nproc_per_node=2 generate.py --class all           # shared out between two GPUs
    python generate.py --model tiny --class kite --modes 20       # offline, on a CPU
    python generate.py --model tiny --class kite --prompts text   # "a small photo of red kite"
    python generate.py --model tiny --class kite --prompts class  # "a photo of kite"

The pictures go to generated/<model>/<index>_<class>/m03_0000.png (mode 3, picture 0), beside
grid.png, a row per mode (five to a row, if each has one picture), and prompts.safetensors. Those
of the baselines go to generated/<model>-text and -class. A class that is done is not made again.
Eq. (13) is the sampler below; Eq. (12) and (14)-(17) are in prompts.py. A class takes 5 to 7 s on
an H200, the 1,000 of ImageNet under two hours; torchrun divides them between GPUs.
"""
import hashlib
import io
import math
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torchvision.transforms.v2 import functional as VF
from torchvision.utils import make_grid
from transformers import CLIPTextModel

import prompts
from checkpoints import MODEL_HELP, load_classifier, reading, require, write_whole
from eval import (Parser, decode, find_classes, progress, rank_and_processes, run, start,
                  whole_number)

SD_TURBO, TAESD = "stabilityai/sd-turbo", "madebyollin/taesd"
TINY_TURBO = "tiny/turbo"  # comes with this code
PARTS = "scheduler", "text_encoder", "tokenizer", "unet", "vae", "taesd"  # of a generator's folder
GENERATOR_REMEDY = "give SD-Turbo, a folder of diffusers, or --model tiny"
MODES = 20  # [paper]: several; the number is [ours]
PICTURES = 960  # of all classes together; more, if there are more prompts
PROMPTS_FILE = "prompts.safetensors"


# -------------------- The sampler: Eq. (13)

def unet_input(n, sigma):
    """In Eq. (13), sigma n / sqrt(sigma^2 + 1): the noise sigma n, scaled to the variance on which
    the UNet was trained. 999 is the noisiest time."""
    return sigma * n / math.sqrt(sigma ** 2 + 1)


def clean_latent(n, eps, sigma):
    """In Eq. (13), z0 = sigma (n - eps): the noise sigma n less the predicted noise sigma eps."""
    return sigma * (n - eps)


class OneStepSampler:
    """Eq. (13): eps = unet(sigma n / sqrt(sigma^2 + 1), 999, t), z0 = sigma (n - eps), x = D(z0).

    That SD-Turbo paints is [paper]. The step is written out here, since the pipeline's call is not
    differentiable in the embeddings t. On a GPU the networks run in bfloat16: in float16, the
    attention of SD 2.1 overflows.

    There may be two decoders D, each of which divides z0 by a factor of its own first. Pictures are
    painted by the generator's `vae`. Prompts are learned through `taesd`, its small copy: the full
    one would take most of the computation, for details that a classifier hardly sees. [ours]
    """

    def __init__(self, pipeline, taesd, device):
        """pipeline: of diffusers, its scheduler set to one step; taesd: the small decoder."""
        self.device, self.tokenizer = device, pipeline.tokenizer
        self.text_encoder, self.unet, self.vae, self.taesd = (
            part.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
            for part in (pipeline.text_encoder, pipeline.unet, pipeline.vae, taesd))
        self.timestep = pipeline.scheduler.timesteps[0].to(device)
        self.sigma = float(pipeline.scheduler.sigmas[0])

    def noise(self, count, rng):
        """n of Eq. (13), (count, 4, h, w), drawn on the CPU: it is the same on all devices."""
        config = self.unet.config
        shape = count, config.in_channels, config.sample_size, config.sample_size
        return torch.randn(shape, generator=rng).to(self.device)

    def __call__(self, t, n, decoder=None):
        """t (B, tokens, width), n (B, 4, h, w) -> pictures x (B, 3, H, W), about [-1, 1]."""
        decoder, dtype = decoder or self.vae, self.unet.dtype
        eps = self.unet(unet_input(n, self.sigma).to(dtype), self.timestep, t.to(dtype)).sample
        # in float32: sigma multiplies rounding errors
        z0 = clean_latent(n, eps.float(), self.sigma) / decoder.config.scaling_factor
        return decoder.decode(z0.to(dtype)).sample.float()


# -------------------- Generators

def generator_folder(generator):
    """Where a generator is if it is not on the hub; tiny/turbo is found from any folder."""
    return Path(__file__).parent / generator if generator == TINY_TURBO else Path(generator)


def load_part(network, source, **options):
    """A network of a generator. Raises ValueError if weights are missing: the libraries would draw
    them at random."""
    part, loading = network.from_pretrained(
        source, use_safetensors=True, output_loading_info=True, **options)
    if loading["missing_keys"]:
        raise ValueError(f"without {min(loading['missing_keys'])}")
    return part


def load_generator(generator, dtype):
    """A text-to-image pipeline from a hub id or a folder in diffusers' format, set to one step; and
    a small decoder: the folder's taesd/, TAESD for SD-Turbo from the hub, or else the full one."""
    # imported here, since quantizing with images at hand needs none of it
    import diffusers
    diffusers.utils.logging.disable_progress_bar()
    what, folder = f"generator {generator}", generator_folder(generator)
    small = folder / "taesd"
    if not folder.is_dir():
        with reading(what, GENERATOR_REMEDY, "is not a folder and could not be had from the hub"):
            # SD-Turbo's files in float16 are half the download
            folder = Path(diffusers.DiffusionPipeline.download(
                generator, use_safetensors=True, variant={SD_TURBO: "fp16"}.get(generator)))
            small = folder / "taesd" if generator != SD_TURBO else Path(snapshot_download(
                TAESD, allow_patterns=["config.json", "diffusion_pytorch_model.safetensors"]))
    with reading(what, GENERATOR_REMEDY):
        files = [path.name for path in folder.glob("unet/*.safetensors")]
        variant = "fp16" if files and all(".fp16" in file for file in files) else None
        networks = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL,
                    "text_encoder": CLIPTextModel}
        parts = {name: load_part(network, folder, subfolder=name, dtype=dtype, variant=variant)
                 for name, network in networks.items()}
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
            folder, safety_checker=None, **parts)  # SD-Turbo has none
        pipeline.scheduler.set_timesteps(1)
        return pipeline, load_part(diffusers.AutoencoderTiny, small, dtype=dtype) \
            if small.is_dir() else pipeline.vae


def paints_otherwise(pipeline):
    """What makes diffusers paint otherwise than Eq. (13) with this pipeline; "" if nothing does."""
    scheduler, encoder = pipeline.scheduler, pipeline.text_encoder.config
    if getattr(encoder, "use_attention_mask", False) or pipeline.unet.config.time_cond_proj_dim:
        return "use_attention_mask or time_cond_proj_dim"
    told = len(pipeline.tokenizer), pipeline.tokenizer.model_max_length
    if told != (encoder.vocab_size, encoder.max_position_embeddings):
        return "a tokenizer made for another text encoder"
    n, eps = torch.randn(2, 1, 4, 8, 8, generator=prompts.rng_of(0))
    timestep, sigma = scheduler.timesteps[0], scheduler.sigmas[0]
    noisy = n * scheduler.init_noise_sigma
    theirs = (scheduler.scale_model_input(noisy, timestep),
              scheduler.step(eps, timestep, noisy).prev_sample)
    ours = unet_input(n, sigma), clean_latent(n, eps, sigma)
    same = timestep == 999 and all(torch.allclose(*pair, atol=1e-3) for pair in zip(theirs, ours))
    return "" if same else f"this {type(scheduler).__name__}, whose step is another"


def load_sampler(generator, device):
    """The sampler of a generator, which has painted one picture through each of its decoders.
    Raises BadInput if it cannot, or if diffusers would paint otherwise."""
    what, cpu = f"generator {generator}", device.type == "cpu"
    pipeline, taesd = load_generator(generator, torch.float32 if cpu else torch.bfloat16)
    with torch.no_grad(), reading(what, GENERATOR_REMEDY):
        other = paints_otherwise(pipeline)
        require(not other, what, f"Eq. (13) does not hold with {other}", GENERATOR_REMEDY)
        sampler = OneStepSampler(pipeline, taesd, device)
        n = sampler.noise(1, prompts.rng_of(0))
        v = n.new_zeros(1, 0, pipeline.text_encoder.config.hidden_size)
        t = prompts.encode(sampler.text_encoder, sampler.tokenizer, [prompts.TEMPLATE], v)
        for x in (sampler(t, n, decoder) for decoder in (sampler.vae, sampler.taesd)):
            require(x.shape[1] == 3 and x.isfinite().all(), what,
                    "its pictures are not finite, or not RGB", GENERATOR_REMEDY)
    return sampler


# -------------------- Painting

def first_name(names, label):
    """"kite" of "kite, black kite": the name that goes into prompts."""
    require(not re.match("(LABEL_[0-9]+|n[0-9]{8})(,|$)", names[label]), f"class {names[label]}",
            "is a code", "write its name to the model's config.json, in id2label or label_names")
    return names[label].split(",")[0].replace("_", " ")


def class_folder(out, label, names):
    """generated/<model>/0021_kite. A class name never leaves its folder: "AC/DC" is not a path."""
    safe = re.sub(r"[^A-Za-z0-9-]+", "_", first_name(names, label)).strip("_")
    return Path(out) / f"{label:04d}_{safe[:100]}"  # file systems take some 250 letters


def picture_paths(folder, modes, per_mode):
    return [folder / f"m{mode:02d}_{number:04d}.png"
            for mode in range(modes) for number in range(per_mode)]


def is_done(folder, settings, per_mode):
    """Whether all of a class's pictures are there; the grid is written last.

    Raises BadInput if the class was made with other settings, or its pictures by others.
    """
    made, grid = folder / PROMPTS_FILE, folder / "grid.png"
    if made.exists():
        prompts.load_prompts(made, settings)
    # Pictures are listed before the prompts are looked for: another process may be making this
    # class, and it writes the prompts first.
    require(not [*folder.glob("m*_*.png")] or made.exists(), folder,
            f"has pictures, but no {made.name}", "name another folder with --out")
    paths = [made, grid, *picture_paths(folder, settings["modes"], per_mode)]
    return all(path.is_file() for path in paths)


def write_png(picture, path):
    """uint8 (3, H, W) -> a file that appears whole or not at all."""
    VF.to_pil_image(picture).save(file := io.BytesIO(), "png")
    write_whole(path, file.getvalue())


def paint(sampler, folder, label, texts, v, per_mode, seed, micro_batch):
    """Paint `per_mode` pictures per mode, and the grid. K texts, pseudo-tokens v (K, m, d)."""
    (folder / "grid.png").unlink(missing_ok=True)  # an older one may show fewer
    mode_of, pictures = torch.arange(len(v)).repeat_interleave(per_mode), []  # of each picture
    # each picture has a noise of its own, whatever else is painted with it
    noise = torch.cat([sampler.noise(1, prompts.rng_of(seed, label, mode, number))
                       for mode in range(len(v)) for number in range(per_mode)])
    for k, n in zip(mode_of.split(micro_batch), noise.split(micro_batch)):
        t = prompts.encode(sampler.text_encoder, sampler.tokenizer, [texts[i] for i in k], v[k])
        pictures.append(((sampler(t, n).clamp(-1, 1) + 1) * 127.5).round().byte().cpu())
    pictures = torch.cat(pictures)
    with ThreadPoolExecutor() as pool:
        list(pool.map(write_png, pictures, picture_paths(folder, len(texts), per_mode)))
    small = VF.resize(pictures, [min(pictures.shape[-1], 128)] * 2)  # an overview, of a few MB
    write_png(make_grid(small, per_mode if per_mode > 1 else 5), folder / "grid.png")


def make(sampler, classifier, label, folder, per_mode, settings, micro_batch, bar):
    """One class: its prompts, unless they are there already, and then its pictures."""
    path, name = folder / PROMPTS_FILE, first_name(classifier.class_names, label)
    modes, seed = settings["modes"], settings["seed"]
    bar.set_postfix({"class": name}, refresh=False)
    if not path.exists():
        if settings["prompts"] == "learned":
            texts, v = prompts.learn(sampler, classifier, label, name, modes, seed, micro_batch)
        else:
            texts = prompts.baseline_texts(settings["prompts"], label, name, modes, seed)
            v = torch.zeros(modes, 0, sampler.text_encoder.config.hidden_size)
        prompts.save_prompts(path, texts, v, settings)
    texts, v = prompts.load_prompts(path, settings)
    with torch.no_grad(), reading(path, f"remove {folder} to make it again"):
        prompts.encode(sampler.text_encoder, sampler.tokenizer, texts, v)
    paint(sampler, folder, label, texts, v, per_mode, seed, micro_batch)


def fill(out, classifier, labels, device, per_mode, settings, generator):
    """Learn the prompts and paint the pictures of the classes `labels` that are not done yet.

    per_mode: pictures per prompt. None: enough for PICTURES of all the model's classes, even if few
    are painted now: quantize.py draws all pictures equally often, so a class should not have more
    of them than another.
    settings: of `settings_of`; they are written beside the prompts. The classifier is on the device
    already. Each of several processes takes its share of the classes; all return when all are done.
    Raises BadInput, before painting, if a class was made with other settings.
    """
    rank, processes = rank_and_processes()
    per_mode = per_mode or math.ceil(PICTURES / (len(classifier.class_names) * settings["modes"]))
    folders = {label: class_folder(out, label, classifier.class_names) for label in labels}
    # every process looks at all of them: none paints if one class was made with other settings
    done = {label: is_done(folder, settings, per_mode) for label, folder in folders.items()}
    mine, sampler = labels[rank::processes], None
    if not all(done[label] for label in mine):
        sampler = load_sampler(generator, device)
        if rank == 0:
            print(f"{out}: painting {[*done.values()].count(False)} of {len(done)} classes, "
                  f"{settings['modes'] * per_mode} pictures each, on {processes} x {device.type}; "
                  "classes that are done are kept", file=sys.stderr)
    # on a GPU, only kernels that add in the same order each time: a seed gives the same pictures
    torch.use_deterministic_algorithms(device.type == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = False  # filling takes a kernel per tensor
    micro_batch = settings["modes"]
    with progress(len(mine), "painting", unit="class", disable=rank > 0) as bar:
        for label in mine:
            folder = folders[label]
            folder.mkdir(parents=True, exist_ok=True)
            while not is_done(folder, settings, per_mode):
                try:
                    make(sampler, classifier, label, folder, per_mode, settings, micro_batch, bar)
                except torch.OutOfMemoryError:
                    if micro_batch == 1:
                        raise
                    micro_batch = math.ceil(micro_batch / 2)
            bar.update()
    torch.use_deterministic_algorithms(False)
    if processes > 1:
        torch.distributed.barrier()


def summary(out, classifier, labels, device):
    """One line about the classes' pictures on disk: how many, the share that the classifier takes
    for their class, and the mean cosine of two phi within a class: the lower, the more diverse."""
    hits, cosines = [], []
    for label in labels:
        paths = sorted(class_folder(out, label, classifier.class_names).glob("m*_*.png"))
        pixels = torch.cat([some for _, some in decode(paths, VF.pil_to_tensor, "looking")])
        seen = [prompts.features(classifier, some.to(device) / 255) for some in pixels.split(64)]
        logits, phi = map(torch.cat, zip(*seen))
        hits += (logits.argmax(1) == label).tolist()
        cosines.append(prompts.mean_cosine(phi).item())
    return (f"{out}: {len(hits)} pictures, {100 * sum(hits) / len(hits):.1f} % recognised, "
            f"mean feature cosine {sum(cosines) / len(cosines):.3f} on {device}")


# -------------------- Command line

def parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--class", dest="label", required=True, metavar="NAME|INDEX|all", help="one of the model's")
    add("--model", default="deit_s", help=f"{MODEL_HELP} (default: %(default)s)")
    add("--generator", help=f"a hub id or a folder (default: {SD_TURBO}, for tiny {TINY_TURBO})")
    add("--prompts", choices=["learned", "text", "class"], default="learned",
        help="learned, or a baseline (default: %(default)s)")
    add("--modes", type=whole_number(1, 9999), default=MODES,
        help="prompts per class (%(default)s)")
    add("--per-mode", type=whole_number(1, 9999),
        help=f"pictures per prompt (default: enough for {PICTURES} of all classes)")
    add("--seed", type=whole_number(0), default=0, help="default: %(default)s")
    add("--out", metavar="DIR", help="default: generated/<model>, or <model>-<prompts>")
    return parser


def settings_of(classifier, generator, kind="learned", modes=MODES, seed=0):
    """All that the prompts of a class depend on, as it is written beside them.

    A generator on the hub is known by its name, one in a folder by a checksum of what is used.
    """
    digest, folder = hashlib.sha256(), generator_folder(generator)
    with reading(f"generator {generator}", GENERATOR_REMEDY):
        for path in sorted(path for part in PARTS for path in (folder / part).glob("*.*")):
            digest.update(f"{path.relative_to(folder)}".encode())
            with path.open("rb") as file:  # block by block: it may be gigabytes
                while block := file.read(2 ** 24):
                    digest.update(block)
    return dict(model=classifier.fingerprint, prompts=kind, modes=modes, seed=seed,
                generator=digest.hexdigest()[:16] if folder.is_dir() else generator,
                **(prompts.constants() if kind == "learned" else {}))


def default_folder(model, kind="learned"):
    return Path("generated") / (Path(model).resolve().name + {"learned": ""}.get(kind, f"-{kind}"))


def paint_missing(model, classifier, device):
    """For quantize.py: the folder generated/<model>, after painting what it lacks."""
    folder, names = default_folder(model), classifier.class_names
    generator = TINY_TURBO if model == "tiny" else SD_TURBO
    others = {*folder.glob("[!.]*/")} - {class_folder(folder, i, names) for i in range(len(names))}
    require(not others, folder, f"{sorted(path.name for path in others)[:3]} are no classes of the "
            "model", "move them away")
    settings = settings_of(classifier, generator)
    fill(folder, classifier, range(len(names)), device, None, settings, generator)
    return str(folder)


def main():
    args = parser().parse_args()
    device, begin = start(args.device), time.perf_counter()
    classifier = load_classifier(args.model, device)
    names = classifier.class_names
    labels = range(len(names)) if args.label == "all" else [
        *find_classes([args.label], names, "class").values()]
    generator = args.generator or (TINY_TURBO if args.model == "tiny" else SD_TURBO)
    settings = settings_of(classifier, generator, args.prompts, args.modes, args.seed)
    out = Path(args.out or default_folder(args.model, args.prompts))
    fill(out, classifier, labels, device, args.per_mode, settings, generator)
    if rank_and_processes()[0] == 0:
        print(f"{summary(out, classifier, labels, device)}, {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    run(main)
