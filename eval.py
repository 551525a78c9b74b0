"""Everything around the idea: checkpoints, preprocessing, image folders, accuracy, command lines.

    python eval.py --model vit_t --data imagenet/val                   # full precision
    python eval.py --model quantized/vit_t-w4a4 --data imagenet/val    # quantized, and its original
    python eval.py --model quantized/vit_t-w4a4 --data photos          # no labels: agreement only

No equation stands here; skip it on a first reading. Top-1 and top-5 are in percent of the images.
Agreement is the percent of images whose first class is the one that the full-precision model gives:
it needs no labels, and has less noise than the difference of two accuracies.
"""
import argparse
import difflib
import functools
import json
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from huggingface_hub import logging as hub_logging
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors.torch import load_file
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.models import ResNet18_Weights
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as VF
from tqdm import tqdm
from transformers import (AutoImageProcessor, DeiTConfig, DeiTForImageClassificationWithTeacher,
                          ViTConfig, ViTForImageClassification)

import vitq
from vitq import BadInput, reading

MODELS = {"tiny": str(Path(__file__).parent / "tiny" / "vit")}
for size in ("tiny", "small", "base"):
    MODELS[f"deit_{size[0]}"] = f"facebook/deit-{size}-patch16-224"
    # the full tag matters: under another one, the same ViT has other weights and normalization
    MODELS[f"vit_{size[0]}"] = f"timm/vit_{size}_patch16_224.augreg_in21k_ft_in1k"
    MODELS[f"swin_{size[0]}"] = f"microsoft/swin-{size}-patch4-window7-224"
MODEL_HELP = f"{', '.join(MODELS)}, a hub id (owner/name), or a folder"
FILES = ["config.json", "preprocessor_config.json", "model.safetensors"]

transformers.logging.disable_progress_bar()
for library in (transformers.logging, hub_logging):  # what they warn of is raised here
    library.set_verbosity_error()


# -------------------- Preprocessing: always the checkpoint's own

# This and the normalizer are cached, since the program waits for a GPU to which it copies.
@functools.cache
def resizing(side, resized, crop, interpolation, device):
    """The matrix (crop, side) that resizes a row of pixels, antialiased, and crops its centre."""
    row = VF.resize(torch.eye(side)[None], [resized, side], InterpolationMode(interpolation))
    return VF.center_crop(row, [crop, side])[0].to(device)


