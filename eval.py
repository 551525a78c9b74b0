"""Everything around the idea: checkpoints, image folders, accuracy, CUDA graphs, command lines.

    python eval.py --model vit_t --data imagenet/val                   # full precision
    python eval.py --model quantized/vit_t-w4a4 --data imagenet/val    # quantized, and its original
    python eval.py --model quantized/vit_t-w4a4 --data photos          # no labels: agreement only

Skip it on a first reading: no equation stands here but phi of Eq. (16), the features of a picture,
in `Classifier.features`. Top-1 and top-5 are in percent of the images.
Agreement is the percent of images whose first class is the one that the full-precision model gives:
it needs no labels, and has less noise than the difference of two accuracies.
"""
import argparse
import functools
import json
import logging
import os
import re
import sys
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import transformers
from huggingface_hub import snapshot_download
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.models import ResNet18_Weights
from torchvision.transforms.v2 import InterpolationMode, Resize, functional as VF
from tqdm import tqdm

import vitq
from vitq import BadInput, reading, require

MODELS = {"tiny": str(Path(__file__).parent / "tiny" / "vit")}
for size in ("tiny", "small", "base"):
    MODELS[f"deit_{size[0]}"] = f"facebook/deit-{size}-patch16-224"
    # the full tag matters: under another one, the same ViT has other weights and normalization
    MODELS[f"vit_{size[0]}"] = f"timm/vit_{size}_patch16_224.augreg_in21k_ft_in1k"
    MODELS[f"swin_{size[0]}"] = f"microsoft/swin-{size}-patch4-window7-224"
MODEL_HELP = f"{', '.join(MODELS)}, a hub id (owner/name), or a folder"
CHUNK = 256  # pictures that are decoded together
IMAGE_SUFFIXES = *IMG_EXTENSIONS, ".avif", ".gif", ".jfif", ".jp2"

transformers.logging.disable_progress_bar()
warnings.filterwarnings("ignore", module="PIL|torch|diffusers")  # what matters is refused
logging.disable(logging.ERROR)  # what the libraries warn of, or report, is raised here


# -------------------- Preprocessing: always the checkpoint's own

