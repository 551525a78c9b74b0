"""Accuracy: pictures on disk, class names, the table; and the frame of all command lines.

    python eval.py --model vit_t --data imagenet/val                   # full precision
    python eval.py --model quantized/vit_t-w4a4 --data imagenet/val    # quantized, and its original
    python eval.py --model quantized/vit_t-w4a4 --data photos          # no labels: agreement only

Skip it on a first reading: no equation stands here. Top-1 and top-5 are in percent of the images.
Agreement is the percent of images whose first class is the one that the full-precision model gives:
it needs no labels, and has less noise than the difference of two accuracies.
"""
import argparse
import functools
import logging
import math
import os
import re
import sys
import unicodedata
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from checkpoints import (MODEL_HELP, BadInput, load_classifier, load_result, read_config,
                         reading, require)

CHUNK = 256  # pictures that are decoded together
IMAGE_SUFFIXES = *IMG_EXTENSIONS, ".avif", ".gif", ".jfif", ".jp2"
OUR_FILES = "prompts.safetensors", "grid.png"  # of generate.py, beside its pictures


# -------------------- Images

def list_images(folder):
    """All image files below a folder, sorted. Links are followed, each folder is visited once;
    names that begin with a dot are passed over, and so are other files, which one line on stderr
    counts. Raises BadInput if there are no images, or if a folder may not be read."""
    def refuse(error):  # os.walk would pass over it; a missing one is refused below
        require(isinstance(error, (FileNotFoundError, NotADirectoryError)), error.filename,
                "cannot be read", "give access to it, or leave it out")

    paths, visited = [], set()
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        seen = os.path.realpath(place) in visited
        visited.add(os.path.realpath(place))
        folders[:] = () if seen else [name for name in folders if name[0] != "."]
        ours = OUR_FILES if OUR_FILES[0] in files else ()
        names = () if seen else [name for name in files if name[0] != "." and name not in ours]
        paths += [Path(place, name) for name in names]
    images = sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES)
    require(images, folder, "no folder with images", f"looked for {' '.join(IMAGE_SUFFIXES)}")
    others = Counter(path.suffix for path in paths if path.suffix.lower() not in IMAGE_SUFFIXES)
    if others:
        kinds = ", ".join(f"{n} {kind or 'without a suffix'}" for kind, n in others.most_common(5))
        print(f"{folder}: passed over {others.total()} files: {kinds}", file=sys.stderr)
    return images


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
    with ThreadPoolExecutor() as pool, progress(len(paths), description, leave=False) as bar:
        for start in range(0, len(paths), CHUNK):
            images = enumerate(pool.map(load, paths[start:start + CHUNK]), start)
            good = {position: image for position, image in images if image is not None}
            bar.update(min(CHUNK, len(paths) - start))
            if good:
                yield list(good), torch.stack(list(good.values()))
    some = ", ".join(sorted(broken)[:5]) + ", ..." * (len(broken) > 5)
    require(len(broken) < len(paths), f"none of {len(paths)} images decodes", some, "give others")
    if broken:
        print(f"skipped {len(broken)} of {len(paths)} images: {some}", file=sys.stderr)


# -------------------- Class names

def canonical(name):
    """A class name for comparing: composed Unicode, no capitals, single spaces for underscores."""
    return " ".join(unicodedata.normalize("NFC", name.casefold()).replace("_", " ").split())


@functools.cache
def spellings(names):
    """All that a class may be called, as `canonical` writes it -> the indices of these classes."""
    table = defaultdict(set)
    for index, several in enumerate(names):
        for name in (several, *several.split(",")):
            table[canonical(name)].add(index)
    return table


def classes_named(name, names):
    """The indices of the classes meant by "kite", "Kite", "great_white_shark", "0021_kite" or "21".

    A class may have several names: "kite, black kite". The exact name wins, then any spelling of
    it; a number is an index only where no class has that name.
    """
    exact = [index for index, several in enumerate(names) if name == several]
    number = re.match(r"([0-9]{1,9})(_|$)", name)
    index = [int(number[1])] if number and int(number[1]) < len(names) else []
    return exact or sorted(spellings(tuple(names)).get(canonical(name), index))


def find_classes(given, names, what):
    """What the user calls some classes -> their indices. Raises BadInput if a name means none of
    them, or several. One line on stderr if an index was followed beside another name."""
    found = {}
    for name in given:
        meant = classes_named(name, names)
        require(len(meant) < 2, f"{what} {name!r}", "several classes have this name",
                f"give the index, {' or '.join(map(str, meant))}")
        require(meant, f"{what} {name!r}", f"is none of the model's {len(names)} classes",
                f"give an index below {len(names)} or a name, such as {names[0]}")
        found[name] = meant[0]
    others = [name for name, index in found.items() if name != names[index]
              and index not in classes_named(re.sub("^[0-9]+(_|$)", "", name), names)]
    if others:  # "21"; and "0134_crane", where 134 is "crane bird" and 517 is "crane"
        print(f"{what}: {len(others)} of {len(found)} by index, such as {others[0]!r}, which is "
              f"{names[found[others[0]]]!r}", file=sys.stderr)
    return found