@dataclass(eq=False)
class Preprocessing:
    """From a photograph to the network's input, as the checkpoint's own files describe it.

    With another checkpoint's mean and std a ViT loses much of its accuracy, and nothing says so;
    hence there is no default.
    """
    resize: int | list  # the short side in pixels, or [height, width], whatever the aspect ratio
    crop: int           # side of the centre crop, which is the side of the network's input
    interpolation: str  # "bicubic", ...
    mean: list          # of red, green, blue in [0, 1]
    std: list

    @classmethod
    def from_timm(cls, config):
        """From the `pretrained_cfg` of a timm checkpoint."""
        crop, resize = config["input_size"][-1], int(config["input_size"][-1] / config["crop_pct"])
        return cls(resize, crop, config["interpolation"], config["mean"], config["std"])

    @classmethod
    def from_transformers(cls, processor):
        """From a transformers image processor."""
        size, crop_size = processor.size, processor.crop_size
        resize = size.shortest_edge or [size.height, size.width]
        crop = crop_size.height if processor.do_center_crop else size.height or size.shortest_edge
        interpolation = ["nearest", "lanczos", "bilinear", "bicubic"][int(processor.resample)]
        return cls(resize, crop, interpolation, processor.image_mean, processor.image_std)

    def pixels(self, margin=0):
        """A transform from a PIL image to uint8 (3, crop + margin, crop + margin).

        Without a margin it is the checkpoint's; with one, the square has the whole short side.
        """
        square = isinstance(self.resize, list)
        resize = [self.crop + margin] * (1 + square) if margin else self.resize
        return v2.Compose([v2.Resize(resize, InterpolationMode(self.interpolation)),
                           v2.CenterCrop(self.crop + margin), v2.PILToTensor()])

    def of_pictures(self, images):
        """As `pixels` and `normalizer`, but differentiable, for float (B, 3, H, W) in [0, 1].

        Resizing is linear, rows and columns apart: two matrix products. Their gradient is the same
        each time; that of torch's own kernel is not, on a GPU.
        """
        sides = images.shape[-2:]
        resized = self.resize if isinstance(self.resize, list) else [
            self.resize * side // min(sides) for side in sides]
        rows, columns = (resizing(side, to, self.crop, self.interpolation, images.device)
                         for side, to in zip(sides, resized))
        return self.normalizer(images.device)(255 * (rows @ images @ columns.T))

    @functools.cache
    def normalizer(self, device):
        """A function from pixels (B, 3, H, W) in [0, 255] to the network's float32 input."""
        mean, std = (torch.tensor(of, device=device).view(3, 1, 1) for of in (self.mean, self.std))
        return lambda pixels: (pixels / 255 - mean) / std


# -------------------- Classifiers

@dataclass
class Classifier:
    """A model in eval mode, with what its checkpoint says of its input and classes."""
    model: torch.nn.Module
    preprocessing: Preprocessing

    @property
    def class_names(self):
        """In the order of the logits."""
        return [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]

    def features(self, images):
        """f and phi of Eq. (14) and (16): logits (B, classes), features (B, blocks x channels).

        images: float (B, 3, H, W) in [0, 1], of any size, on the model's device. phi: the mean
        token of every block's output, each of unit length, so that the cosine of two phi is the
        mean of the blocks' cosines. The head's own input would not do: a good classifier's is
        nearly the same for all pictures of a class, while the layers below still tell them apart.
        """
        with vitq.block_outputs(self.model) as h:
            logits = self.model(self.preprocessing.of_pictures(images)).logits
        means = [output.mean(1) for output in h]  # (B, channels) each
        return logits, torch.cat([torch.nn.functional.normalize(mean) for mean in means], 1)


def model_folder(model):
    """The local folder of a checkpoint: `model` is a name in MODELS, a folder, or a hub id.

    Raises BadInput if it is none of them, or cannot be downloaded.
    """
    hub_id = MODELS.get(model, model)
    if Path(hub_id).is_dir():
        return Path(hub_id)
    try:
        return Path(snapshot_download(hub_id, allow_patterns=FILES))
    except Exception as error:  # the hub's client raises its own, its HTTP library's, the system's
        namesake = f" (the folder of that name is ./{model})" * Path(model).is_dir()
        raise BadInput(f"model {model!r}{namesake}: {hub_id} is not a folder and could not be had "
                       f"from the hub ({type(error).__name__}); give {MODEL_HELP}") from error


def load_classifier(model):
    """A full-precision `Classifier` from a name, a hub id or a folder, in transformers' or timm's
    format. Raises BadInput if it is not found, not a ViT, DeiT or Swin classifier, or damaged."""
    folder = model_folder(model)
    for file in FILES[::2]:
        if not (folder / file).is_file():
            raise BadInput(f"model {model}: no {file} in it; give the folder of a checkpoint")
    with reading(f"model {model}", "download it again"):
        config = json.loads((folder / FILES[0]).read_text())
        if "pretrained_cfg" in config:
            return Classifier(*from_timm(config, load_file(folder / FILES[2])))
        architecture = (config.get("architectures") or ["no architecture"])[0]
        if architecture not in vitq.FAMILIES:
            raise BadInput(f"model {model}: holds {architecture}; give one of "
                           f"{', '.join(vitq.FAMILIES)}, in full precision")
        network, loading = vitq.FAMILIES[architecture].from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, dtype=torch.float32)
        if loading["missing_keys"]:  # transformers would leave them at random values
            raise KeyError(f"without {min(loading['missing_keys'])}")
        processor = AutoImageProcessor.from_pretrained(folder)
        return Classifier(network.eval(), Preprocessing.from_transformers(processor))


# timm's parameter names, and what the same parameter is called in transformers' ViT and DeiT
TIMM_NAMES = [(r"^blocks\.", "layers."), (r"^norm\.", "layernorm."), (r"\.attn\.", ".attention."),
              (r"\.norm1\.", ".layernorm_before."), (r"\.norm2\.", ".layernorm_after."),
              (r"\.attention\.proj\.", ".attention.o_proj."),
              (r"^(cls_token|pos_embed|dist_token|patch_embed)", r"embeddings.\1"),
              (r"\.pos_embed", ".position_embeddings"), (r"\.dist_token", ".distillation_token"),
              (r"\.patch_embed\.proj\.", ".patch_embeddings.projection.")]


