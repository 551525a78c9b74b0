"""Pretrained classifiers, folders of images, and how well a model does on them.

    python eval.py --model vit_t --data imagenet/val                      # full precision
    python eval.py --model quantized/vit_t-w4a4 --data imagenet/val       # quantized, beside its full precision
    python eval.py --model quantized/vit_t-w4a4 --data photos             # no labels: agreement only

Top-1 and top-5 are in percent of the images; agreement is the percent of images whose first class is the one that
the full-precision model gives, so it needs no labels and has less noise than a difference of two accuracies.
"""
import argparse
import difflib
import functools
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.models import ResNet18_Weights
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as VF
from tqdm import tqdm
from transformers import (AutoImageProcessor, DeiTConfig, DeiTForImageClassificationWithTeacher,
                          ViTConfig, ViTForImageClassification)

import vitq
from vitq import BadInput

# The full tag of a ViT matters: under other tags the same architecture has other weights and another normalization.
MODELS = {"deit_t": "facebook/deit-tiny-patch16-224", "deit_s": "facebook/deit-small-patch16-224",
          "deit_b": "facebook/deit-base-patch16-224",
          "vit_t": "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
          "vit_s": "timm/vit_small_patch16_224.augreg_in21k_ft_in1k",
          "vit_b": "timm/vit_base_patch16_224.augreg_in21k_ft_in1k",
          "swin_t": "microsoft/swin-tiny-patch4-window7-224", "swin_s": "microsoft/swin-small-patch4-window7-224",
          "swin_b": "microsoft/swin-base-patch4-window7-224",
          "tiny": str(Path(__file__).parent / "tiny" / "vit")}
FILES = ["config.json", "preprocessor_config.json", "model.safetensors"]

transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()  # what it would say of a checkpoint, `load_classifier` checks and raises


# -------------------- Preprocessing: always the checkpoint's own

# Cached, since what a GPU is given while it works makes the program wait for it.

@functools.cache
def per_channel(values, device):
    """Three numbers as a tensor (3, 1, 1)."""
    return torch.tensor(values, device=device).view(3, 1, 1)


@functools.cache
def resizing(side, resized, crop, interpolation, device):
    """The matrix (crop, side) that resizes `side` pixels in a row to `resized`, antialiased, and crops their centre."""
    unit = VF.resize(torch.eye(side)[None], [resized, side], InterpolationMode(interpolation), antialias=True)
    return VF.center_crop(unit, [crop, side])[0].to(device)


