"""Quantize a pretrained ViT, DeiT or Swin: all its layers at once follow the full-precision model.

    python quantize.py --model deit_s --bits w158a8                          # on generated/deit_s
    python quantize.py --model vit_t --bits w4a4 --images photos --data imagenet/val
    python quantize.py --model vit_t --bits w4a4 --images photos --method rtn    # round to nearest
    python quantize.py --model vit_t --bits w4a4 --images photos --method block  # block by block
    torchrun --nproc_per_node=2 quantize.py --model deit_s --bits w4a4 --images photos

The images need no labels. The result is the folder quantized/<model>-<bits> (of the baselines:
-<bits>-<method>), which `eval.py --model` takes. This file is Eq. (9)-(11): the two losses and the
one loop. The modules of Eq. (1)-(8) are in vitq.py.
"""
import copy
import json
import math
import re
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

import generate
import vitq
from eval import (FULL_PRECISION, MODEL_HELP, Parser, RecordedStep, compiled, decode, evaluate,
                  labelled_images, list_images, load_classifier, patched, rank_and_processes, run,
                  source_of, start, whole_number)
from tiny import shapes
from vitq import BadInput, require

INITIALIZATION_IMAGES = 32  # [paper]
STEPS, BATCH = 12_000, 64  # [paper] has 24,000 steps of 32: as many pictures
TINY_STEPS, TINY_BATCH = 400, 24  # for --model tiny, whose pictures are learned sooner
PICTURES = 960  # painted where no images are given: at least this many, and at least one per prompt
FEATURE_WEIGHT, LOGIT_WEIGHT = 100.0, 1.0  # a_f, a_z of Eq. (11), from held-out pictures [ours]
# Adam moves a parameter by about its learning rate per step, whatever its gradient. Most of the
# gradient of a weight is noise, so it walks at random, learning rate x sqrt(steps) far. A ViT's
# weights are some 0.05 large; on a much longer walk they lose what pretraining gave them.
WEIGHT_WALK = 7.5e-3
SHORT = 600  # steps; shorter runs keep the rate of 600: a higher one does more harm than good
OTHER_LR = 2e-3  # of biases, LayerNorms, zero points (in levels), scales and r (as logarithms)
WARMUP = 0.02  # of the steps: at first Adam does not know how large the gradients are
FADE = 0.5  # of the steps: a ViT whose weights turn ternary at once starts at chance
MARGIN = 1 / 7  # by which calibration images exceed the network's input: 32 of 224 pixels
SMALLEST_CROP, ASPECT = 0.6, 4 / 3  # random crops: least sqrt(area), greatest aspect ratio
READ_EVERY = 10  # steps between two looks at the loss: each look makes the GPU wait


# -------------------- The losses: Eq. (9)-(11)

def count_class_tokens(model):
    """How many tokens, the first, stand for the whole image: ViT 1, distilled DeiT 2, Swin none."""
    return sum(name.endswith(("cls_token", "distillation_token")) for name in model.state_dict())


def feature_loss(features, quantized_features, class_tokens):
    """Eq. (9): L_feat = 1/L sum_l weighted mean over tokens of ||h_l - h^_l||^2 / ||h_l||^2.

    Two lists of h_l, (B, T, channels) each. Distilling intermediate features is [paper]; the
    normalization and the mean are [ours]. The normalization is per token because a few tokens of a
    ViT have massive activations: with one norm for all tokens, the others would hardly be trained.
    In the mean, the class tokens count as much as all patches together: only they reach the head.
    """
    def mean_over_tokens(error):  # (B, T)
        if class_tokens == 0:
            return error.mean()
        return 0.5 * error[:, :class_tokens].mean() + 0.5 * error[:, class_tokens:].mean()

    return torch.stack([mean_over_tokens((h - h_q).square().sum(-1) / h.square().sum(-1))
                        for h, h_q in zip(features, quantized_features)]).mean()


def logit_loss(logits, quantized_logits):
    """Eq. (10): L_logit = KL(p || p^), the mean over the batch; (B, classes) each. [paper]"""
    return F.kl_div(quantized_logits.log_softmax(-1), logits.log_softmax(-1), reduction="batchmean",
                    log_target=True)


def joint_loss(features, quantized_features, logits, quantized_logits, class_tokens):
    """Eq. (11): min over Theta of E_x [a_f L_feat + a_z L_logit]; this is the bracket. [ours]

    Theta = {s, z, g, r, dW, biases, LayerNorms} of all layers at once, see `trained_parameters`.
    """
    return (FEATURE_WEIGHT * feature_loss(features, quantized_features, class_tokens)
            + LOGIT_WEIGHT * logit_loss(logits, quantized_logits))


