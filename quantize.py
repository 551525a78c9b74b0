"""Quantize a pretrained ViT, DeiT or Swin: all its layers at once follow the full-precision model.

    python quantize.py --model deit_s --bits w158a8    # on generated/deit_s, painted first: 2 hours
    python quantize.py --model vit_t --bits w4a4 --images photos --data imagenet/val
    python quantize.py --model vit_t --bits w4a4 --images photos --method rtn    # round to nearest
    python quantize.py --model vit_t --bits w4a4 --images photos --method block  # block by block
    torchrun --nproc_per_node=2 quantize.py --model deit_s --bits w4a4 --images photos

The images need no labels. The result is the folder quantized/<model>-<bits> (of the baselines:
-<bits>-<method>), which `eval.py --model` takes. This file is Eq. (9)-(11): the two losses and the
one loop. The modules of Eq. (1)-(8) are in vitq.py.
"""
import copy
import functools
import json
import math
import re
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import generate
import vitq
from checkpoints import (MODEL_HELP, BadInput, check_output, load_classifier, reading,
                         require, save_quantized, source_of, write_whole)
from eval import (FULL_PRECISION, Parser, decode, evaluate, labelled_images, list_images, progress,
                  rank_and_processes, run, start, whole_number)
from tiny import shapes

INITIALIZATION_IMAGES = 32  # [ours]
STEPS, BATCH = 12_000, 64  # [ours]
TINY_STEPS, TINY_BATCH = 400, 24  # for --model tiny, whose pictures are learned sooner
# lambda_f, lambda_p of Eq. (11). Eq. (9) is a relative error: with 100, one percent of it weighs as
# much as one nat of Eq. (10). Chosen on held-out pictures; README shows either term alone. [ours]
FEATURE_WEIGHT, LOGIT_WEIGHT = 100.0, 1.0
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
    """Eq. (9): L_feat = mean over blocks l and tokens of ||h_l - h^_l||^2 / ||h_l||^2, in which the
    class tokens count as much as all patches together: only they reach the head. [ours]

    Two lists of h_l, (B, T, channels) each. The norm is per token because a few tokens of a ViT
    have massive activations: with one norm for all tokens, the others would hardly be trained.
    """
    def mean_over_tokens(error):  # (B, T)
        if class_tokens == 0:
            return error.mean()
        return 0.5 * error[:, :class_tokens].mean() + 0.5 * error[:, class_tokens:].mean()

    return torch.stack([mean_over_tokens((h - h_q).square().sum(-1) / h.square().sum(-1))
                        for h, h_q in zip(features, quantized_features)]).mean()


def logit_loss(logits, quantized_logits):
    """Eq. (10): L_logit = KL(p || p^), the mean over the batch; (B, classes) each. [ours]

    In this direction it is the cross-entropy with the teacher's probabilities as soft labels, less
    a constant. It is large where the teacher gives a class some probability and the student gives
    it none. KL(p^ || p) would stay small for a student that keeps only the likeliest class.
    """
    return F.kl_div(quantized_logits.log_softmax(-1), logits.log_softmax(-1), reduction="batchmean",
                    log_target=True)


def joint_loss(features, quantized_features, logits, quantized_logits, class_tokens):
    """Eq. (11): min over Theta of E_x [lambda_f L_feat + lambda_p L_logit]; this is the bracket.
    Theta = {s, z, g, r, dW, biases, LayerNorms} of all layers at once, see `trained_parameters`
    (of s, g and r, the logarithms).
    Joint and without labels is [paper], the sum is [ours].

    Why jointly? A block that is trained alone makes its own error small. It cannot know which
    errors the later blocks can still repair, nor that one which it leaves small is amplified
    further up, and what is left adds up from block to block. One loss on all block outputs and on
    the logits weighs each error by what it does to them, and a later layer learns to undo what an
    earlier one could not avoid. `--method block` is the comparison.
    """
    return (FEATURE_WEIGHT * feature_loss(features, quantized_features, class_tokens)
            + LOGIT_WEIGHT * logit_loss(logits, quantized_logits))


# -------------------- What is trained