def from_timm(config, tensors):
    """A transformers ViT (or distilled DeiT) and its preprocessing from timm's config and tensors.

    timm's plain DeiT is its ViT with other weights. Raises BadInput for other architectures.
    """
    architecture, pretrained = config["architecture"], config["pretrained_cfg"]
    if not re.fullmatch(r"(vit|deit)_(tiny|small|base)(_distilled)?_patch\d+_\d+", architecture):
        raise BadInput(f"{architecture}: of timm's format only ViT and DeiT (tiny, small, base) "
                       "are read; for Swin take transformers' format, for example --model swin_t")
    classes, distilled = config["num_classes"], "dist_token" in tensors
    hidden = tensors["cls_token"].shape[-1]
    names = pretrained.get("label_names") or (ResNet18_Weights.DEFAULT.meta["categories"]
                                              if classes == 1000 else map(str, range(classes)))
    settings = dict(
        hidden_size=hidden, num_attention_heads=hidden // 64,  # 64 in every size of timm's
        num_hidden_layers=sum(name.endswith(".norm1.weight") for name in tensors),
        intermediate_size=len(tensors["blocks.0.mlp.fc1.weight"]), layer_norm_eps=1e-6,
        patch_size=tensors["patch_embed.proj.weight"].shape[-1],
        image_size=pretrained["input_size"][-1], id2label=dict(enumerate(names)))
    network = DeiTForImageClassificationWithTeacher(DeiTConfig(**settings)) if distilled else \
        ViTForImageClassification(ViTConfig(**settings))
    rules = [*TIMM_NAMES, (r"^(?!head)", f"{network.base_model_prefix}."),
             (r"^head_dist", "distillation_classifier"),
             (r"^head", "cls_classifier" if distilled else "classifier")]
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if ".qkv." in name:  # timm has the three projections in one matrix, (3 * hidden, hidden)
            for part, chunk in zip("qkv", tensor.chunk(3)):
                renamed[name.replace("qkv", f"{part}_proj")] = chunk
        else:
            renamed[name] = tensor
    network.load_state_dict(renamed)
    return network.float().eval(), Preprocessing.from_timm(pretrained)


# -------------------- Images

def list_images(folder):
    """All image files below a folder, sorted, but for generate.py's overviews, grid.png.

    Raises BadInput if there are none.
    """
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMG_EXTENSIONS
                   and path.name != "grid.png")
    if not paths:
        raise BadInput(f"{folder}: no folder with images (looked for {' '.join(IMG_EXTENSIONS)})")
    return paths


def classes_named(name, names):
    """The indices of the classes meant by "21", "0021_kite", "Kite" or "great_white_shark".

    A class may have several names: "kite, black kite".
    """
    number = re.match(r"(\d+)(_|$)", name)
    if number:
        return [int(number[1])] if int(number[1]) < len(names) else []
    plain = " ".join(name.replace("_", " ").casefold().split())
    return [index for index, synonyms in enumerate(names)
            if plain in [synonyms.casefold(), *synonyms.casefold().split(", ")]]


def find_class(name, names, what="class"):
    """The index of the class that a name means. Raises BadInput if there is none, or several."""
    found = classes_named(name, names)
    if len(found) == 1:
        return found[0]
    if found:
        raise BadInput(f"{what} {name!r}: several classes have this name; give the index, "
                       + " or ".join(map(str, found)))
    near = difflib.get_close_matches(name, ", ".join(names).split(", "))
    raise BadInput(f"{what} {name!r} is none of the model's {len(names)} classes; give an index "
                   f"below {len(names)} or a name" + f", as {', '.join(near)}" * bool(near))