@dataclass(eq=False)
class Preprocessing:
    """From a photograph to the network's input, as the checkpoint's own files describe it.

    With another checkpoint's mean and std a ViT loses much of its accuracy, and nothing says so;
    hence there is no default.
    """
    resize: int | list   # the short side in pixels, or [height, width], whatever the aspect ratio
    crop: int            # side of the centre crop, which is the side of the network's input
    interpolation: str   # "bicubic", ...
    mean: list           # of red, green, blue in [0, 1]
    std: list
    rounds: bool = True  # see `center_crop`

    def __post_init__(self):
        sides, colours = [self.crop, *np.ravel(self.resize)], np.array([self.mean, self.std])
        if colours.shape != (2, 3) or not np.isfinite(colours).all() or colours[1].min() <= 0 \
                or not 0 < min(sides) <= max(sides) <= 10_000:
            raise ValueError(self)

    def pixels(self, margin=0):
        """A transform from a PIL image to uint8 (3, crop + margin, crop + margin).

        Without a margin it is the checkpoint's; with one, nothing is cropped off the short side.
        """
        square, crop = isinstance(self.resize, list), self.crop + margin
        resize = Resize([crop] * (1 + square) if margin else self.resize,
                        InterpolationMode(self.interpolation))
        return lambda image: VF.pil_to_tensor(self.center_crop(resize(image), [crop, crop]))

    def center_crop(self, image, size):
        """Of half a pixel: torchvision and timm round the corner to even, transformers down."""
        if not self.rounds:
            sides = (side - max(side - crop, 0) % 2 for side, crop in zip(VF.get_size(image), size))
            image = VF.crop(image, 0, 0, *sides)
        return VF.center_crop(image, size)

    # This and the normalizer are cached: a copy to the GPU would make every step wait.
    @functools.cache
    def resizing(self, side, resized, device):
        """The matrix (crop, side) that resizes a row of pixels, antialiased, and crops it."""
        row = Image.fromarray(torch.eye(side).numpy())
        row = row.resize((side, resized), Image.Resampling[self.interpolation.upper()])
        return self.center_crop(VF.to_image(row), [self.crop, side])[0].to(device)

    def of_pictures(self, images):
        """As `pixels` and `normalizer`, but differentiable, for float (B, 3, H, W) in [0, 1].

        Resizing is linear, rows and columns apart: two matrix products. Their gradient is the same
        each time; that of torch's own kernel is not, on a GPU.
        """
        sides = images.shape[-2:]
        resized = self.resize if isinstance(self.resize, list) else [
            self.resize * side // min(sides) for side in sides]
        rows, columns = (self.resizing(*pair, images.device) for pair in zip(sides, resized))
        return self.normalizer(images.device)(255 * (rows @ images @ columns.T))

    @functools.cache
    def normalizer(self, device):
        """A function from pixels (B, 3, H, W) in [0, 255] to the network's float32 input."""
        mean, std = (torch.tensor(of, device=device).view(3, 1, 1) for of in (self.mean, self.std))
        return lambda pixels: (pixels / 255 - mean) / std


def timm_preprocessing(what, config):
    """From the `pretrained_cfg` of a timm checkpoint."""
    for field in ("input_size", "crop_pct", "interpolation", "mean", "std"):
        require(field in config, what, f"no {field} in pretrained_cfg", "add it to config.json")
    (channels, height, width), mode = config["input_size"], config.get("crop_mode") or "center"
    require(channels == 3 and height == width, what, f"input_size {config['input_size']}")
    require(mode in ("center", "squash"), what, f"crop_mode {mode}")
    resize, mean, std = int(height / config["crop_pct"]), config["mean"], config["std"]
    return Preprocessing([resize, resize] if mode == "squash" else resize, height,
                         InterpolationMode(config["interpolation"]).value, mean, std)


def transformers_preprocessing(what, processor):
    """From a transformers image processor."""
    name, size = type(processor).__name__, processor.size
    require(re.fullmatch("(ViT|DeiT|CLIP)ImageProcessor(Fast|Pil)?", name), what, name)
    require(processor.do_resize and processor.do_rescale, what, "do_resize or do_rescale false")
    require(processor.rescale_factor, what, f"rescale_factor {processor.rescale_factor}")
    require(processor.resample in range(4), what, f"resample {processor.resample}")
    require(not size.longest_edge, what, f"size with longest_edge {size.longest_edge}")
    crop = processor.crop_size if processor.do_center_crop else size
    require(crop.height and crop.height == crop.width, what, f"input {crop.height} x {crop.width}")
    # (255 f pixels / 255 - mean) / std, with f the rescale_factor
    pair = (processor.image_mean, processor.image_std) if processor.do_normalize else (0, 1)
    mean, std = ((np.ones(3) * value / (255 * processor.rescale_factor)).tolist() for value in pair)
    return Preprocessing(size.shortest_edge or [size.height, size.width], crop.height,
                         Image.Resampling(processor.resample).name.lower(), mean, std, rounds=False)


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

    @property
    def fingerprint(self):
        """A checksum of all that decides what the model computes and what its classes are called.

        Of the configuration, that is only what the parameters' names and shapes do not tell.
        """
        config = self.model.config.to_dict()
        told = [config.get(field) for field in (
            "hidden_act", "layer_norm_eps", "num_attention_heads", "num_heads", "window_size",
            "image_size", "id2label")]
        text = json.dumps([told, vars(self.preprocessing)])
        return vitq.checksum(text, dict(self.model.named_parameters()))[:16]

    def features(self, images):
        """f and phi of Eq. (14) and (16): logits (B, classes), features (B, blocks x channels).

        images: float (B, 3, H, W) in [0, 1], of any size, on the model's device. phi: the mean
        token of every block's output, each of unit length, so that the cosine of two phi is the
        mean of the blocks' cosines. The head's own input would not do: a good classifier's is
        nearly the same for all pictures of a class, while the layers below still tell them apart.
        """
        with vitq.block_outputs(self.model) as h:
            logits = self.model(self.preprocessing.of_pictures(images)).logits
        return logits, torch.cat([torch.nn.functional.normalize(output.mean(1)) for output in h], 1)


def model_folder(model):
    """The local folder of a checkpoint: `model` is a name in MODELS, a folder, or a hub id.

    Raises BadInput if it is none of them, or cannot be downloaded.
    """
    hub_id, there = MODELS.get(model, model), Path(model).resolve()
    if model in MODELS and there.is_dir() and not Path(hub_id).is_relative_to(there):
        print(f"model {model}: {hub_id}; the folder of that name is ./{model}", file=sys.stderr)
    if Path(hub_id).is_dir():
        return Path(hub_id)
    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub's client raises its own, its HTTP library's, the system's
        raise BadInput(f"model {model!r}: {hub_id} is not a folder and could not be had from the "
                       f"hub ({type(error).__name__}); give {MODEL_HELP}") from error


def load_classifier(model, device="cpu"):
    """A full-precision `Classifier` from a name, a hub id or a folder, in transformers' or timm's
    format, on the device, with no gradients to its parameters. Raises BadInput if it is not found,
    not a ViT, DeiT or Swin classifier, or damaged."""
    folder, what = model_folder(model), f"model {model}"
    with reading(what, "give the whole folder of a checkpoint, with its safetensors"):
        config = json.loads((folder / "config.json").read_text())
        whole, tensors = folder / "model.safetensors", {}
        index = {"weight_map": {"all": whole.name}} if whole.is_file() else json.loads(
            (folder / "model.safetensors.index.json").read_text())  # several files, if it is any
        for file in sorted(set(index["weight_map"].values())):
            tensors.update(load_file(folder / file))
        for name, tensor in tensors.items():
            require(tensor.isfinite().all(), what, f"{name} is not finite", "train it again")
        read = from_timm if "pretrained_cfg" in config else from_transformers
        family, config, renaming, preprocessing = read(what, config, tensors, folder)
        if len(sides := set(np.ravel(config.image_size).tolist())) == 1:
            config.image_size = sides.pop()  # of [224, 224], too
        with torch.device("meta"):  # no memory is taken yet: a wrong size may ask for any amount
            needed = family(config).num_parameters()
        held = sum(tensor.numel() for tensor in tensors.values())
        require(needed < 2 * held, what, f"config.json describes {needed:,} parameters, the "
                f"weights are {held:,}", "give the config.json of these weights")
        network, loading = family.from_pretrained(
            None, config=config, state_dict=tensors, key_mapping=renaming, output_loading_info=True,
            ignore_mismatched_sizes=True, dtype=torch.float32, attn_implementation="sdpa")
        wrong = ", ".join(f"{kind}: {min(keys)}" for kind, keys in loading.items() if keys)
        require(not wrong, what, wrong, "give another checkpoint")
        names, side = config.id2label, config.image_size
        require(all(isinstance(names.get(i), str) and names[i] for i in range(len(names) or 1)),
                what, f"id2label names the classes {str(names)[:60]}", "give 0, 1, .. a name each")
        require(side == preprocessing.crop, what, f"image_size is {side}, the processor's pictures "
                f"have {preprocessing.crop} pixels", "make them equal")
        network.requires_grad_(False)
        # whatever else does not fit together is seen now
        logits = network(preprocessing.of_pictures(torch.zeros(1, 3, side, side))).logits
        require(logits.isfinite().all(), what, "its logits are not finite", "train it again")
    return Classifier(network.to(device), preprocessing)


def from_transformers(what, config, tensors, folder):
    """The network's class, its configuration, what to replace in the names of its tensors (pattern
    -> text), and its preprocessing, of a checkpoint in transformers' format."""
    architecture = (config.get("architectures") or [config.get("format", "no architecture")])[0]
    require(architecture in vitq.FAMILIES, what, f"holds {architecture}",
            f"give one of {', '.join(vitq.FAMILIES)}, in full precision")
    for field in ("quantization_config", "auto_map"):
        require(field not in config, what, field)
    layers = max(config.get("num_hidden_layers", 0), sum(config.get("depths", [])))
    require(0 < layers <= len(tensors), what, f"{layers} layers for {len(tensors)} tensors")
    family = vitq.FAMILIES[architecture]
    require([*folder.glob("*processor_config.json")], what, "no preprocessor_config.json", "add it")
    processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    config = family.config_class.from_dict(config)
    return family, config, {}, transformers_preprocessing(what, processor)


# timm's parameter names, and what the same parameter is called in transformers' ViT and DeiT
TIMM_NAMES = {
    r"^blocks\.": "layers.", r"\.norm1\.": ".layernorm_before.", r"\.norm2\.": ".layernorm_after.",
    r"\.attn\.proj\.": ".attention.o_proj.", r"\.attn\.": ".attention.", r"^norm\.": "layernorm.",
    r"^cls_token": "embeddings.cls_token", r"^dist_token": "embeddings.distillation_token",
    r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"^pos_embed": "embeddings.position_embeddings", r"^head_dist\.": "distillation_classifier."}
# what timm may be told of a ViT: followed, told by the tensors too, or of no effect after training
TIMM_ARGUMENTS = {"img_size", "num_heads", "num_classes", "qkv_bias", "depth", "patch_size",
                  "mlp_ratio", "weight_init", "drop_rate", "pos_drop_rate", "patch_drop_rate",
                  "proj_drop_rate", "attn_drop_rate", "drop_path_rate"}
TIMM_PLAIN = {"global_pool": "token", "fc_norm": False, "class_token": True, "in_chans": 3}


def from_timm(what, config, tensors, folder):
    """As `from_transformers`, of a ViT or a distilled DeiT in timm's format.

    Prefixes are cut off and the projections to q, k and v split in `tensors` itself. timm's plain
    DeiT is its ViT with other weights. Raises BadInput for other architectures.
    """
    architecture, pretrained = config.get("architecture", ""), config["pretrained_cfg"]
    arguments = config.get("model_args") or {}
    require(re.fullmatch(r"(vit|deit)_(tiny|small|base)(_distilled)?_patch\d+_\d+", architecture),
            what, architecture, "give a tiny, small or base ViT or DeiT; for Swin, --model swin_t")
    for field, value in [*config.items(), *arguments.items()]:
        require(value in (TIMM_PLAIN.get(field, value), None), what, f"{field} {value}")
    unknown = ", ".join(sorted(arguments.keys() - TIMM_PLAIN.keys() - TIMM_ARGUMENTS))
    require(not unknown, what, f"{unknown} in model_args")
    classes = {**pretrained, **config}["num_classes"]
    names = config.get("label_names") or pretrained.get("label_names") or (
        ResNet18_Weights.DEFAULT.meta["categories"] if classes == 1000 else [])
    names = names if isinstance(names, dict) else dict(enumerate(names))
    require(len(names) in (0, classes), what, f"{len(names)} label_names for {classes} classes")
    preprocessing = timm_preprocessing(what, pretrained)
    for name in list(tensors):
        bare = re.sub(r"^((module|_orig_mod|timm_model|model)\.)*", "", name)
        require(bare == name or bare not in tensors, what, f"holds both {bare} and {name}")
        tensors[bare] = tensors.pop(name)
    family, head = (transformers.DeiTForImageClassificationWithTeacher, "cls_classifier.") \
        if "dist_token" in tensors else (transformers.ViTForImageClassification, "classifier.")
    hidden = tensors["cls_token"].shape[-1]
    config = family.config_class(
        # 64 channels per head in each of timm's sizes; without names, LABEL_0, LABEL_1, ...
        hidden_size=hidden, num_attention_heads=arguments.get("num_heads", hidden // 64),
        num_hidden_layers=sum(name.endswith(".norm1.weight") for name in tensors),
        intermediate_size=len(tensors["blocks.0.mlp.fc1.weight"]), layer_norm_eps=1e-6,
        patch_size=tensors["patch_embed.proj.weight"].shape[-1],
        image_size=arguments.get("img_size", preprocessing.crop),
        qkv_bias="blocks.0.attn.qkv.bias" in tensors, num_labels=classes, id2label=names or None)
    # timm has the three projections in one matrix, (3 * hidden, hidden)
    for name in [name for name in tensors if ".qkv." in name]:
        for part, chunk in zip("qkv", tensors.pop(name).chunk(3)):
            tensors[name.replace("qkv", f"{part}_proj")] = chunk
    return family, config, {**TIMM_NAMES, r"^head\.": head}, preprocessing


# -------------------- Images

def list_images(folder):
    """All image files below a folder, sorted. Links are followed; names that begin with a dot are
    passed over, and generate.py's overviews, grid.png. Raises BadInput if there are none."""
    def walk(folder, above=()):
        # a link that leads back ends here
        for path in folder.iterdir() if folder.is_dir() and folder.resolve() not in above else ():
            if path.is_dir() and path.name[0] != ".":
                yield from walk(path, (*above, folder.resolve()))
            elif path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != ".":
                yield path

    paths = sorted(path for path in walk(Path(folder)) if path.name != "grid.png")
    require(paths, folder, "no folder with images", f"looked for {' '.join(IMAGE_SUFFIXES)}")
    return paths


def canonical(name):
    """A class name for comparing: composed Unicode, no capitals, single spaces for underscores."""
    return " ".join(unicodedata.normalize("NFC", name.casefold()).replace("_", " ").split())


def classes_named(name, names):
    """The indices of the classes meant by "kite", "Kite", "great_white_shark", "0021_kite" or "21".

    A class may have several names: "kite, black kite". The exact name wins, then any spelling of
    it; a number is an index only where no class has that name.
    """
    exact = [index for index, several in enumerate(names) if name == several]
    found = exact or [index for index, several in enumerate(names)
                      if canonical(name) in map(canonical, [several, *several.split(",")])]
    number = re.match(r"([0-9]{1,9})(_|$)", name)
    return found or ([int(number[1])] if number and int(number[1]) < len(names) else [])


def find_class(name, names, what="class"):
    """The index of the class that a name means. Raises BadInput if there is none, or several."""
    found = classes_named(name, names)
    require(len(found) < 2, f"{what} {name!r}", "several classes have this name",
            f"give the index, {' or '.join(map(str, found))}")
    require(found, f"{what} {name!r}", f"is none of the model's {len(names)} classes",
            f"give an index below {len(names)} or a name, such as {names[0]}")
    rest = re.sub("^[0-9]+_", "", name)
    said, meant = (set(re.findall(r"[^\W_]+", canonical(text))) for text in (rest, names[found[0]]))
    if not said <= meant:  # as "0134_crane" does, where 134 is "crane bird"
        require({*classes_named(rest, names)} <= {*found}, f"{what} {name!r}",
                f"class {found[0]} is {names[found[0]]}", "give the index or the name alone")
        print(f"{what} {name!r} is taken for index {found[0]}: {names[found[0]]}", file=sys.stderr)
    return found[0]


def labelled_images(folder, names):
    """Images and their labels: (paths, class indices), or (paths, None) if none is in a subfolder.

    A subfolder is a class: by name, by index, or, if there is one like ImageNet's n01440764 for
    each class, by rank. Raises BadInput if it holds images and matches no class, if it is called
    like a class and holds none, and for two of one class.
    """
    paths = list_images(folder)
    owners = [path.relative_to(folder).parts[0] for path in paths]
    loose = [path.name for path in paths if path.parent == Path(folder)]
    if len(loose) == len(paths):
        return paths, None
    require(not loose, folder, f"{loose[:3]} beside the class folders", "move them into one")
    folders = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
    named = [one for one in folders if classes_named(one, names)]
    empty = [one for one in named if one not in owners]
    require(not empty, folder, f"no images in {empty[:3]}", "remove these folders")
    synsets = [one for one in folders if re.fullmatch("n[0-9]{8}", one) and one not in named]
    index = {one: synsets.index(one) if len(synsets) == len(names) and one in synsets
             else find_class(one, names, f"{folder}: class folder") for one in sorted({*owners})}
    twice = [one for one in index if [*index.values()].count(index[one]) > 1]
    require(not twice, folder, f"{twice[:3]} mean one class", "name all by index or all by name")
    return paths, [index[one] for one in owners]


def rgb(path):
    """The first frame of an image file in 8-bit RGB, turned as its camera was; or an exception."""
    with Image.open(path) as image:
        # resizing would make a strip enormous; I and F do not say which number is white
        if max(image.size) > 100 * min(image.size) or image.mode in ("I", "F"):
            raise ValueError(f"{image.size[0]} x {image.size[1]} pixels of mode {image.mode}")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        return image.convert("RGB")


def decode(paths, transform, description):
    """Decode images on all cores; yields (their positions in `paths`, uint8 (n, 3, H, W)).

    What cannot be decoded is skipped and named on stderr; raises BadInput if nothing is left.
    """
    def load(path):
        try:
            return transform(rgb(path))
        except Exception as error:  # Pillow's decoders raise nearly every kind there is
            broken.append(f"{str(path)!r} ({type(error).__name__})")

    broken = []
    # threads suffice: Pillow decodes and resizes outside the interpreter's lock
    with ThreadPoolExecutor() as pool:
        for start in tqdm(range(0, len(paths), CHUNK), description, disable=None, leave=False):
            images = enumerate(pool.map(load, paths[start:start + CHUNK]), start)
            good = {position: image for position, image in images if image is not None}
            if good:
                yield list(good), torch.stack(list(good.values()))
    some = ", ".join(sorted(broken)[:5]) + ", ..." * (len(broken) > 5)
    require(len(broken) < len(paths), f"none of {len(paths)} images decodes", some, "give others")
    if broken:
        print(f"skipped {len(broken)} of {len(paths)} images: {some}", file=sys.stderr)


# -------------------- Accuracy

FULL_PRECISION = "full precision"  # the name of the reference among the models that are compared


def evaluate(models, preprocessing, paths, labels, device):
    """Run `models` (name -> frozen model, its size in MB) over the same images; print the table.

    Returns name -> {"top-1 %", "top-5 %": None without labels; "agreement %" with the model named
    FULL_PRECISION, None without one; "size MB"}.
    """
    normalize, kept, top5 = preprocessing.normalizer(device), [], {name: [] for name in models}
    for positions, pixels in decode(paths, preprocessing.pixels(), "evaluating"):
        kept += positions
        for batch in pixels.split(32):
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
    print(f"on {len(kept)} images".ljust(16) + "".join(f"{column:>13}" for column in row))
    for name, row in results.items():
        cells = ("-" if value is None else f"{value:.2f}" for value in row.values())
        print(f"{name:16}" + "".join(f"{cell:>13}" for cell in cells))
    return results


# -------------------- Steps that run without a gap

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
            if self.calls == 4:  # the first ones allocate memory and choose kernels
                with torch.cuda.graph(graph := torch.cuda.CUDAGraph(), stream=self.stream):
                    self.step()
                self.step = graph.replay
            self.step()
        torch.cuda.current_stream().wait_stream(self.stream)


@functools.cache
def can_compile(device):
    """Whether torch.compile works here, which needs a compiler of C++. If not, says so, once."""
    if device.type == "cpu":
        # Few kernels: workers would take longer to import torch than to compile. Of the vector
        # instructions, the processor's own list is believed: trying all of them takes long, too.
        torch._inductor.config.compile_threads, torch._inductor.config.cpp.vec_isa_ok = 1, True
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
        return True
    except Exception as error:
        print(f"steps are slow, since not compiled ({type(error).__name__})", file=sys.stderr)
        return False


def compiled(function, device, steps):
    """`function`, compiled for `steps` calls, which fuses its small kernels; or as it is."""
    # shorter runs do not earn back the time that compiling takes
    if steps < 100 or not can_compile(device):
        return function
    torch._dynamo.config.recompile_limit = 64  # of one function, for other shapes; torch has 8
    # combo_kernels: independent kernels, such as those of the weights, are launched as one;
    # force_shape_pad: matrices with rows of 197 numbers are padded to a multiple of 8
    options = dict.fromkeys(["combo_kernels", "force_shape_pad"], device.type == "cuda")
    return torch.compile(function, dynamic=False, options=options)


@contextmanager
def patched(name, values):
    """A context in which the attribute `name` of some objects (object -> value) has other values
    than that of their class."""
    with ExitStack() as undo:
        for owner, value in values.items():
            setattr(owner, name, value)
            undo.callback(delattr, owner, name)
        yield


# -------------------- The frame of all command lines

class Parser(argparse.ArgumentParser):
    """argparse with the docstring as the help text and errors of one line."""

    def __init__(self, doc, device=True):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        empty = any(re.fullmatch("(--[a-z-]+=)?", argument) for argument in sys.argv[1:])
        require(not empty, "command line", "an argument is empty", "give it a value")
        if device:
            self.add_argument("--device", help="cuda:1, cpu, ... (default: a GPU, if there is one)")

    def error(self, message):
        raise BadInput(f"{message}; see --help")


def whole_number(least):
    """For argparse: a function that reads a whole number from `least` on."""
    def read(text):
        if not re.fullmatch("[0-9]{1,18}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: must be a whole number, {least} or more")
        return int(text)
    return read


def rank_and_processes():
    """This process's number and how many there are: 0 and 1, but under torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start(name):
    """The device of this process, from now on the current one; under torchrun, joins the others.

    Raises BadInput for a device that is not there.
    """
    try:
        if name in (None, "cuda") and torch.cuda.is_available():
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun gives each process a number
        probe = torch.zeros(1, device=name or "cpu")
        probe.item()  # "meta" holds no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        raise BadInput(f"device {name!r} is not available here; give --device cpu") from error
    if probe.is_cuda:
        torch.cuda.set_device(probe.device)
    if rank_and_processes()[1] > 1 and not torch.distributed.is_initialized():
        # a day: processes that paint wait for each other at the end
        torch.distributed.init_process_group(timeout=timedelta(days=1))
    return probe.device


def run(main):
    """Run a command; what a user can cause ends it with one line on stderr and exit status 2."""
    try:
        main()
    except (BadInput, OSError, MemoryError, RuntimeError, KeyboardInterrupt) as error:
        if isinstance(error, RuntimeError) and not re.search("memory|Symlink loop", str(error)):
            raise
        message = (str(error) or type(error).__name__).splitlines()[0]
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        sys.exit(2)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def parser():
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, help=f"{MODEL_HELP}, also one of quantize.py's")
    parser.add_argument("--data", required=True, help="images, or folders of images, one per class")
    return parser


def source_of(model):
    """How to find a model again from any folder: a known name, a hub id or an absolute path."""
    return str(Path(model).resolve()) if model not in MODELS and Path(model).is_dir() else model


def load_result(folder):
    """A quantized `Classifier`, and its configuration, from a folder of quantize.py."""
    model, config = vitq.load_quantized(folder)
    with reading(folder, "quantize it again, with quantize.py"):
        return Classifier(model, Preprocessing(**config["preprocessing"])), config


def original(config, needed):
    """The full-precision model of a quantized one; None if it is not there, unless it is needed."""
    try:
        source = str(config.get("source"))
        classifier = load_classifier(source)
        require(classifier.fingerprint == config.get("model"), f"model {source}",
                "is not what was quantized", "quantize it again")
        return classifier.model
    except BadInput as error:
        if needed:
            raise
        print(f"without agreement, which needs the full-precision model: {error}", file=sys.stderr)


def main():
    args = parser().parse_args()
    device, models = start(args.device), {}
    if vitq.read_config(args.model):
        classifier, config = load_result(args.model)
        size = Path(args.model, "model.safetensors").stat().st_size / 1e6
        models[config["bits"]] = classifier.model, size
    else:
        classifier = load_classifier(args.model)
    paths, labels = labelled_images(args.data, classifier.class_names)
    reference = original(config, labels is None) if models else classifier.model
    if reference is not None:
        models = {FULL_PRECISION: (reference, reference.num_parameters() * 4 / 1e6), **models}
    evaluate(models, classifier.preprocessing, paths, labels, device)


if __name__ == "__main__":
    run(main)