# -------------------- What is trained

def trained_parameters(model):
    """Theta of Eq. (11), name -> parameter: all but class tokens, position embeddings, Swin's
    position bias tables, and the scale and zero point of the image.

    Trained, this scale would shrink until black and white clip: see `vitq.CLIPPING_GRID`.
    """
    return {name: parameter for name, parameter in model.named_parameters()
            if not re.search(r"position|token|projection\.input_quantizer", name)}


def stages(model, method, steps):
    """What is trained together, by which loss and in how many steps: a list of
    (name -> parameter, loss function, steps).

    "joint" is one stage: all, by Eq. (11). "block", as in BRECQ (Li 2021), is a stage per block:
    its parameters, by its term of Eq. (9), while the blocks before it, already quantized, stay as
    they are. The layers before a block (the patch embedding, Swin's patch merging) are trained with
    it, those after the last block never. "rtn" is "joint" in no steps at all: round to nearest,
    with the scales and r of Eq. (6) and (7).
    """
    parameters = trained_parameters(model)
    if method != "block":
        return [(parameters, joint_loss, steps)]
    block_of = {id(parameter): l for l, block in enumerate(vitq.blocks(model))
                for parameter in block.parameters()}
    groups, l = [{} for _ in vitq.blocks(model)], None
    # backwards: a layer outside the blocks joins the block that runs after it
    for name, parameter in reversed(parameters.items()):
        l = block_of.get(id(parameter), l)
        if l is not None:
            groups[l][name] = parameter

    def loss_of(l):
        return lambda h, h_q, logits, logits_q, tokens: feature_loss([h[l]], [h_q[l]], tokens)

    return [(group, loss_of(l), steps * (l + 1) // len(groups) - steps * l // len(groups))
            for l, group in enumerate(groups)]


def optimizer_of(parameters, steps, device):
    """Adam over `parameters` (name -> parameter), which from now on require gradients, and its
    warm-up and cosine decay."""
    every = [parameter.requires_grad_(True) for parameter in parameters.values()]
    steps, weight_lr = max(steps, 1), WEIGHT_WALK / math.sqrt(max(steps, SHORT))
    # The learning rates are tensors, so that a step recorded on a GPU reads their present values.
    optimizer = torch.optim.Adam([
        {"params": [p for p in every if p.dim() > 1], "lr": torch.tensor(weight_lr, device=device)},
        {"params": [p for p in every if p.dim() < 2], "lr": torch.tensor(OTHER_LR, device=device)}],
        fused=True, capturable=device.type == "cuda")
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(
        1, (done + 1) / (WARMUP * steps)) * (0.5 + 0.5 * math.cos(math.pi * done / steps)))


def fading(student, t):
    """A context in which the ternary weights that are trained are W + t (W^ - W). [ours]"""
    return patched("fade", {layer: t for _, layer in vitq.modules_of(student, vitq.QuantWeight)
                            if layer.weight_bits == vitq.TERNARY and layer.weight.requires_grad})


# -------------------- The loop

def random_views(images, size, u):
    """Random crops, stretched to the network's input and mirrored at random. [ours]

    images: uint8 (B, 3, S, S); u: uniform in [0, 1), (5, B). Returns float (B, 3, size, size) in
    [0, 255]. Millions of weights soon memorize a few thousand pictures, but not their random views;
    and what the teacher says of half a dog is as good a target as any other (Beyer 2022).
    """
    side, stretch = SMALLEST_CROP + (1 - SMALLEST_CROP) * u[0], ASPECT ** (u[1] - 0.5)
    width, height = (side * stretch).clamp_max(1), (side / stretch).clamp_max(1)  # of the picture's
    x, y = (1 - width) * (2 * u[2] - 1), (1 - height) * (2 * u[3] - 1)  # centres, in [-1, 1]
    mirrored, zero = torch.where(u[4] < 0.5, -width, width), torch.zeros_like(x)
    matrix = torch.stack([mirrored, zero, x, zero, height, y], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, (len(images), 3, size, size), align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)


def mean_over_processes(tensors):
    """Replace each of the tensors by its mean over the processes of torchrun, in one message."""
    if torch.distributed.is_initialized():
        everything = parameters_to_vector(tensors)
        torch.distributed.all_reduce(everything)
        vector_to_parameters(everything / torch.distributed.get_world_size(), tensors)