def trained_parameters(model):
    """Theta of Eq. (11), name -> parameter: all but class tokens, position embeddings, Swin's
    position bias tables, and the scale and zero point of the image.

    Trained, that scale would shrink and clip black and white, for finer levels in between.
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


def random_positions(images, count):
    """Positions of `count` of the images, drawn with replacement, all equally likely."""
    uniform = torch.full((len(images),), 1 / len(images), device=images.device)
    return torch.multinomial(uniform, count, replacement=True)


def draw_from(images, preprocessing, batch):
    """A function that draws a batch: random views as the network's input, (batch, 3, H, W).

    images: uint8 (N, 3, S, S). Processes have the same seed, and each uses its own part of the
    random numbers, so that their views differ.
    """
    rank, processes = rank_and_processes()
    mine, device = slice(rank * batch, (rank + 1) * batch), images.device

    def draw():
        index = random_positions(images, batch * processes)[mine]
        u = torch.rand(5, batch * processes, device=device)[:, mine]
        x = random_views(images[index], preprocessing.crop, u)
        # in channels_last, convolutions are faster
        return preprocessing.normalizer(device)(x).to(memory_format=torch.channels_last)
    return draw


def fade_in(student, t):
    """While they are trained, ternary weights are W + t (W^ - W), with t from 0 to 1; t = None:
    they are W^, for good. [ours]"""
    for _, layer in vitq.modules_of(student, vitq.QuantWeight):
        trained = layer.weight_bits == vitq.TERNARY and layer.weight.requires_grad
        layer.fade = t if trained else None


def mean_over_processes(tensors):
    """Replace each of the tensors by its mean over the processes of torchrun, in one message."""
    if torch.distributed.is_initialized():
        everything = parameters_to_vector(tensors)
        torch.distributed.all_reduce(everything)
        vector_to_parameters(everything / torch.distributed.get_world_size(), tensors)


def train_stage(student, teacher, draw, parameters, loss_function, steps, bar):
    """Train `parameters` (name -> parameter) of the student to follow the teacher. Returns the loss
    of the first, every tenth and the last step. Raises BadInput if one of them is not finite."""
    device, class_tokens, losses = student.device, count_class_tokens(student), []
    optimizer, schedule = optimizer_of(parameters, steps, device)  # they require gradients now
    loss_function = compiled(loss_function, device, steps)
    latest, t = torch.zeros(2, device=device)
    fade_in(student, t)

    def step():
        x = draw()
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

    with vitq.block_outputs(teacher) as h, vitq.block_outputs(student) as h_q:
        step = recorded(step, device)
        for done in range(1, steps + 1):
            t.fill_(min(1, done / (FADE * steps)))
            step()
            schedule.step()
            bar.update()
            if done % READ_EVERY == 0 or done in (1, steps):
                losses.append(latest.item())
                bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
                require(math.isfinite(losses[-1]), f"step {done} of {steps}",
                        "the loss is not finite", "try other images or more bits")
    student.requires_grad_(False)
    fade_in(student, None)
    return losses


def train(student, teacher, method, draw, steps, bar):
    """Train `student` to follow `teacher`, without labels: Eq. (11), or the baseline `method`.

    Both are frozen, on one device. draw: of `draw_from`. Returns the losses of `train_stage`.
    """
    losses, embedding = [], [layer for _, layer in vitq.modules_of(student, vitq.QuantConv2d)]
    modules = [*vitq.blocks(student), *vitq.blocks(teacher), *embedding]
    for module in modules:
        module.forward = compiled(module.forward, student.device, steps)
    for parameters, loss_function, stage_steps in stages(student, method, steps):
        losses += train_stage(student, teacher, draw, parameters, loss_function, stage_steps, bar)
    for module in modules:
        del module.forward  # the class's own again, which is not compiled
    return losses


# -------------------- Steps that run without a gap

def recorded(step, device):
    """`step`, a function without arguments; on a GPU, recorded as a CUDA graph at its fourth call.

    A training step is thousands of small kernels, which take longer to launch one by one than to
    run. Replayed as a whole, they run without a gap. What changes from step to step has to lie in
    tensors that are written in place. Recording needs a stream of its own.
    """
    if device.type != "cuda":
        return step
    stream, graph, calls = torch.cuda.Stream(device), torch.cuda.CUDAGraph(), []

    def on_stream():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            if len(calls) == 3:  # the first ones allocate memory and choose kernels
                with torch.cuda.graph(graph, stream=stream):
                    step()
            calls.append(graph.replay if len(calls) >= 3 else step)
            calls[-1]()
        torch.cuda.current_stream().wait_stream(stream)
    return on_stream


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


# -------------------- Command line

def parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help=MODEL_HELP)
    add("--bits", required=True, help="wXaY: per weight (158: ternary, or 2..8) and per activation")
    add("--images", nargs="+", metavar="DIR", help="trees of unlabelled images, all drawn equally "
        "often (default: generated/<model>, painted first if missing)")
    add("--data", metavar="DIR", help="images for the last table: a folder per class, or no labels")
    add("--method", choices=["joint", "block", "rtn"], default="joint", help="default: %(default)s")
    add("--edge-bits", choices=["8", "same"], default="8", help="of patch embedding and head")
    add("--steps", type=whole_number(1), help=f"default: {STEPS}; tiny {TINY_STEPS}")
    add("--batch", type=whole_number(1), help=f"per process (default: {BATCH}; tiny {TINY_BATCH})")
    add("--seed", type=whole_number(0), default=0,
        help="of the training, not of pictures painted first (default: %(default)s)")
    add("--out", metavar="DIR", help="default: quantized/<model>-<bits>, for a baseline -<method>")
    return parser


def parse():
    """The command line, with the defaults that depend on --model and --method."""
    args = parser().parse_args()
    with reading("--bits", "see --help", "not followed"):
        vitq.parse_bits(args.bits)
    for option in ("steps", "batch") if args.method == "rtn" else ():
        require(not vars(args)[option], f"--{option}", "rtn trains nothing", "leave it out")
    steps, batch = (TINY_STEPS, TINY_BATCH) if args.model == "tiny" else (STEPS, BATCH)
    args.steps = 0 if args.method == "rtn" else args.steps or steps
    args.batch = args.batch or batch
    suffix = "" if args.method == "joint" else f"-{args.method}"
    args.out = Path(args.out or f"quantized/{Path(args.model).resolve().name}-{args.bits}{suffix}")
    return args


def read_images(folders, preprocessing, device):
    """This process's share of the images of some folders, uint8 (N, 3, S, S), with a margin for
    crops."""
    transform = preprocessing.pixels(2 * round(MARGIN * preprocessing.crop / 2))
    rank, processes = rank_and_processes()
    # all folders are listed, which may raise BadInput, before any image is decoded
    shares = [paths[rank::processes] or paths for paths in map(list_images, folders)]
    decoded = [pixels for paths in shares for _, pixels in decode(paths, transform, "reading")]
    return torch.cat(decoded).to(device)


def save_anywhere(student, out, identity, about):
    """Save to `out`. Returns the size in bytes. If that fails, saves to a temporary folder instead,
    since training took long, and raises BadInput with its name."""
    try:
        check_output(out, identity)  # again: others may have written there since
        return save_quantized(student, out, {**identity, **about})
    except (OSError, BadInput) as error:
        with suppress(OSError):
            out.rmdir()
        aside = Path(tempfile.gettempdir(), f"vitq-{time.time_ns()}", out.name)
        save_quantized(student, aside, {**identity, **about})
        raise BadInput(f"{error}; what was trained is in {aside}") from error


def main():
    args = parse()
    device = start(args.device)
    rank, processes = rank_and_processes()
    classifier = load_classifier(args.model, device)
    identity = {"model": classifier.fingerprint, "bits": args.bits,
                "edge_bits": args.edge_bits, "method": args.method}
    check_output(args.out, identity)
    if args.model == "tiny" and not args.data and rank == 0:
        args.data = shapes.test_folder()
    data = labelled_images(args.data, classifier.class_names) if args.data else None
    args.images = args.images or [generate.paint_missing(args.model, classifier, device)]

    torch.manual_seed(args.seed)  # the same in all processes
    preprocessing, teacher = classifier.preprocessing, classifier.model
    images = read_images(args.images, preprocessing, device)
    args.out.mkdir(parents=True, exist_ok=True)  # what cannot be written is known before training
    begin = time.perf_counter()
    student = vitq.quantize_modules(copy.deepcopy(teacher), args.bits, args.edge_bits).to(device)
    first = images[random_positions(images, INITIALIZATION_IMAGES)]
    first = preprocessing.center_crop(first, [preprocessing.crop] * 2)
    vitq.initialize(student, preprocessing.normalizer(device)(first))
    if processes > 1:  # each saw other images
        for parameter in student.parameters():
            torch.distributed.broadcast(parameter, 0)
    with progress(args.steps, f"{args.method} {args.bits} on {device}", unit="step",
                  disable=not args.steps or rank > 0) as bar:
        draw = draw_from(images, preprocessing, args.batch)
        losses = train(student, teacher, args.method, draw, args.steps, bar)
    if rank > 0:
        return  # all of them hold the same student
    seconds, steps = time.perf_counter() - begin, f"{args.steps} steps of {args.batch}"
    about = {"source": source_of(args.model), "preprocessing": vars(preprocessing)}
    size = save_anywhere(vitq.fold(student), args.out, identity, about) / 1e6
    full_size = teacher.num_parameters() * 4 / 1e6
    print(f"{args.out}: {full_size:.2f} MB in float32, {size:.2f} MB packed; {processes} x "
          f"({len(images)} images, {steps}), seed {args.seed}, {seconds:.0f} s on {device}")
    metrics = {**vars(args), "processes": processes, "num_images": len(images), "seconds": seconds,
               "gpu_mb": torch.cuda.max_memory_allocated() / 1e6, "losses": losses}
    if data:
        metrics["results"] = evaluate({
            FULL_PRECISION: (teacher, full_size), f"{args.bits} {args.method}": (student, size)},
            preprocessing, *data, device)
    write_whole(args.out / "metrics.json", json.dumps(metrics, indent=1, default=str).encode())


if __name__ == "__main__":
    run(main)
