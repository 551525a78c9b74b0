"""Paint a classifier's calibration images with a one-step text-to-image generator: SD-Turbo, or tiny/turbo offline.

    python generate.py --class kite --modes 20                    # learn 20 prompts for "kite", then paint
    python generate.py --class all --model deit_s                 # all classes of the model
    torchrun --nproc_per_node=4 generate.py --class all           # shared out among four GPUs
    python generate.py --model tiny --class kite --modes 20       # offline, on a CPU, in half a minute
    python generate.py --model tiny --class kite --prompts text   # baseline: "a <adjective> photo of <adjective> kite"
    python generate.py --model tiny --class kite --prompts class  # baseline: "a photo of kite"

The pictures go to generated/<model>/<index>_<class>/m03_0007.png (mode 3, picture 7; baselines: <model>-text, -class)
with grid.png, a row a mode, and prompts.safetensors. What is there already is not made again, so an interrupted run
goes on where it stopped. Eq. (13) is the sampler below; Eq. (12) and (14)-(17) are in prompts.py.
"""
import fcntl
import io
import math
import os
import re
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import logging as hub_logging
from huggingface_hub.errors import HFValidationError
from torchvision.transforms.v2 import functional as VF
from torchvision.utils import make_grid
from tqdm import tqdm

import prompts
from eval import (Parser, decode, find_class, list_images, load_classifier, rank_and_processes, run,
                  torch_device)
from vitq import BadInput

# cuBLAS adds in the same order each time only with a workspace of fixed size, and reads this when it starts
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

SD_TURBO, TAESD = "stabilityai/sd-turbo", "madebyollin/taesd"
TINY_TURBO = "tiny/turbo"  # comes with this code, so it is found from any working folder
MODES = 20
# How many pictures go through the generator at a time follows from the GPU's memory. While its gradient is pending, a pixel of
# SD-Turbo's takes so many bytes: measured, in bfloat16, through TAESD and through the full VAE.
BYTES_A_PIXEL, BYTES_A_PIXEL_VAE = 4_800, 16_500
MEMORY_SHARE = 0.85  # of a GPU's memory that is counted on; of all of it, since what is free differs from run to run
CPU_MEMORY = 8e9  # bytes that are counted on without a GPU
PROMPTS_FILE = "prompts.safetensors"
GRID_COLUMNS, GRID_SIDE = 10, 128  # pictures a row of grid.png, and the most pixels a side of each


# -------------------- The sampler: Eq. (13)

class OneStepSampler:
    """x = D(z0) from noise and prompt embeddings, in one step and differentiable in the embeddings.

    The pipeline's own call runs under no_grad and rounds to 8 bits at its end. This is the same arithmetic, in bfloat16
    on a GPU (in float16, SD 2.1's attention overflows), in float32 on a CPU.
    There may be two decoders D. Pictures are painted by the generator's `vae`. Prompts are learned through `taesd`, its
    small copy: the full one takes four fifths of a picture's arithmetic, to add what a classifier hardly sees.
    """

    def __init__(self, generator, device):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        pipeline = load_pipeline(generator, dtype)
        self.device, self.tokenizer = device, pipeline.tokenizer
        # frozen, so that gradients are computed for the pseudo-tokens alone
        self.text_encoder, self.unet, self.vae, self.taesd = (part.to(device).eval().requires_grad_(False) for part in (
            pipeline.text_encoder, pipeline.unet, pipeline.vae, load_taesd(generator, dtype) or pipeline.vae))
        if self.taesd is not self.vae:
            self.taesd.to(memory_format=torch.channels_last)  # a third faster; UNet and VAE are slower in it
        pipeline.scheduler.set_timesteps(1)
        # t and sigma of the single step, from the scheduler's own config: with "trailing" spacing t = 999
        self.timestep = pipeline.scheduler.timesteps[0].to(device)
        self.sigma = float(pipeline.scheduler.sigmas[0])
        self.side = self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)  # pixels

    def noise(self, count, random):
        """n of Eq. (13), (count, 4, h, w), float32; drawn on the CPU, so that every device paints from the same noise."""
        side = self.unet.config.sample_size
        return torch.randn(count, self.unet.config.in_channels, side, side, generator=random).to(self.device)

    def __call__(self, embeddings, noise, decoder=None):
        """Eq. (13): embeddings (B, tokens, width), noise (B, 4, h, w) -> pictures (B, 3, H, W), about [-1, 1].

        decoder: D, `self.vae` unless given.
        """
        decoder = decoder or self.vae
        noisy = self.sigma * noise / math.sqrt(self.sigma ** 2 + 1)
        eps = self.unet(noisy.to(self.unet.dtype), self.timestep, embeddings.to(self.unet.dtype)).sample
        # float32: sigma multiplies whatever eps was rounded by. Each decoder has a factor of its own, 0.18215 and 1.
        latents = self.sigma * (noise - eps.float()) / decoder.config.scaling_factor
        return decoder.decode(latents.to(decoder.dtype)).sample.float()

    def at_once(self, modes):
        """How many of `modes` pictures go through the generator at a time while learning: equal shares that fit."""
        memory = torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else CPU_MEMORY
        weights = sum(parameter.nbytes for part in (self.text_encoder, self.unet, self.vae)
                      for parameter in part.parameters())
        picture = self.side ** 2 * (BYTES_A_PIXEL_VAE if self.taesd is self.vae else BYTES_A_PIXEL)
        most = max(1, int((MEMORY_SHARE * memory - weights) / picture))
        return math.ceil(modes / math.ceil(modes / most))