def labelled_images(folder, names):
    """Images and their labels: (paths, class indices), or (paths, None) if there are no subfolders.

    A subfolder is a class, by index, by name, or, if none is either and there are as many as
    classes, by rank (ImageNet's wnid folders). Raises BadInput for one that matches no class.
    """
    paths = list_images(folder)
    owners = [path.relative_to(folder).parts[0] for path in paths]
    loose = [path.name for path in paths if path.parent == Path(folder)]
    if len(loose) == len(paths):
        return paths, None
    if loose:
        raise BadInput(f"{folder}: {loose[0]} lies beside the class folders; move it into one")
    folders = sorted(set(owners))
    by_rank = len(folders) == len(names) and not any(classes_named(one, names) for one in folders)
    index = {one: rank if by_rank else find_class(one, names, f"{folder}: class folder")
             for rank, one in enumerate(folders)}
    return paths, [index[one] for one in owners]


def decode(paths, transform, description, chunk=256):
    """Decode images on all cores; yields (their positions in `paths`, uint8 (n, 3, H, W)).

    What cannot be decoded is skipped and named on stderr; raises BadInput if nothing is left.
    """
    def load(path):
        try:
            with Image.open(path) as image:
                return transform(image.convert("RGB"))
        except Exception as error:  # Pillow's decoders raise nearly every kind there is
            broken.append(f"{path} ({type(error).__name__})")

    broken = []
    # threads suffice: Pillow decodes and resizes outside the interpreter's lock
    bar = tqdm(total=len(paths), desc=description, disable=None)
    with ThreadPoolExecutor() as pool, bar:
        for start in range(0, len(paths), chunk):
            images = dict(enumerate(pool.map(load, paths[start:start + chunk]), start))
            bar.update(len(images))
            good = [position for position, image in images.items() if image is not None]
            if good:
                yield good, torch.stack([images[position] for position in good])
    if len(broken) == len(paths):
        raise BadInput(f"none of {len(paths)} images could be decoded, the first: {broken[0]}")
    if broken:
        print(f"skipped {len(broken)} of {len(paths)} images that could not be decoded: "
              + ", ".join(broken[:5]) + ", ..." * (len(broken) > 5), file=sys.stderr)


# -------------------- Accuracy

FULL_PRECISION = "full precision"  # the name of the reference among the models that are compared


@torch.no_grad()
def evaluate(models, preprocessing, paths, labels, device):
    """Run `models` (name -> model, its size in MB) over the same images, and print the table.

    Returns name -> {"top-1 %", "top-5 %": None without labels; "agreement %" with the model named
    FULL_PRECISION, None without one; "size MB"}.
    """
    normalize, kept, top5 = preprocessing.normalizer(device), [], {name: [] for name in models}
    for positions, pixels in decode(paths, preprocessing.pixels(), "evaluating"):
        kept += positions
        for batch in pixels.split(64):
            for name, (model, _) in models.items():
                logits = model.to(device)(normalize(batch.to(device))).logits  # (B, classes)
                top5[name].append(logits.topk(min(5, logits.shape[1])).indices.cpu())

    results = {name: dict.fromkeys(["top-1 %", "top-5 %", "agreement %"]) for name in models}
    for name, row in results.items():
        predicted = torch.cat(top5[name])  # (N, 5)
        if labels is not None:
            hits = (predicted == torch.tensor(labels)[kept][:, None]).double()
            row["top-1 %"] = 100 * hits[:, 0].mean().item()
            row["top-5 %"] = 100 * hits.sum(1).mean().item()
        if FULL_PRECISION in models:
            same = predicted[:, 0] == torch.cat(top5[FULL_PRECISION])[:, 0]
            row["agreement %"] = 100 * same.double().mean().item()
        row["size MB"] = models[name][1]
    print(" " * len(FULL_PRECISION) + "".join(f"{column:>13}" for column in row))
    for name, row in results.items():
        cells = ("-" if value is None else f"{value:.2f}" for value in row.values())
        print(f"{name:{len(FULL_PRECISION)}}" + "".join(f"{cell:>13}" for cell in cells))
    return results


def full_precision_mb(model):
    """The size of a model's parameters in float32, in MB of 10^6 bytes."""
    return sum(parameter.numel() for parameter in model.parameters()) * 4 / 1e6


# -------------------- Steps that run without a gap