def train(student, teacher, method, images, probabilities, preprocessing, steps, batch, progress):
    """Train `student` to follow `teacher`, without labels; both frozen, on the device of `images`.

    images: uint8 (N, 3, S, S); probabilities: of drawing each of them, (N,). steps: in all, of
    `batch` images in each process. Returns the loss of the first, every tenth and the last step.
    Raises BadInput if one of them is not finite.
    """
    device, losses, taken, (rank, processes) = images.device, [], 0, rank_and_processes()
    mine = slice(rank * batch, (rank + 1) * batch)  # all processes draw the same numbers
    class_tokens = count_class_tokens(student)
    modules = [*vitq.blocks(student), *vitq.blocks(teacher),
               *(conv for _, conv in vitq.modules_of(student, vitq.QuantConv2d))]
    with patched("forward", {m: compiled(m.forward, device, steps) for m in modules}), \
            vitq.block_outputs(teacher) as h, vitq.block_outputs(student) as h_q:
        for parameters, loss_function, stage_steps in stages(student, method, steps):
            loss_function = compiled(loss_function, device, stage_steps)
            optimizer, schedule = optimizer_of(parameters, stage_steps, device)
            latest, t = torch.zeros(2, device=device)

            def step():
                index = torch.multinomial(probabilities, batch * processes, replacement=True)[mine]
                u = torch.rand(5, batch * processes, device=device)[:, mine]
                x = random_views(images[index], preprocessing.crop, u)
                # in channels_last, convolutions are faster
                x = preprocessing.normalizer(device)(x).to(memory_format=torch.channels_last)
                # on a GPU, operands are bfloat16, in which integers up to 256 are exact
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    logits, logits_q = teacher(x).logits, student(x).logits
                loss = loss_function(h, h_q, logits.float(), logits_q.float(), class_tokens)
                optimizer.zero_grad()
                loss.backward()
                loss = loss.detach()
                mean_over_processes([loss, *(p.grad for p in parameters.values())])
                latest.copy_(loss)
                optimizer.step()

            step = RecordedStep(step, device)
            with fading(student, t):
                for done in range(1, stage_steps + 1):
                    t.fill_(min(1, done / (FADE * stage_steps)))
                    step()
                    schedule.step()
                    taken += 1
                    progress.update()
                    if taken % READ_EVERY == 0 or taken in (1, steps):
                        losses.append(latest.item())
                        progress.set_postfix(loss=f"{losses[-1]:.4f}")
                        require(math.isfinite(losses[-1]), f"step {taken} of {steps}",
                                "the loss is not finite", "try other images or more bits")
            student.requires_grad_(False)
    return losses


# -------------------- Command line

def parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help=MODEL_HELP)
    add("--bits", required=True, help="wXaY: per weight (158: ternary, or 2..8) and per activation")
    add("--images", nargs="+", metavar="DIR", help="unlabelled images, in any tree; each folder is "
        "drawn as often as another (default: generated/<model>, painted first if missing)")
    add("--data", metavar="DIR", help="images for the last table: a folder per class, or no labels")
    add("--method", choices=["joint", "block", "rtn"], default="joint", help="default: %(default)s")
    add("--edge-bits", choices=["8", "same"], default="8", help="of patch embedding and head")
    add("--steps", type=whole_number(1), help=f"default: {STEPS}; tiny {TINY_STEPS}")
    add("--batch", type=whole_number(1), help=f"per process (default: {BATCH}; tiny {TINY_BATCH})")
    add("--seed", type=whole_number(0), default=0, help="default: %(default)s")
    add("--out", metavar="DIR", help="default: quantized/<model>-<bits>, for a baseline -<method>")
    return parser


def parse():
    """The command line, with the defaults that depend on --model and --method."""
    args = parser().parse_args()
    vitq.parse_bits(args.bits)
    require(args.method != "rtn" or not (args.steps or args.batch), "--method rtn",
            "it trains nothing", "leave out --steps and --batch")
    steps, batch = (TINY_STEPS, TINY_BATCH) if args.model == "tiny" else (STEPS, BATCH)
    args.steps = 0 if args.method == "rtn" else args.steps or steps
    args.batch = args.batch or batch
    args.edge_bits = args.edge_bits if args.edge_bits == "same" else int(args.edge_bits)
    suffix = "" if args.method == "joint" else f"-{args.method}"
    args.out = Path(args.out or f"quantized/{Path(args.model).resolve().name}-{args.bits}{suffix}")
    return args