@dataclass
class Preprocessing:
    """From a photograph to the network's input, as the checkpoint's own files describe it.

    With another checkpoint's mean and std a ViT loses much of its accuracy and nothing says so; hence no default.
    """
    resize: int | list  # the short side in pixels, or [height, width] where the checkpoint ignores the aspect ratio
    crop: int           # side of the centre crop, which is the side of the network's input
    interpolation: str  # "bicubic", ...
    mean: list          # of red, green, blue in [0, 1]
    std: list

    @classmethod
    def from_timm(cls, config):
        """From the `pretrained_cfg` of a timm checkpoint."""
        crop = config["input_size"][-1]
        return cls(int(crop / config["crop_pct"]), crop, config["interpolation"], config["mean"], config["std"])

    @classmethod
    def from_transformers(cls, processor):
        """From a transformers image processor."""
        size = processor.size
        resize = size.shortest_edge or [size.height, size.width]
        crop = processor.crop_size.height if processor.do_center_crop else size.height or size.shortest_edge
        interpolation = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}[int(processor.resample)]
        return cls(resize, crop, interpolation, list(processor.image_mean), list(processor.image_std))

    def pixels(self, margin=0):
        """A transform from a PIL image to uint8 (3, crop + margin, crop + margin); with a margin, of all its short side."""
        square = isinstance(self.resize, list)  # the checkpoint ignores the aspect ratio
        resize = [self.crop + margin] * (1 + square) if margin else self.resize if square else [self.resize]
        return v2.Compose([v2.Resize(resize, InterpolationMode(self.interpolation)),
                           v2.CenterCrop(self.crop + margin), v2.PILToTensor()])

    def of_pictures(self, images):
        """The network's input from float pictures (B, 3, H, W) in [0, 1], of any size: as `pixels`, but differentiable.

        Antialiased, for without it a 512-pixel picture would turn into another texture. Resizing is linear, rows and
        columns apart: two matrix products, whose gradient is the same each time, while on a GPU torch's own kernel for it
        adds in any order.
        """
        sides = images.shape[-2:]
        resized = self.resize if isinstance(self.resize, list) else [self.resize * side // min(sides) for side in sides]
        rows, columns = (resizing(side, to, self.crop, self.interpolation, images.device)
                         for side, to in zip(sides, resized))
        return self.normalizer(images.device)(255 * (rows @ images @ columns.T))

    def normalizer(self, device):
        """A function from uint8 (B, 3, H, W) to the network's float32 input, both on the device."""
        mean, std = (per_channel(tuple(value), device) for value in (self.mean, self.std))
        return lambda pixels: (pixels / 255 - mean) / std


# -------------------- Classifiers

@dataclass
class Classifier:
    """A full-precision model in eval mode, on the CPU, with what its checkpoint says of its input and classes."""
    model: nn.Module
    preprocessing: Preprocessing

    @property
    def class_names(self):
        return class_names(self.model)

    def features(self, images):
        """f and phi of Eq. (14) and (16): logits (B, classes) and features (B, sum of the blocks' channels).

        images: float (B, 3, H, W) in [0, 1], of any size, on the model's device.
        phi: the mean over the tokens of every block's output, each of unit length, one after the other, so that the
        cosine of two phi is the mean of the blocks' cosines. The head's own input would not do: a good classifier's is nearly
        the same for all pictures of a class, while the layers below, all of which are calibrated, still tell them apart.
        """
        blocks = vitq.Blocks(self.model)
        try:
            logits = self.model(self.preprocessing.of_pictures(images)).logits
        finally:
            blocks.remove()
        return logits, torch.cat([F.normalize(output.mean(1), dim=1) for output in blocks.outputs], 1)


def class_names(model):
    """The names of a model's classes, in the order of its logits."""
    return [model.config.id2label[index] for index in range(model.config.num_labels)]


def model_folder(model):
    """The local folder of a checkpoint: `model` is a name in MODELS, a folder, or a hub id, which is downloaded.

    Raises BadInput for an unknown name, and where the download fails.
    """
    hub_id = MODELS.get(model, model)
    if Path(hub_id).is_dir():
        return Path(hub_id)
    if hub_id.startswith("quantized/"):
        raise BadInput(f"model {model!r}: no such folder; quantize.py writes it")
    try:
        if "/" not in hub_id:
            raise HFValidationError
        validate_repo_id(hub_id)
    except HFValidationError:
        near = difflib.get_close_matches(model, MODELS, n=3, cutoff=0.3) or MODELS
        raise BadInput(f"model {model!r}: not a folder here, not owner/name on the hub, and not a known name; "
                       f"did you mean {', '.join(near)}?") from None
    try:
        return Path(snapshot_download(hub_id, allow_patterns=FILES))
    except Exception as error:  # the hub's client raises its own errors, its HTTP library's, and the system's
        namesake = f"for the folder of that name give ./{model}; " if Path(model).is_dir() else ""
        raise BadInput(f"model {model!r}: {hub_id} is not in the local cache and could not be downloaded "
                       f"({type(error).__name__}); {namesake}check the name and the network, give a folder that holds its "
                       f"{' and '.join(FILES[::2])}, or work offline with --model tiny, which needs none") from error


def load_classifier(model):
    """A full-precision `Classifier` from a name, a hub id or a folder, in transformers' format or in timm's.

    Raises BadInput if it is not found, not a ViT, DeiT or Swin classifier, or damaged.
    """
    folder = model_folder(model)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"model {model}: no readable config.json in it; give the folder of a checkpoint") from error
    if not (folder / "model.safetensors").is_file():
        raise BadInput(f"model {model}: no model.safetensors in it (only safetensors is read, nothing is unpickled)")
    try:
        if "pretrained_cfg" in config:
            network, preprocessing = from_timm(config, load_file(folder / "model.safetensors"))
        else:
            architecture = (config.get("architectures") or [config.get("format") or "no architecture"])[0]
            if architecture not in vitq.FAMILIES:
                raise BadInput(f"model {model}: holds {architecture}; give one of {', '.join(vitq.FAMILIES)}, in full "
                               "precision")
            network, loading = vitq.FAMILIES[architecture].from_pretrained(folder, use_safetensors=True,
                                                                           output_loading_info=True)
            if loading["missing_keys"]:  # transformers would leave them at random values
                raise KeyError(f"without {min(loading['missing_keys'])}")
            preprocessing = Preprocessing.from_transformers(AutoImageProcessor.from_pretrained(folder))
    except BadInput:
        raise
    except (OSError, SafetensorError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(f"model {model}: the checkpoint is damaged or incomplete ({reason}); download it again") from error
    return Classifier(network.float().eval(), preprocessing)


# timm's parameter names, and what the same parameter is called in transformers' ViT and DeiT
TIMM_NAMES = [(r"^blocks\.", "layers."), (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
              (r"^cls_token$", "embeddings.cls_token"), (r"^dist_token$", "embeddings.distillation_token"),
              (r"^pos_embed$", "embeddings.position_embeddings"), (r"^norm\.", "layernorm."),
              (r"\.norm1\.", ".layernorm_before."), (r"\.norm2\.", ".layernorm_after."),
              (r"\.attn\.proj\.", ".attention.o_proj."), (r"\.attn\.", ".attention.")]


def from_timm(config, tensors):
    """A transformers ViT (or distilled DeiT) and its preprocessing from timm's `config.json` and named tensors.

    timm's plain DeiT is its ViT with other weights. Raises BadInput for other architectures, Swin among them.
    """
    architecture, pretrained = config["architecture"], config["pretrained_cfg"]
    if not re.fullmatch(r"(vit|deit)_(tiny|small|base)(_distilled)?_patch\d+_\d+", architecture):
        raise BadInput(f"{architecture}: in timm's format only ViT and DeiT (tiny, small, base) are read; "
                       "for Swin take transformers' format, for example --model swin_t")
    distilled = "dist_token" in tensors
    hidden = tensors["cls_token"].shape[-1]
    layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    num_classes = config["num_classes"]
    names = pretrained.get("label_names") or (
        ResNet18_Weights.DEFAULT.meta["categories"] if num_classes == 1000 else map(str, range(num_classes)))
    network_config = (DeiTConfig if distilled else ViTConfig)(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,  # 64 in every size of timm's
        intermediate_size=len(tensors["blocks.0.mlp.fc1.weight"]), layer_norm_eps=1e-6,
        image_size=pretrained["input_size"][-1], patch_size=tensors["patch_embed.proj.weight"].shape[-1],
        id2label=dict(enumerate(names)))
    network = (DeiTForImageClassificationWithTeacher if distilled else ViTForImageClassification)(network_config)

    heads = {"head.": "cls_classifier.", "head_dist.": "distillation_classifier."} if distilled else \
        {"head.": "classifier."}
    renamed = {}
    for name, tensor in tensors.items():
        head = next((head for head in heads if name.startswith(head)), None)
        if head:
            renamed[heads[head] + name.removeprefix(head)] = tensor
            continue
        for pattern, replacement in TIMM_NAMES:
            name = re.sub(pattern, replacement, name)
        name = f"{network.base_model_prefix}.{name}"
        if ".qkv." in name:  # timm keeps the three projections as one matrix, (3 * hidden, hidden)
            for part, chunk in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3)):
                renamed[name.replace("qkv", part)] = chunk
        else:
            renamed[name] = tensor
    network.load_state_dict(renamed)
    return network, Preprocessing.from_timm(pretrained)


