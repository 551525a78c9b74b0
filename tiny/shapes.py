"""Small pictures of 12 classes, drawn here, with captions: what `tiny/` trains on in the place of ImageNet.

    python tiny/shapes.py shapes/val --per-class 100 --seed 1    # 1200 pictures: shapes/val/0000_kite/00000.png, ...

A picture has 32x32 RGB pixels: one filled shape with a thin dark outline (a kite, a star, ...) before a soft gradient
with the colours of a day's or a night's sky, of snow, grass, sand or dusk. What a caption can tell is the class and
five attributes: colour, texture, background, size and pose. What no caption tells are eight nuisances, numbers in
[0, 1] that shift, turn, scale and tint the picture a little. A picture is a function of these three and of nothing
else, and continuous in the nuisances up to the grid it is drawn on, so that a small generator can learn it.
"""
import argparse
import colorsys
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

SIDE = 32        # of a picture, in pixels
SUPERSAMPLE = 4  # a silhouette is drawn this many times larger, then averaged: soft edges, which move smoothly
RADIUS = 9.3     # pixels to the unit of the shapes' coordinates: a large shape, shifted, still fits nearly whole
TEST_PER_CLASS, TEST_SEED = 200, 0  # of the pictures that only report; tiny/train.py and calibration use other seeds
NUISANCES = 8    # shift right, shift up, turn, size, brightness, hue of the shape, phase of its texture, background


# -------------------- Shapes: polygons (n, 2) in unit coordinates, y upwards