def paint_missing(model, classifier, device):
    """The folder generated/<model>, with learned prompts, after painting what it lacks."""
    folder, generator = generate.default_folder(model), generate.default_generator(model)
    settings, names = generate.settings_of(classifier, generator), classifier.class_names
    own = {generate.class_folder(folder, label, names) for label in range(len(names))}
    others = [path.name for path in folder.glob("[!.]*") if path.is_dir() and path not in own]
    require(not others, folder, f"{others[:3]} are no classes of the model", "move them away")
    per_mode = math.ceil(PICTURES / (len(names) * settings["modes"]))
    generate.fill(folder, classifier, range(len(names)), device, per_mode, settings, generator)
    return str(folder)


def read_images(folders, preprocessing, device):
    """The images of some folders, uint8 (N, 3, S, S), with a margin for crops, and how likely each
    of them is to be drawn, (N,).

    Each folder is drawn as often as another, so that a thousand sharp photographs of what the
    network is for are not lost among twenty thousand others.
    """
    transform = preprocessing.pixels(2 * round(MARGIN * preprocessing.crop / 2))
    # all folders are listed, which may raise BadInput, before any image is decoded
    images = [torch.cat([pixels for _, pixels in decode(paths, transform, "reading")])
              for paths in [list_images(folder) for folder in folders]]
    probabilities = [torch.full((len(some),), 1 / (len(some) * len(images))) for some in images]
    return torch.cat(images).to(device), torch.cat(probabilities).to(device)


def save_anywhere(student, out, identity, about):
    """Save to `out`, or, since training took long, to a temporary folder. Returns the bytes."""
    try:
        vitq.check_output(out, identity)  # again: others may have written there since
        return vitq.save_quantized(student, out, {**identity, **about})
    except (OSError, BadInput) as error:
        with suppress(OSError):
            out.rmdir()
        aside = Path(tempfile.gettempdir(), f"vitq-{time.time_ns()}", out.name)
        vitq.save_quantized(student, aside, {**identity, **about})
        raise BadInput(f"{error}; what was trained is in {aside}") from error


def main():
    args = parse()
    device, (rank, processes) = start(args.device), rank_and_processes()
    classifier = load_classifier(args.model, device)
    identity = {"model": classifier.fingerprint, "bits": args.bits,
                "edge_bits": args.edge_bits, "method": args.method}
    vitq.check_output(args.out, identity)
    if args.model == "tiny" and not args.data and rank == 0:
        args.data = shapes.test_folder()
    data = labelled_images(args.data, classifier.class_names) if args.data else None
    args.images = args.images or [paint_missing(args.model, classifier, device)]

    torch.manual_seed(args.seed)  # the same in all processes
    preprocessing, teacher = classifier.preprocessing, classifier.model
    images, probabilities = read_images(args.images, preprocessing, device)
    begin = time.perf_counter()
    student = vitq.quantize_modules(copy.deepcopy(teacher), args.bits, args.edge_bits).to(device)
    first = images[torch.multinomial(probabilities, INITIALIZATION_IMAGES, replacement=True)]
    first = preprocessing.center_crop(first, [preprocessing.crop] * 2)
    vitq.initialize(student, preprocessing.normalizer(device)(first))
    with tqdm(total=args.steps, desc=f"{args.method} {args.bits}", unit="step",
              disable=None if args.steps and rank == 0 else True) as progress:
        losses = train(student, teacher, args.method, images, probabilities, preprocessing,
                       args.steps, args.batch, progress)
    if rank > 0:
        return  # all of them hold the same student
    seconds = time.perf_counter() - begin
    about = {"source": source_of(args.model), "preprocessing": vars(preprocessing)}
    size = save_anywhere(vitq.fold(student), args.out, identity, about) / 1e6
    full_size = teacher.num_parameters() * 4 / 1e6
    print(f"{args.out}: {full_size:.2f} MB in float32, {size:.2f} MB packed; {len(images)} images, "
          f"{args.steps} steps of {args.batch * processes}, seed {args.seed}, {seconds:.0f} s")
    metrics = {**vars(args), "processes": processes, "num_images": len(images), "seconds": seconds,
               "gpu_mb": torch.cuda.max_memory_allocated() / 1e6, "losses": losses}
    if data:
        metrics["results"] = evaluate({
            FULL_PRECISION: (teacher, full_size), f"{args.bits} {args.method}": (student, size)},
            preprocessing, *data, device)
    vitq.write_whole(args.out / "metrics.json", json.dumps(metrics, indent=1, default=str).encode())


if __name__ == "__main__":
    run(main)