def local_folder(generator):
    """The folder of a generator in diffusers' format, or None: then it is a hub id."""
    folder = Path(__file__).parent / generator if generator == TINY_TURBO else Path(generator)
    return folder if folder.is_dir() else None


def from_pretrained(kind, generator, source, **options):
    """kind.from_pretrained(source), with its many errors turned into a BadInput that names the generator."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries' complaints of each other
            return kind.from_pretrained(source, use_safetensors=True, **options)
    except (HFValidationError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(f"generator {generator}: " + (
            f"damaged or incomplete ({reason})" if local_folder(generator) else
            f"{source} is not a folder here, not in the local cache, and could not be downloaded "
            f"({type(error).__name__}); check the name and the network, or work offline with --model tiny, which needs "
            "none")) from error


def load_pipeline(generator, dtype):
    """The parts of a text-to-image model in diffusers' format: a hub id or a folder. Raises BadInput."""
    # imported here, since quantizing with images at hand needs none of it
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
    from diffusers.utils import logging
    logging.disable_progress_bar()
    for library in (logging, hub_logging):
        library.set_verbosity_error()
    folder = local_folder(generator)
    if folder and not (folder / "model_index.json").is_file():
        raise BadInput(f"generator {generator}: no model_index.json in it; give a folder in diffusers' format")
    # SD-Turbo comes without a safety checker, so none is looked for. On the hub, its float16 files are half the download.
    pipeline = from_pretrained(StableDiffusionPipeline, generator, folder or generator, dtype=dtype, safety_checker=None,
                               requires_safety_checker=False,
                               variant="fp16" if generator == SD_TURBO and not folder else None)
    if not isinstance(pipeline.scheduler, EulerDiscreteScheduler) or \
            pipeline.scheduler.config.prediction_type != "epsilon":
        raise BadInput(f"generator {generator}: its scheduler is not EulerDiscreteScheduler predicting epsilon, so "
                       "Eq. (13) does not hold for it; give SD-Turbo")
    return pipeline


def load_taesd(generator, dtype):
    """The small decoder of the generator's latents: the folder's taesd/, or TAESD for SD-Turbo from the hub, or None."""
    from diffusers import AutoencoderTiny
    folder = local_folder(generator)
    if folder and (folder / "taesd").is_dir():
        return from_pretrained(AutoencoderTiny, generator, folder / "taesd", dtype=dtype)
    if generator == SD_TURBO and not folder:
        return from_pretrained(AutoencoderTiny, generator, TAESD, dtype=dtype)


# -------------------- Painting

def class_folder(out, label, names):
    """generated/<model>/0021_kite. A class name never leaves its folder: "AC/DC" is not a path."""
    return Path(out) / f"{label:04d}_{re.sub(r'[^A-Za-z0-9-]+', '_', first_name(names, label)).strip('_')}"


def first_name(names, label):
    """"kite" of "kite, black kite": the name that goes into prompts."""
    return names[label].split(",")[0]


def picture_path(folder, mode, number):
    return folder / f"m{mode:02d}_{number:04d}.png"


def is_complete(folder, modes, per_mode):
    """Whether all of a class's pictures are there; the grid is written last."""
    return (folder / "grid.png").is_file() and all(
        picture_path(folder, mode, number).is_file() for mode in range(modes) for number in range(per_mode))


def write_png(picture, path):
    """uint8 (3, H, W) -> a file that appears whole or not at all."""
    encoded = io.BytesIO()
    VF.to_pil_image(picture).save(encoded, "PNG")
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(encoded.getvalue())
    os.replace(aside, path)