def rotation(degrees):
    """The matrix that turns column vectors counterclockwise, (2, 2)."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([(cos, -sin), (sin, cos)])


def disc(x, y, width, height=None, degrees=0):
    """An ellipse about (x, y) with these half-axes; without a height, a circle."""
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    return np.stack([width * np.cos(angle), (height or width) * np.sin(angle)], 1) @ rotation(degrees).T + (x, y)


def box(left, bottom, right, top):
    return np.array([(left, bottom), (right, bottom), (right, top), (left, top)])


def star():
    angle = np.pi / 2 + np.pi / 5 * np.arange(10)
    radius = np.where(np.arange(10) % 2, 0.5, 1.1)
    return np.stack([0.85 * radius * np.cos(angle), 1.1 * radius * np.sin(angle)], 1)


def heart():
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, y + 2.5], 1) / 16


def tail():
    """The waving tail of a kite: a band around one period of a sine."""
    t = np.linspace(0, 1, 12)
    middle = np.stack([0.24 * np.sin(2 * np.pi * t), -0.35 - 0.75 * t], 1)
    return np.concatenate([middle - (0.09, 0), (middle + (0.09, 0))[::-1]])


# Each class: what is filled, then what is cut out of it. In every class the four poses can be told apart, hence the
# stone on the ring, the long foot of the cross, and a star taller than wide (a regular one repeats every 72 degrees).
SHAPES = {
    "kite": ([np.array([(0, 1.1), (0.7, 0.5), (0, -0.45), (-0.7, 0.5)]), tail()], []),
    "star": ([star()], []),
    "heart": ([heart()], []),
    "moon": ([disc(0, 0, 1)], [disc(0.5, 0.15, 0.82)]),
    "house": ([box(-0.72, -0.95, 0.72, 0.25), np.array([(-1.05, 0.15), (1.05, 0.15), (0, 1.05)]),
               box(0.42, 0.4, 0.7, 0.95)], [box(-0.2, -1, 0.2, -0.3)]),
    "fish": ([disc(-0.25, 0, 0.8, 0.52), np.array([(0.3, 0), (1.1, 0.6), (0.9, 0), (1.1, -0.6)]),
              np.array([(-0.45, 0.4), (0.25, 0.85), (0.2, 0.35)])], [disc(-0.65, 0.12, 0.12)]),
    "boat": ([np.array([(-1.1, -0.4), (1.1, -0.4), (0.7, -0.95), (-0.7, -0.95)]), box(-0.08, -0.5, 0.08, 1.1),
              np.array([(0, 1.1), (1, -0.12), (0, -0.12)]), np.array([(-0.3, 0.7), (-0.9, -0.12), (-0.3, -0.12)])], []),
    "tree": ([np.array([(-0.5, 0.4), (0.5, 0.4), (0, 1.15)]), np.array([(-0.7, -0.15), (0.7, -0.15), (0, 0.75)]),
              np.array([(-0.9, -0.7), (0.9, -0.7), (0, 0.3)]), box(-0.17, -1.1, 0.17, -0.6)], []),
    "flower": ([disc(*(0.42 * rotation(72 * petal)[:, 1] + (0, 0.45)), 0.27) for petal in range(5)]
               + [disc(0, 0.45, 0.35), box(-0.08, -1.15, 0.08, 0.2), disc(0.33, -0.72, 0.38, 0.14, 40),
                  disc(-0.33, -0.72, 0.38, 0.14, -40)], [disc(0, 0.45, 0.16)]),
    "arrow": ([box(-1.1, -0.24, 0.2, 0.24), np.array([(0.1, 0.8), (1.1, 0), (0.1, -0.8)])], []),
    "ring": ([disc(0, -0.3, 0.8), np.array([(-0.3, 1.1), (0.3, 1.1), (0.55, 0.8), (0, 0.25), (-0.55, 0.8)])],
             [disc(0, -0.3, 0.5)]),
    "cross": ([box(-0.23, -1.1, 0.23, 1.05), box(-0.8, 0.15, 0.8, 0.6)], []),
}
CLASSES = list(SHAPES)


# -------------------- Attributes and captions

# group -> adjective -> its value; the first adjective of a group is the commonest in speech, so captions leave it out
ATTRIBUTES = {
    # hue, saturation and value, in [0, 1]
    "colour": {"red": (0.0, 0.9, 0.9), "orange": (0.075, 1.0, 1.0), "yellow": (0.15, 0.95, 1.0),
               "green": (0.36, 0.9, 0.7), "blue": (0.6, 0.9, 0.95), "purple": (0.76, 0.7, 0.75),
               "pink": (0.92, 0.4, 1.0), "brown": (0.06, 0.75, 0.5)},
    # period in pixels, and the share of the pale second tone at x and y in radians, before it is clipped to [0, 1];
    # the stripes are diagonal, as the shaft of a small arrow is no wider than one stripe
    "texture": {"plain": None, "striped": (5, lambda x, y: 0.5 + 1.5 * np.sin(0.7 * (x + y))),
                "dotted": (5, lambda x, y: 1.3 * (np.sin(x) + np.sin(y)) - 0.9),
                "checkered": (7, lambda x, y: 0.5 + 2 * np.sin(x) * np.sin(y))},
    # 8-bit RGB at the top and at the bottom
    "background": {"day": ((90, 170, 240), (215, 238, 252)), "night": ((6, 8, 34), (38, 44, 96)),
                   "snowy": ((206, 212, 222), (252, 252, 254)), "grassy": ((150, 200, 90), (46, 112, 40)),
                   "sandy": ((244, 226, 178), (206, 168, 104)), "dusky": ((84, 56, 120), (244, 150, 96))},
    "size": {"medium": 1.0, "small": 0.75, "large": 1.35},
    "pose": {"upright": 0, "tilted": 30, "slanted": -30, "flipped": 180},  # degrees, counterclockwise
}


def random_attributes(random):
    """group -> adjective, each group uniform over its adjectives; `random` is a numpy Generator."""
    return {group: list(values)[random.integers(len(values))] for group, values in ATTRIBUTES.items()}


def caption(label, attributes, random):
    """A caption such as "a night photo of striped small kite", or "a photo of kite" if all attributes are defaults.

    Each other adjective stands before "photo" or before the class, in any order: a picture has many captions. The class
    has no article, so that a caption can end in any adjective and a class; nor does "a" become "an".
    """
    adjectives = [attributes[group] for group, values in ATTRIBUTES.items() if attributes[group] != next(iter(values))]
    before_photo, before_class = [], []
    for adjective in random.permutation(adjectives):
        (before_photo if random.random() < 0.5 else before_class).append(adjective)
    return " ".join(["a", *before_photo, "photo", "of", *before_class, CLASSES[label]])


def words():
    """All words that captions can contain, sorted; the default adjectives are not among them."""
    adjectives = [adjective for values in ATTRIBUTES.values() for adjective in list(values)[1:]]
    return sorted(["a", "photo", "of", *CLASSES, *adjectives])


# -------------------- Drawing

PALE, DARK = np.array([(250, 250, 240), (16, 16, 22)], dtype=np.float32)  # the second tone of textures; the outline
CENTRES = np.arange(SIDE, dtype=np.float32) - (SIDE - 1) / 2
X, Y = np.meshgrid(CENTRES, -CENTRES)  # (SIDE, SIDE): pixels to the right of and above the middle of the picture
# the slow noise of all backgrounds: its waves in radians, (4, SIDE, SIDE), and how far each of them travels, in radians
WAVES = np.stack([0.31 * X + 0.12 * Y, -0.17 * X + 0.36 * Y, 0.44 * X - 0.27 * Y, 0.23 * X + 0.55 * Y])
TRAVEL = np.array([2.1, -3.3, 2.7, -1.6], dtype=np.float32)[:, None, None]


def silhouette(label, transform, shift):
    """The shape as a grey image of SIDE x SIDE, 255 within; its point p lies at `transform @ p + shift` pixels."""
    canvas = Image.new("L", (SIDE * SUPERSAMPLE, SIDE * SUPERSAMPLE))
    pen = ImageDraw.Draw(canvas)
    for polygons, fill in zip(SHAPES[CLASSES[label]], (255, 0)):
        for polygon in polygons:
            points = (polygon @ transform.T + shift) * (1, -1) + SIDE / 2  # image rows run downwards
            pen.polygon((points * SUPERSAMPLE).ravel().tolist(), fill=fill)
    return canvas.reduce(SUPERSAMPLE)


def scenery(top, bottom, nuisance):
    """A gradient from one 8-bit colour to another, with slow noise, (SIDE, SIDE, 3); `nuisance` in [-1, 1] moves it."""
    direction = rotation(40 * nuisance).astype(np.float32)[:, 1]
    depth = 0.5 - (direction[0] * X + direction[1] * Y) / SIDE  # (SIDE, SIDE), about 0 at the top, 1 at the bottom
    depth += 0.05 * np.sin(WAVES + TRAVEL * np.float32(nuisance)).sum(0)
    top, bottom = np.array([top, bottom], dtype=np.float32)
    return top + (bottom - top) * depth[..., None]


def draw(label, attributes, nuisances):
    """The picture of a class, a PIL image of 32x32 RGB; the same arguments give the same pixels.

    label: index into CLASSES; attributes: group -> adjective, of every group; nuisances: NUISANCES numbers in [0, 1],
    of which 0.5 changes nothing.
    """
    chosen = {group: values[attributes[group]] for group, values in ATTRIBUTES.items()}
    right, up, turn, growth, light, tint, phase, scene = 2 * np.asarray(nuisances, dtype=np.float64) - 1  # in [-1, 1]

    turned, shift = rotation(chosen["pose"] + 10 * turn), 3 * np.array([right, up])
    shape = silhouette(label, RADIUS * chosen["size"] * (1 + 0.1 * growth) * turned, shift)
    outline = shape.filter(ImageFilter.MaxFilter(3))  # one pixel wider all round
    shape, outline = (np.asarray(mask, dtype=np.float32)[..., None] / 255 for mask in (shape, outline))

    hue, saturation, value = chosen["colour"]
    colour = 255 * np.array(colorsys.hsv_to_rgb(hue + 0.015 * tint, saturation, value), dtype=np.float32)
    if chosen["texture"]:  # painted on the shape: it moves and turns with it
        period, share = chosen["texture"]
        x, y = (2 * np.pi / period * (axis[0] * (X - shift[0]) + axis[1] * (Y - shift[1])) + np.pi * phase
                for axis in turned.T)  # (SIDE, SIDE), radians in the frame of the shape
        colour = colour + (PALE - colour) * np.clip(share(x, y), 0, 1)[..., None]

    picture = scenery(*chosen["background"], scene)
    picture += (DARK - picture) * 0.8 * outline  # without it a green tree would be lost in the grass
    picture += (colour - picture) * shape
    picture *= 0.92 + 0.1 * light
    return Image.fromarray(np.clip(picture + 0.5, 0, 255).astype(np.uint8))


# -------------------- Folders of pictures

def write_folder(out, per_class, seed):
    """Write `per_class` pictures of each class to OUT/0000_kite/00000.png, ..., as ImageFolder and eval.py read them.

    A picture depends on the seed, its class and its number alone, so a larger folder begins with the smaller one's.
    Raises ValueError if `out` is there and not an empty folder, if `per_class` < 1, or if `seed` < 0.
    """
    out = Path(out).resolve()
    if per_class < 1:
        raise ValueError(f"{per_class} pictures per class: give at least 1")
    if seed < 0:
        raise ValueError(f"seed {seed}: give 0 or more")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists already and is not an empty folder; remove it, or write to another one")
    out.parent.mkdir(parents=True, exist_ok=True)
    # written aside and renamed when complete: part of a folder would pass for a small one
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as aside:
        with tqdm(total=len(CLASSES) * per_class, desc="drawing", unit="picture", disable=None) as bar:
            for label, name in enumerate(CLASSES):
                folder = Path(aside) / "complete" / f"{label:04d}_{name}"
                folder.mkdir(parents=True)
                for index in range(per_class):
                    random = np.random.default_rng([seed, label, index])
                    picture = draw(label, random_attributes(random), random.random(NUISANCES))
                    picture.save(folder / f"{index:05d}.png")
                    bar.update()
        (Path(aside) / "complete").rename(out)


def test_folder():
    """tiny/test, the labelled pictures on which `--model tiny` is evaluated; drawn now if it is not there yet."""
    folder = Path(__file__).parent / "test"
    if not folder.exists():
        try:
            write_folder(folder, per_class=TEST_PER_CLASS, seed=TEST_SEED)
        except OSError:
            if not folder.exists():  # else another process has drawn them meanwhile
                raise
    return str(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the folder to write; if it is there, it must be empty")
    parser.add_argument("--per-class", type=int, default=100, help="pictures of each of the 12 classes")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other pictures")
    args = parser.parse_args()
    try:
        write_folder(args.out, args.per_class, args.seed)
    except (ValueError, OSError) as error:  # OSError: where nothing can be written
        print(f"shapes.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