# -------------------- Images

def list_images(folder):
    """All image files below a folder, sorted, but for generate.py's overviews, grid.png.

    Raises BadInput if there is no such folder or no image in it.
    """
    if not Path(folder).is_dir():
        raise BadInput(f"{folder}: no such folder of images")
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMG_EXTENSIONS
                   and path.name != "grid.png")
    if not paths:
        raise BadInput(f"{folder}: no images in it (looked for {' '.join(IMG_EXTENSIONS)}, in subfolders too)")
    return paths


def classes_named(name, names):
    """The indices of the classes that a name or a number means: "21", "0021_kite", "Kite", "great_white_shark"."""
    number = re.match(r"(\d+)(_|$)", name)
    if number:
        return [int(number[1])] if int(number[1]) < len(names) else []
    plain = " ".join(name.replace("_", " ").casefold().split())
    # a class may carry several names: "kite, black kite"
    return [index for index, synonyms in enumerate(names)
            if plain in [synonyms.casefold(), *synonyms.casefold().split(", ")]]


def nearest(name, names):
    """The class names most like a name, as the end of a message; empty if none is."""
    synonyms = {synonym.casefold(): synonym for name in names for synonym in name.split(", ")}
    near = difflib.get_close_matches(name.replace("_", " ").casefold(), synonyms, n=3, cutoff=0.4)
    return f", for example {', '.join(synonyms[match] for match in near)}" if near else ""