def labelled_images(folder, names):
    """Images and their labels: (paths, class indices), or (paths, None) if none is in a subfolder.

    A subfolder is a class: by name, by index, or, if there is one like ImageNet's n01440764 for
    each class, by rank. Raises BadInput if it holds images and matches no class, or if images lie
    beside the subfolders.
    """
    paths = list_images(folder)
    loose = [path.name for path in paths if path.parent == Path(folder)]
    if len(loose) == len(paths):
        return paths, None
    # or 0021_kite.jpg would count as the class folder of that name
    require(not loose, folder, f"{loose[:1]} beside class folders", "move it into one of them")
    owners = [path.relative_to(folder).parts[0] for path in paths]
    synsets = sorted(path.name for path in Path(folder).glob("n" + 8 * "[0-9]")
                     if not classes_named(path.name, names))
    ranks = {one: rank for rank, one in enumerate(synsets)} if len(synsets) == len(names) else {}
    named = find_classes(sorted({*owners} - {*ranks}), names, f"{folder}: class folder")
    return paths, [(named | ranks)[one] for one in owners]


# -------------------- Accuracy

FULL_PRECISION = "full precision"  # the name of the reference among the models that are compared


def evaluate(models, preprocessing, paths, labels, device):
    """Run `models` (name -> frozen model, its size in MB) over the same images; print the table.

    Returns name -> {"top-1 %", "top-5 %": None without labels; "agreement %" with the model named
    FULL_PRECISION, None without one; "size MB"}.
    """
    normalize, kept, top5 = preprocessing.normalizer(device), [], {name: [] for name in models}
    for positions, pixels in decode(paths, preprocessing.pixels(), f"evaluating on {device}"):
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


# -------------------- The frame of all command lines

class Parser(argparse.ArgumentParser):
    """argparse with the docstring as the help text, each option once, and errors of one line."""

    def __init__(self, doc, device=True):
        super().__init__(description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        if device:
            self.add_argument("--device", help="cuda:1, cpu, ... (default: a GPU, if there is one)")

    def parse_args(self):
        given = Counter(re.sub("=.*", "", argument) for argument in sys.argv[1:])
        twice = [option for option, count in given.items() if option[:2] == "--" and count > 1]
        require(not twice, "command line", f"{twice} more than once", "give it once")
        empty = any(re.fullmatch("(--[a-z-]+=)?", argument) for argument in sys.argv[1:])
        require(not empty, "command line", "an argument is empty", "give it a value")
        return super().parse_args()

    def error(self, message):
        raise BadInput(f"{message}; see --help")


def whole_number(least, most=10 ** 9):
    """For argparse: a function that reads a whole number in this range."""
    def read(text):
        if not re.fullmatch("[0-9]{1,18}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text}: must be a whole number, {least} to {most}")
        return int(text)
    return read


def progress(total, description, **options):
    """A progress bar; where stderr is no terminal, a line per tenth, after a minute."""
    if not sys.stderr.isatty():
        options |= dict(delay=60, mininterval=0, maxinterval=math.inf, leave=False,
                        miniters=max(total // 10, 1),
                        bar_format="{desc}{n_fmt} of {total_fmt} [{elapsed}, {remaining} left]\n")
    return tqdm(total=total, desc=f"{description}: ", **options)


def rank_and_processes():
    """This process's number and how many there are: 0 and 1, but under torchrun."""
    group = torch.distributed
    return (group.get_rank(), group.get_world_size()) if group.is_initialized() else (0, 1)


def start(name):
    """The device of this process, from now on the current one; under torchrun, joins the others.

    Raises BadInput for a device that is not there.
    """
    torchrun, world = torch.distributed.is_torchelastic_launched(), os.environ.get("WORLD_SIZE")
    require(torchrun or world in (None, "", "1"), f"WORLD_SIZE {world}",
            "torchrun did not start this process", "start it with torchrun, or unset WORLD_SIZE")
    with warnings.catch_warnings(record=True) as said, reading(
            f"device {name}", "give --device cpu", "not available here"):
        warnings.simplefilter("always")
        if name in (None, "cuda") and torch.cuda.is_available():
            name = f"cuda:{os.environ['LOCAL_RANK'] if torchrun else 0}"
        probe = torch.zeros(1, device=name or "cpu")
        probe.item()  # "meta" holds no numbers
    if said and name is None:  # there is a GPU, but torch cannot use it
        print(f"on the CPU: {str(said[0].message).splitlines()[0]}", file=sys.stderr)
    if probe.is_cuda:
        torch.cuda.set_device(probe.device)
    if torchrun:  # a day: processes that paint wait for each other at the end
        torch.distributed.init_process_group(
            timeout=timedelta(days=1), device_id=probe.device if probe.is_cuda else None)
    return probe.device


def run(main):
    """Run a command; what a user can cause ends it with one line on stderr and exit status 2."""
    # cuBLAS adds in the same order each time only with a workspace of fixed size; read once
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # what the libraries warn of, or report, is raised here
    logging.disable(logging.ERROR)
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


def original(config):
    """The full-precision model of a quantized one; None, and a line that says why, without one."""
    try:
        classifier = load_classifier(config["source"])
        require(classifier.fingerprint == config["model"], f"model {config['source']}",
                "is not what was quantized", "quantize it again")
        return classifier.model
    except BadInput as error:
        print(f"without agreement, which needs the full-precision model: {error}", file=sys.stderr)


def main():
    args = parser().parse_args()
    device, models = start(args.device), {}
    if read_config(args.model):
        classifier, config = load_result(args.model)
        size = Path(args.model, "model.safetensors").stat().st_size / 1e6
        models[config["bits"]] = classifier.model, size
    else:
        classifier = load_classifier(args.model)
    paths, labels = labelled_images(args.data, classifier.class_names)
    reference = original(config) if models else classifier.model
    if reference is not None:
        models = {FULL_PRECISION: (reference, reference.num_parameters() * 4 / 1e6), **models}
    evaluate(models, classifier.preprocessing, paths, labels, device)


if __name__ == "__main__":
    run(main)
