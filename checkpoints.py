"""What comes in and what goes out: pretrained networks in the hub's formats, packed results.

From top to bottom: how bad input is refused, how photographs become a network's input, pretrained
networks in transformers' and timm's formats, and the file of a quantized network. Skip it on a
first reading: no equation stands here.
"""
import functools
import hashlib
import json
import os
import re
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torchvision.models import ResNet18_Weights
from torchvision.transforms.v2 import InterpolationMode, Resize, functional as VF

import vitq

MODELS = {"tiny": str(Path(__file__).parent / "tiny" / "vit")}
for size in ("tiny", "small", "base"):
    # the full tags matter: under another one, the same network has other weights and normalization
    MODELS[f"deit_{size[0]}"] = f"timm/deit_{size}_patch16_224.fb_in1k"
    MODELS[f"vit_{size[0]}"] = f"timm/vit_{size}_patch16_224.augreg_in21k_ft_in1k"
    MODELS[f"swin_{size[0]}"] = f"microsoft/swin-{size}-patch4-window7-224"
MODEL_HELP = f"{', '.join(MODELS)}, a hub id (owner/name), or a folder"
FORMAT_VERSION = 6  # of the packed result


# -------------------- Bad input

class BadInput(ValueError):
    """Something the user gave cannot be used; the message is one line: its name and the remedy."""


def require(condition, what, fault, remedy="give a checkpoint without that"):
    """Raise BadInput, one line that names the fault and the remedy, unless the condition holds."""
    if not condition:
        raise BadInput(f"{what}: {fault}; {remedy}")