def find_class(name, names):
    """The index of the class that a user names. Raises BadInput if there is none, or if several have the name."""
    found = classes_named(name, names)
    if not found:
        raise BadInput(f"class {name!r} is none of the model's {len(names)} classes; give an index below {len(names)} or "
                       f"a name{nearest(name, names)}")
    if len(found) > 1:
        raise BadInput(f"class {name!r}: several classes have this name; give the index, {' or '.join(map(str, found))}")
    return found[0]


def labelled_images(folder, names):
    """Images and their labels: (paths, class indices), or (paths, None) if the folder has no subfolders.

    A subfolder is a class, by index, by name, or, if none is either and there are as many as classes, by rank
    (ImageNet's wnid folders). Raises BadInput for a subfolder that matches no class.
    """
    paths = list_images(folder)
    owners = [path.relative_to(folder).parts[0] if path.parent != Path(folder) else None for path in paths]
    if not any(owners):
        return paths, None
    if None in owners:
        raise BadInput(f"{folder}: {paths[owners.index(None)].name} lies beside the class folders; move it into one")
    folders = sorted(set(owners))
    found = {owner: classes_named(owner, names) for owner in folders}
    if len(folders) == len(names) and not any(found.values()):
        found = {owner: [rank] for rank, owner in enumerate(folders)}
    for owner, indices in found.items():
        if not indices:
            raise BadInput(f"class folder {owner!r} in {folder} matches none of the {len(names)} classes; name it by "
                           f"index or by class name{nearest(owner, names)}")
        if len(indices) > 1:
            raise BadInput(f"class folder {owner!r} in {folder}: several classes have this name; begin the folder's name "
                           "with the index, " + " or ".join(f"{index}_{owner}" for index in indices))
    return paths, [found[owner][0] for owner in owners]


def decode(paths, transform, description, chunk=256):
    """Decode images on all cores; yields (their positions in `paths`, uint8 (n, 3, H, W)), up to `chunk` at a time.

    What cannot be decoded is skipped and named on stderr; raises BadInput if nothing is left. Without a description
    there is no progress bar.
    """
    def load(path):
        try:
            with Image.open(path) as image:
                return transform(image.convert("RGB"))
        except Exception as error:  # Pillow's decoders raise nearly every kind there is
            broken.append(f"{path} ({type(error).__name__})")
            return None

    broken = []
    # threads suffice: Pillow decodes and resizes outside the interpreter's lock
    with ThreadPoolExecutor() as pool, tqdm(total=len(paths), desc=description, unit="image",
                                            disable=None if description else True) as bar:
        for start in range(0, len(paths), chunk):
            images = list(pool.map(load, paths[start:start + chunk]))
            good = [start + i for i, image in enumerate(images) if image is not None]
            if good:
                yield good, torch.stack([images[i - start] for i in good])
            bar.update(len(images))
    if len(broken) == len(paths):
        raise BadInput(f"none of {len(paths)} images could be decoded, the first: {broken[0]}")
    if broken:
        print(f"skipped {len(broken)} of {len(paths)} images that could not be decoded: {', '.join(broken[:5])}"
              + (", ..." if len(broken) > 5 else ""), file=sys.stderr)


# -------------------- Evaluation

FULL_PRECISION = "full precision"  # the name of the reference among the models that `evaluate` compares