@torch.no_grad()
def paint(sampler, folder, label, texts, pseudo_tokens, per_mode, seed, progress):
    """Paint what is missing of `per_mode` pictures a mode, and the grid."""
    wanted = [(mode, number) for mode in range(len(texts)) for number in range(per_mode)]
    at_once = sampler.at_once(len(texts))
    pseudo_tokens = pseudo_tokens.to(sampler.device)
    written = []
    with ThreadPoolExecutor() as pool:
        for first in range(0, len(wanted), at_once):
            # a batch is painted whole even if only part of it is missing: another batch size rounds differently
            batch = wanted[first:first + at_once]
            missing = [i for i, item in enumerate(batch) if not picture_path(folder, *item).is_file()]
            if missing:
                modes = [mode for mode, _ in batch]
                embeddings = prompts.encode(sampler.text_encoder, sampler.tokenizer, [texts[mode] for mode in modes],
                                            pseudo_tokens[modes])
                # each picture has a noise of its own, whatever else is painted with it
                seeds = [np.random.SeedSequence([seed, label, *item]).generate_state(1)[0] for item in batch]
                noise = torch.cat([sampler.noise(1, torch.Generator().manual_seed(int(number))) for number in seeds])
                pictures = ((sampler(embeddings, noise).clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
                # written while the next ones are painted: to compress a picture takes a core longer than a GPU to paint it
                written += [pool.submit(write_png, pictures[i], picture_path(folder, *batch[i])) for i in missing]
            progress.update(len(batch))
    for writing in written:
        writing.result()
    columns = min(per_mode, GRID_COLUMNS)
    shown = [picture_path(folder, mode, number) for mode in range(len(texts)) for number in range(columns)]
    side = min(sampler.side, GRID_SIDE)
    pictures = torch.cat([part for _, part in decode(shown, lambda image: VF.pil_to_tensor(image.resize((side, side))),
                                                     None)])
    write_png(make_grid(pictures, columns), folder / "grid.png")


def seconds_of(function):
    """Measured: `function`, which returns a tensor, without gradients."""
    with torch.no_grad():
        for _ in range(2):  # the first is slower
            start = time.perf_counter()
            function().sum().item()
    return time.perf_counter() - start


@contextmanager
def deterministic(device):
    """On a GPU, only kernels that add in the same order each time: a seed gives the same prompts and pictures."""
    torch.use_deterministic_algorithms(device.type == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = False  # a kernel more for each tensor, against bugs only
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def claimed(folder, wait):
    """Yields whether this process has the folder of a class to itself; if `wait`, once no other process has it.

    The system frees a claim when its process ends, however it ends.
    """
    claim = folder / ".claim"
    with open(claim, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
        claim.unlink(missing_ok=True)  # whoever waits for it will find the class complete


def fill(out, classifier, labels, device, per_mode, settings):
    """Learn the prompts and paint the pictures that are missing of the classes `labels`; returns the seconds it took.

    settings: "model", "generator", "prompts", "modes" and "seed", on which the prompts depend and which are written
    beside them. The classifier is on the device already. Processes, of one machine or of several with a common disk,
    share the classes out by claiming them; each returns when all are done. Raises BadInput before painting if a class's
    prompts were made with other settings.
    """
    names, modes, kind, seed = classifier.class_names, settings["modes"], settings["prompts"], settings["seed"]
    folders = {label: class_folder(out, label, names) for label in labels}
    for folder in folders.values():
        if (folder / PROMPTS_FILE).exists():
            prompts.load_prompts(folder / PROMPTS_FILE, settings)
    missing = [label for label in labels if not is_complete(folders[label], modes, per_mode)]
    if not missing:
        return 0.0
    start = time.perf_counter()
    sampler = OneStepSampler(settings["generator"], device)
    try:
        for label in missing:
            folders[label].mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{out}: cannot be written to ({error.strerror}); name another folder") from error
    rank, processes = rank_and_processes()
    micro_batch = sampler.at_once(modes)
    steps = prompts.STEPS if kind == "learned" else 0

    noise, tokens = sampler.noise(micro_batch, torch.Generator()), torch.zeros(micro_batch, 0, 1)
    texts = [prompts.TEMPLATE] * micro_batch
    seconds = modes * per_mode * seconds_of(lambda: sampler(prompts.encode(
        sampler.text_encoder, sampler.tokenizer, texts, tokens), noise))
    if steps:  # learning looks at the candidates once; a step, with its gradients, takes about three looks
        seconds += modes * (prompts.CANDIDATES + 3 * steps) * seconds_of(lambda: prompts.look(
            sampler, classifier, texts, tokens, noise)[0])
    minutes = len(missing) * seconds / micro_batch / 60
    if rank == 0:
        print(f"{out}: {len(missing)} of {len(labels)} classes are missing; "
              + f"learning {modes} prompts and " * bool(steps) + f"painting {modes * per_mode} pictures of each with "
              f"{settings['generator']}, about {minutes / processes:.1f} minutes", flush=True)

    def make(label, progress):
        path = folders[label] / PROMPTS_FILE
        if path.exists():
            progress.update(steps)
        else:
            if steps:
                made = prompts.learn(sampler, classifier, label, first_name(names, label), modes, seed, steps, micro_batch,
                                     lambda loss: (progress.set_postfix(loss=f"{loss:.3f}", refresh=False),
                                                   progress.update()))
            else:
                made = prompts.plain(kind, label, first_name(names, label), modes, seed), \
                    torch.zeros(modes, 0, sampler.text_encoder.config.hidden_size)
            prompts.save_prompts(path, *made, settings)
        paint(sampler, folders[label], label, *prompts.load_prompts(path, settings), per_mode, seed, progress)

    with deterministic(device), tqdm(total=len(missing) * (steps + modes * per_mode), unit="step",
                                     disable=True if rank else None) as progress:
        # first what no other process has claimed, beginning at another place than they; then what they have not finished
        first = len(missing) * rank // processes
        for wait in (False, True):
            for label in missing[first:] + missing[:first]:
                with claimed(folders[label], wait) as mine:
                    if mine and not is_complete(folders[label], modes, per_mode):
                        progress.set_description(first_name(names, label))
                        make(label, progress)
    return time.perf_counter() - start


@torch.no_grad()
def summary(out, classifier, labels, device):
    """One line of the classes' pictures on disk: how many, the share that the classifier takes for their class, and
    the mean over the classes of the mean pairwise cosine of their features, Eq. (16): the lower, the more diverse."""
    hits, cosines = [], []
    for label in labels:
        paths = list_images(class_folder(out, label, classifier.class_names))
        pictures = torch.cat([pixels for _, pixels in decode(paths, VF.pil_to_tensor, None)])
        logits, features = zip(*(classifier.features(part.to(device) / 255) for part in pictures.split(64)))
        hits.append(torch.cat(logits).argmax(1) == label)
        cosines.append(prompts.mean_cosine(torch.cat(features)).item())
    hits = torch.cat(hits)
    return (f"{out}: {len(hits)} pictures, {100 * hits.float().mean().item():.1f} % recognised, "
            f"mean feature cosine {np.mean(cosines):.3f}")


# -------------------- Command line

def parser():
    parser = Parser(__doc__)
    parser.add_argument("--class", dest="label", required=True, metavar="NAME|INDEX|all", help="a class of the model")
    parser.add_argument("--model", default="deit_s", help="the classifier that is to be quantized, as for quantize.py "
                        "(default: %(default)s)")
    parser.add_argument("--generator", help="a hub id or a folder in diffusers' format (default: "
                        f"{SD_TURBO}, and tiny/turbo for --model tiny)")
    parser.add_argument("--prompts", choices=["learned", "text", "class"], default="learned",
                        help="how to get them: learned, or a baseline (default: %(default)s)")
    parser.add_argument("--modes", type=int, default=MODES, help="prompts a class (default: %(default)s)")
    parser.add_argument("--per-mode", type=int, default=4, help="pictures a prompt (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts and the noise (default: %(default)s)")
    parser.add_argument("--out", metavar="DIR", help="the folder to write (default: generated/<model>, and "
                        "-<prompts> for a baseline)")
    return parser


def settings_of(model, generator=None, kind="learned", modes=MODES, seed=0):
    """What a class's prompts depend on, as it is written beside them."""
    return {"model": model, "generator": generator or (TINY_TURBO if model == "tiny" else SD_TURBO), "prompts": kind,
            "modes": modes, "seed": seed}


def default_folder(settings):
    suffix = "" if settings["prompts"] == "learned" else f"-{settings['prompts']}"
    return Path("generated") / f"{Path(settings['model']).resolve().name}{suffix}"


def main():
    args = parser().parse_args()
    for name in ("modes", "per_mode"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
    device = torch_device(args.device)
    classifier = load_classifier(args.model)
    classifier.model.to(device).requires_grad_(False)
    names = classifier.class_names
    labels = list(range(len(names))) if args.label == "all" else [find_class(args.label, names)]
    settings = settings_of(args.model, args.generator, args.prompts, args.modes, args.seed)
    out = Path(args.out or default_folder(settings))
    seconds = fill(out, classifier, labels, device, args.per_mode, settings)
    if rank_and_processes()[0] == 0:
        print(f"{summary(out, classifier, labels, device)}, {seconds:.0f} s")


if __name__ == "__main__":
    run(main)