@contextmanager
def reading(what, remedy, fault="damaged or incomplete"):
    """Turns any error of the block within it into a BadInput with its name and the remedy."""
    try:
        yield
    except (BadInput, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of the libraries that read, nearly every kind there is
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise BadInput(f"{what}: {fault} ({reason}); {remedy}") from error


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

    def pixels(self, margin=0):
        """A transform from a PIL image to uint8 (3, crop + margin, crop + margin).

        Without a margin it is the checkpoint's; with one, nothing is cropped off the short side.
        """
        square, crop = isinstance(self.resize, list), self.crop + margin
        resize = Resize([crop] * (1 + square) if margin else self.resize,
                        InterpolationMode(self.interpolation))
        return lambda image: VF.pil_to_tensor(self.center_crop(resize(image), [crop, crop]))

    def center_crop(self, image, size):
        """The centre. A corner at half a pixel goes to the even one (torchvision, timm) or down."""
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
    (channels, height, width), mode = config["input_size"], config.get("crop_mode") or "center"
    require(channels == 3 and height == width, what, f"input_size {config['input_size']}")
    require(mode in ("center", "squash"), what, f"crop_mode {mode}")
    resize, mean, std = int(height / config["crop_pct"]), config["mean"], config["std"]
    return Preprocessing([resize, resize] if mode == "squash" else resize, height,
                         InterpolationMode(config["interpolation"]).value, mean, std)


def transformers_preprocessing(what, folder, model_type):
    """From the file of an image processor of transformers, or of its older feature extractors."""
    require([*folder.glob("*processor_config.json")], what, "no preprocessor_config.json", "add it")
    fields, _ = transformers.BaseImageProcessor.get_image_processor_dict(folder)
    name = fields.get("image_processor_type") or fields.get("feature_extractor_type") or (
        "DeiTImageProcessor" if model_type == "deit" else "ViTImageProcessor")
    known = re.fullmatch("(ViT|DeiT|CLIP)(ImageProcessor|FeatureExtractor)(Fast|Pil)?", name)
    require(known, what, f"its pictures are prepared by {name}", "give a ViT's, DeiT's or CLIP's")
    processor = getattr(transformers, f"{known[1]}ImageProcessor").from_dict(fields)
    size = processor.size
    require(processor.do_resize and processor.do_rescale, what, "do_resize or do_rescale false")
    require(not size.longest_edge, what, f"size with longest_edge {size.longest_edge}")
    crop = processor.crop_size if processor.do_center_crop else size
    require(crop.height and crop.height == crop.width, what, f"input {crop.height} x {crop.width}")
    # (255 f pixels / 255 - mean) / std, with f the rescale_factor
    pair = (processor.image_mean, processor.image_std) if processor.do_normalize else (0, 1)
    mean, std = ((np.ones(3) * value / (255 * processor.rescale_factor)).tolist() for value in pair)
    interpolation = InterpolationMode(Image.Resampling(processor.resample).name.lower()).value
    return Preprocessing(size.shortest_edge or [size.height, size.width], crop.height,
                         interpolation, mean, std, rounds=False)


# -------------------- Pretrained networks

@dataclass
class Classifier:
    """A model in eval mode, with what its checkpoint says of its input and classes."""
    model: torch.nn.Module
    preprocessing: Preprocessing

    def __post_init__(self):
        side, crop = self.model.config.image_size, self.preprocessing.crop
        if side != crop:
            raise ValueError(f"image_size is {side}, the processor's pictures have {crop} pixels")

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
        return checksum(text, dict(self.model.named_parameters()))[:16]


def model_folder(model):
    """The local folder of a checkpoint: `model` is a name in MODELS, a folder, or a hub id.

    Raises BadInput if it is none of them, or cannot be downloaded.
    """
    hub_id, there = MODELS.get(model, model), Path(model).resolve()
    if model in MODELS and there.is_dir() and not Path(hub_id).is_relative_to(there):
        print(f"model {model}: {hub_id}; the folder of that name is ./{model}", file=sys.stderr)
    if Path(hub_id).is_dir():
        return Path(hub_id)
    with reading(f"model {model!r}", f"see to the connection, or give {MODEL_HELP}",
                 f"{hub_id} is not a folder and could not be had from the hub"):
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors"]))


def read_tensors(what, folder):
    """The tensors of a checkpoint, of one file or of those that its index lists."""
    adapters = [path.name for path in folder.glob("*") if re.search("adapter|lora", path.name)]
    require(not adapters, what, f"{adapters} hold changes to the weights beside them",
            "merge them (peft: merge_and_unload) and save the whole model")
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    require(whole.is_file() or index.is_file(), what, f"no {whole.name} in {folder}",
            "make it with transformers' from_pretrained(...).save_pretrained(...)")
    files = {whole.name} if whole.is_file() else {
        *json.loads(index.read_text())["weight_map"].values()}
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def load_classifier(model, device="cpu"):
    """A full-precision `Classifier` from a name, a hub id or a folder, in transformers' or timm's
    format, on the device, with no gradients to its parameters. Raises BadInput if it is not found,
    not a ViT, DeiT or Swin classifier, or damaged."""
    folder, what = model_folder(model), f"model {model}"
    with reading(what, "give the whole folder of a checkpoint"):
        tensors = read_tensors(what, folder)
        config = json.loads((folder / "config.json").read_text())
        for field in ("quantization_config", "auto_map"):
            require(field not in config, what, field)
        task = config.get("problem_type") or "single_label_classification"
        require(task == "single_label_classification", what, f"problem_type {task}",
                "give a classifier whose classes exclude each other, for a softmax")
        read = from_timm if "pretrained_cfg" in config else from_transformers
        family, config, renaming, preprocessing = read(what, config, tensors, folder)
        if len(sides := set(np.ravel(config.image_size).tolist())) == 1:
            config.image_size = sides.pop()  # of [224, 224], too
        network, loading = family.from_pretrained(
            None, config=config, state_dict=tensors, key_mapping=renaming, output_loading_info=True,
            ignore_mismatched_sizes=True, dtype=torch.float32, attn_implementation="sdpa")
        wrong = ", ".join(f"{kind}: {min(keys)}" for kind, keys in loading.items() if keys)
        require(not wrong, what, wrong, "give another checkpoint")
        names, count = config.id2label, config.num_labels
        require(count > 1, what, f"{count} classes in id2label", "a softmax needs two or more")
        for i in range(count):  # encode: half a surrogate pair cannot be written
            require(isinstance(names.get(i), str) and names[i].encode(), what,
                    f"id2label calls class {i} {names.get(i)!r}", "give it a name")
        classifier = Classifier(network.requires_grad_(False), preprocessing)
        # whatever else does not fit together is seen now, on a black and a white picture
        pixels = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, *[preprocessing.crop] * 2)
        logits = network(preprocessing.of_pictures(pixels)).logits
        require(logits.isfinite().all(), what, "its logits are not finite", "train it again")
    network.to(device)
    return classifier