RECORD_AT = 4  # the call that is recorded: the first ones allocate memory and choose kernels
COMPILE_FROM = 100  # steps: compiling takes some 20 s, which shorter runs do not earn back
COMPILATIONS = 64  # of one function, for other shapes; torch gives up at 8
# what torch.compile needs on a CPU; where it is missing, nothing is compiled
CPU_COMPILER = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


class RecordedStep:
    """Calls `step()`, a function without arguments. On a GPU, it is recorded as a CUDA graph.

    A training step is thousands of small kernels, which take longer to launch one by one than to
    run. Replayed as a whole, they run without a gap. What changes from step to step has to lie in
    tensors that are written in place. Recording needs a stream of its own.
    """

    def __init__(self, step, device):
        self.step, self.calls = step, 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self):
        if self.stream is None:
            return self.step()
        self.calls += 1
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            if self.calls == RECORD_AT:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=self.stream):
                    self.step()
                self.step = graph.replay
            self.step()
        torch.cuda.current_stream().wait_stream(self.stream)


def compiled(function, device, steps):
    """`function`, compiled for `steps` calls, which fuses its small kernels; or as it is."""
    if steps < COMPILE_FROM or device.type == "cpu" and not shutil.which(CPU_COMPILER):
        return function
    torch._dynamo.config.recompile_limit = COMPILATIONS
    # combo_kernels: independent kernels, such as those of the weights, are launched as one;
    # force_shape_pad: matrices with rows of 197 numbers are padded to a multiple of 8
    options = dict.fromkeys(["combo_kernels", "force_shape_pad"], device.type == "cuda")
    return torch.compile(function, dynamic=False, options=options)


@contextmanager
def compiled_forward(modules, device, steps):
    """Within it, the forward of each of `modules` is `compiled`."""
    for module in modules:
        module.forward = compiled(module.forward, device, steps)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


# -------------------- The frame of all command lines

class Parser(argparse.ArgumentParser):
    """argparse with the docstring as the help text and errors of one line."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--device", help="cuda:1, cpu, ... (default: a GPU, if there is one)")

    def error(self, message):
        raise BadInput(f"{message}; see --help")


def positive(text):
    """For argparse: a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, 1 or more")
    return int(text)


def rank_and_processes():
    """This process's number and how many there are: 0 and 1, but under torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start(name):
    """The device of this process, from now on the current one; under torchrun, joins the others.

    Raises BadInput for a device that is not there.
    """
    try:
        # torchrun gives each process of a machine a number, and with it a GPU
        gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        device = torch.empty(1, device=name or gpu).device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device {name!r} is not available here; give --device cpu") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if rank_and_processes()[1] > 1 and not dist.is_initialized():
        # a day: processes that paint wait for each other at the end
        dist.init_process_group(timeout=timedelta(days=1))
    return device


def run(main):
    """Run a command; bad input ends it with one line on stderr and exit status 2."""
    try:
        main()
    except (BadInput, OSError, torch.OutOfMemoryError) as error:
        print(f"{Path(sys.argv[0]).name}: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def parser():
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, help=f"{MODEL_HELP}, also one of quantize.py's")
    parser.add_argument("--data", required=True, help="images, or folders of images, one per class")
    return parser


def original(config, needed):
    """The full-precision model of a quantized one; None if it is not there, unless it is needed."""
    try:
        return load_classifier(config["source"]).model
    except BadInput as error:
        if needed:
            raise
        print(f"without agreement, which needs the full-precision model: {error}", file=sys.stderr)


def main():
    args = parser().parse_args()
    device, models = start(args.device), {}
    if vitq.read_config(args.model):
        model, config = vitq.load_quantized(args.model)
        classifier = Classifier(model, Preprocessing(**config["preprocessing"]))
        size = (Path(args.model) / "model.safetensors").stat().st_size / 1e6
        models[config["bits"]] = model, size
    else:
        classifier = load_classifier(args.model)
    paths, labels = labelled_images(args.data, classifier.class_names)
    reference = original(config, labels is None) if models else classifier.model
    if reference is not None:
        models = {FULL_PRECISION: (reference, full_precision_mb(reference)), **models}
    print(f"{args.model} on {len(paths)} images of {args.data}" + ", without labels" * (not labels))
    evaluate(models, classifier.preprocessing, paths, labels, device)


if __name__ == "__main__":
    run(main)