@torch.no_grad()
def evaluate(models, preprocessing, paths, labels, device):
    """Run `models` (name -> model) over the same images.

    Returns name -> {"agreement": with the model named FULL_PRECISION, None without one; "top1", "top5": None without
    labels; "images_per_second"}, the first three in percent. Seconds count the network alone, not the decoding.
    """
    top5 = {name: [] for name in models}
    seconds = dict.fromkeys(models, 0.0)
    kept = []
    normalize = preprocessing.normalizer(device)
    for positions, pixels in decode(paths, preprocessing.pixels(), "evaluating"):
        kept += positions
        for batch in pixels.split(64):
            batch = normalize(batch.to(device))
            for name, model in models.items():
                start = time.perf_counter()
                logits = model(batch).logits  # (B, classes)
                top5[name].append(logits.topk(min(5, logits.shape[1])).indices.cpu())  # waits for the device
                seconds[name] += time.perf_counter() - start
    top5 = {name: torch.cat(batches) for name, batches in top5.items()}  # (N, 5)

    def percent(hits):
        return 100 * hits.double().mean().item()

    results = {}
    for name, predicted in top5.items():
        reference = top5.get(FULL_PRECISION)
        hits = None if labels is None else predicted == torch.tensor(labels)[kept][:, None]
        results[name] = {"agreement": None if reference is None else percent(predicted[:, 0] == reference[:, 0]),
                         "top1": None if hits is None else percent(hits[:, 0]),
                         "top5": None if hits is None else percent(hits.any(1)),
                         "images_per_second": len(kept) / seconds[name]}
    return results


def print_table(rows):
    """rows: name -> {column: number or None}, all with the same columns."""
    columns = list(next(iter(rows.values())))
    width = max(len(name) for name in rows)
    print(" " * width + "".join(f"{column:>13}" for column in columns))
    for name, row in rows.items():
        cells = ("-" if row[column] is None else f"{row[column]:.2f}" for column in columns)
        print(f"{name:<{width}}" + "".join(f"{cell:>13}" for cell in cells))


def result_rows(results, megabytes):
    """The rows of `print_table` from what `evaluate` returns and the size of each model."""
    return {name: {"top-1 %": result["top1"], "top-5 %": result["top5"], "agreement %": result["agreement"],
                   "size MB": megabytes[name], "images/s": result["images_per_second"]}
            for name, result in results.items()}


def full_precision_mb(model):
    """The size of a model's parameters in float32, in MB of 10^6 bytes."""
    return sum(parameter.numel() for parameter in model.parameters()) * 4 / 1e6


# -------------------- Command line, shared with generate.py and quantize.py

class Parser(argparse.ArgumentParser):
    """argparse with the docstring as the help text and errors of one line."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--device", help="cuda, cuda:1, cpu, ...; without it a GPU if there is one")

    def error(self, message):
        raise BadInput(f"{message}; see --help")


def torch_device(name):
    """Raises BadInput for a device that is not there."""
    try:
        # torchrun gives each of a machine's processes a number, and with it a GPU
        device = torch.device(name or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device {name!r} is not available here; give --device cpu, or leave it out") from error


def rank_and_processes():
    """This process's number and how many there are: 0 and 1, but under torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def run(main):
    """Run a command; bad input ends it with one line on stderr and exit status 2."""
    try:
        main()
    except BadInput as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def parser():
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, help=f"a name ({' '.join(MODELS)}), a hub id, a folder of either, or "
                        "a folder that quantize.py wrote")
    parser.add_argument("--data", required=True, help="labelled images, one folder a class; or images without labels")
    return parser


def main():
    args = parser().parse_args()
    device = torch_device(args.device)
    models, megabytes = {}, {}
    if vitq.is_quantized(args.model):
        quantized, config = vitq.load_quantized(args.model)
        preprocessing, names = Preprocessing(**config["preprocessing"]), class_names(quantized)
        models[config["bits"]] = quantized
        megabytes[config["bits"]] = (Path(args.model) / "model.safetensors").stat().st_size / 1e6
        paths, labels = labelled_images(args.data, names)
        try:
            reference = load_classifier(config["source"]).model
        except BadInput as error:
            if labels is None:
                raise
            print(f"agreement is left out, since it needs the full-precision model: {error}", file=sys.stderr)
            reference = None
    else:
        classifier = load_classifier(args.model)
        preprocessing, reference = classifier.preprocessing, classifier.model
        paths, labels = labelled_images(args.data, classifier.class_names)
    if reference is not None:
        models = {FULL_PRECISION: reference, **models}
        megabytes[FULL_PRECISION] = full_precision_mb(reference)
    results = evaluate({name: model.to(device) for name, model in models.items()}, preprocessing, paths, labels, device)
    print(f"{args.model} on {len(paths)} images of {args.data}" + ("" if labels else ", which have no labels"))
    print_table(result_rows(results, megabytes))


if __name__ == "__main__":
    run(main)