def from_transformers(what, config, tensors, folder):
    """The network's class, its configuration, what to replace in the names of its tensors (pattern
    -> text), and its preprocessing, of a checkpoint in transformers' format."""
    architecture = (config.get("architectures") or [config.get("format", "no architecture")])[0]
    require(architecture in vitq.FAMILIES, what, f"holds {architecture}",
            f"give one of {', '.join(vitq.FAMILIES)}, in full precision")
    family = vitq.FAMILIES[architecture]
    preprocessing = transformers_preprocessing(what, folder, config.get("model_type"))
    return family, family.config_class.from_dict(config), {}, preprocessing


# timm's parameter names, and what the same parameter is called in transformers' ViT and DeiT
TIMM_NAMES = {
    r"^blocks\.": "layers.", r"\.norm1\.": ".layernorm_before.", r"\.norm2\.": ".layernorm_after.",
    r"\.attn\.proj\.": ".attention.o_proj.", r"\.attn\.": ".attention.", r"^norm\.": "layernorm.",
    r"^cls_token": "embeddings.cls_token", r"^dist_token": "embeddings.distillation_token",
    r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"^pos_embed": "embeddings.position_embeddings", r"^head_dist\.": "distillation_classifier."}
# what timm may be told of a ViT: followed, told by the tensors too, or of no effect after training
TIMM_ARGUMENTS = (r"img_size|num_heads|num_classes|global_pool|qkv_bias|depth|patch_size|mlp_ratio|"
                  r"fc_norm|class_token|in_chans|weight_init|\w+_rate")


def from_timm(what, config, tensors, folder):
    """As `from_transformers`, for a ViT or a distilled DeiT in timm's format.

    Prefixes are cut off and the projections to q, k and v split in `tensors` itself. timm's plain
    DeiT is its ViT with other weights. Raises BadInput for other architectures.
    """
    architecture, pretrained = config.get("architecture", ""), config["pretrained_cfg"]
    arguments = config.get("model_args") or {}
    require(re.fullmatch(r"(vit|deit)_(tiny|small|base)(_distilled)?_patch\d+_\d+", architecture),
            what, architecture, "give a tiny, small or base ViT or DeiT; for Swin, --model swin_t")
    pool = arguments.get("global_pool") or config.get("global_pool") or "token"
    require(pool == "token", what, f"global_pool {pool}")
    unknown = [name for name in arguments if not re.fullmatch(TIMM_ARGUMENTS, name)]
    require(not unknown, what, f"{', '.join(unknown)} in model_args")
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


def source_of(model):
    """How to find a model again from any folder: a known name, a hub id or an absolute path."""
    return str(Path(model).resolve()) if model not in MODELS and Path(model).is_dir() else model


# -------------------- The packed result

POWERS_OF_3 = np.array([1, 3, 9, 27, 81], dtype=np.uint8)


def pack(q, bits):
    """Integers of `vitq.weight_range(bits)`, any shape -> a flat uint8 tensor.

    Ternary: five weights per byte, as the digits of a number in base 3 (3^5 = 243 of 256 values:
    1.6 bits per weight). Otherwise: `bits` bits per weight, least significant first, without gaps;
    the last byte is filled with zeros.
    """
    unsigned = (q.numpy().ravel().astype(np.int16) - vitq.weight_range(bits)[0]).astype(np.uint8)
    if bits == vitq.TERNARY:
        unsigned = np.pad(unsigned, (0, -len(unsigned) % 5)).reshape(-1, 5)
        return torch.from_numpy((unsigned * POWERS_OF_3).sum(1, dtype=np.uint8))
    binary = np.unpackbits(unsigned[:, None], axis=1, count=bits, bitorder="little")  # (N, bits)
    return torch.from_numpy(np.packbits(binary, bitorder="little"))


def unpack(packed, bits, shape):
    """The inverse of `pack`: int8 integers of the given shape. Raises ValueError."""
    count = int(np.prod(shape))
    if bits == vitq.TERNARY:
        unsigned = (packed.numpy()[:, None] // POWERS_OF_3 % 3).ravel()[:count]
    else:
        binary = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little")
        unsigned = np.packbits(binary.reshape(count, bits), axis=1, bitorder="little").ravel()
    q = torch.from_numpy((unsigned.astype(np.int16) + vitq.weight_range(bits)[0]).astype(np.int8))
    if len(q) != count or not torch.equal(pack(q, bits), packed):
        raise ValueError(f"{packed.shape} of {packed.dtype} are not {count} weights of {bits} bits")
    return q.view(*shape)


def write_whole(path, data):
    """Write bytes to a file that appears whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes(data)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def checksum(text, tensors):
    """SHA-256 of a text and of named tensors, in hexadecimal."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode() + str(tensors[name].dtype).encode())
        digest.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_quantized(model, folder, about):
    """Write a folded model to `folder`: model.safetensors, and config.json for people to read.

    `about` is a dictionary stored beside the network's own configuration: the bits and edge_bits of
    `vitq.quantize_modules`, its preprocessing, source and model, as quantize.py has them. Returns
    the size in bytes. Raises BadInput if a number is not finite.
    """
    tensors = {name: tensor.cpu() for name, tensor in model.named_parameters()}
    require(all(tensor.isfinite().all() for tensor in tensors.values()), "result",
            "not all weights or scales are finite", "nothing was written")
    for name, layer in vitq.modules_of(model, vitq.QuantWeight):
        q, _ = layer.quantized_weight()
        tensors[f"{name}.weight"] = pack(q.char().cpu(), layer.weight_bits)
    config = {"format": "vitq", "version": FORMAT_VERSION, **about,
              "architecture": type(model).__name__, "network": model.config.to_dict()}
    config["checksum"] = checksum(json.dumps(config), tensors)
    config = json.dumps(config, indent=1)
    data = save(tensors, {"config": config})  # one file keeps weights and settings together
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "model.safetensors", data)
    for older in ("model.onnx", "metrics.json"):  # of the result that was here before
        (folder / older).unlink(missing_ok=True)
    write_whole(folder / "config.json", config.encode())
    return len(data)


def read_config(folder):
    """The configuration of a model of `save_quantized`, of any version; None for anything else."""
    config = None
    with suppress(OSError, SafetensorError, ValueError, RecursionError):
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            config = json.loads((file.metadata() or {}).get("config", "null"))
    return config if isinstance(config, dict) and config.get("format") == "vitq" else None


def check_output(folder, identity):
    """Raise BadInput if `folder` holds anything but a result of the same model and settings:
    `identity`, some items of its configuration."""
    config, remedy = read_config(folder), "it is left alone, name another folder with --out"
    others = folder.is_dir() and any(path.name[0] != "." for path in folder.iterdir())
    require(config or not others, folder, "is not a quantized model", remedy)
    for name, value in identity.items() if config else ():
        require(config.get(name) == value, folder,
                f"holds a result with {name} {config.get(name)}, not {value}", remedy)


def load_quantized(folder):
    """A model from a folder of `save_quantized`, and its configuration, from that one file alone.

    Raises BadInput for another format version and for a file that is damaged or cut short.
    """
    config, remedy = read_config(folder), "remove it and quantize again"
    require(config, folder, "no quantized model, or a damaged one", "give one, or quantize again")
    require(config.get("version") == FORMAT_VERSION, folder, "of another format version", remedy)
    with reading(folder, remedy):
        tensors = load_file(Path(folder) / "model.safetensors")
        text = json.dumps({name: value for name, value in config.items() if name != "checksum"})
        require(checksum(text, tensors) == config["checksum"], folder, "damaged", remedy)
        network = vitq.FAMILIES[config["architecture"]](
            transformers.AutoConfig.for_model(**config["network"]))
        model = vitq.fold(vitq.quantize_modules(network, config["bits"], config["edge_bits"]))
        for name, layer in vitq.modules_of(model, vitq.QuantWeight):
            q = unpack(tensors[f"{name}.weight"], layer.weight_bits, layer.weight.shape)
            scale = tensors[f"{name}.weight_log_scale"].exp().view(-1, *[1] * (q.dim() - 1))
            tensors[f"{name}.weight"] = scale * q  # on the grid: the forward rounds it to exactly q
        tensors = {name: tensors[name] for name, _ in model.named_parameters()}  # or a KeyError
        model.load_state_dict(tensors, strict=False)  # what q, k and v share is named once
    return model, config


def load_result(folder):
    """A quantized `Classifier`, and its configuration, from a folder of quantize.py."""
    model, config = load_quantized(folder)
    with reading(folder, "quantize it again, with quantize.py"):
        return Classifier(model, Preprocessing(**config["preprocessing"])), config
