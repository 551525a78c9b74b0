"""Quantize a pretrained ViT, DeiT or Swin by training all its layers at once to follow the full-precision model.

    python quantize.py --model vit_t --bits w4a4 --images photos --data imagenet/val
    python quantize.py --model deit_s --bits w158a8 --images photos
    python quantize.py --model vit_t --bits w4a4 --images photos --method rtn      # baseline: round to nearest
    python quantize.py --model vit_t --bits w4a4 --images photos --method block    # baseline: block by block
    torchrun --nproc_per_node=4 quantize.py --model deit_s --bits w4a4 --images photos     # on four GPUs

The images need no labels. The result is the folder quantized/<model>-<bits> (baselines: -<bits>-<method>), which
`eval.py --model` takes.
Eq. (9)-(11) are the two losses and the loop below; the modules of Eq. (1)-(8) are in vitq.py.
"""
import copy
import math
import os
import resource
import shutil
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.v2 import functional as VF
from tqdm import tqdm

import generate
import vitq
from eval import (FULL_PRECISION, Parser, decode, evaluate, full_precision_mb, labelled_images, list_images,
                  load_classifier, print_table, rank_and_processes, result_rows, run, torch_device)
from tiny import shapes
from vitq import BadInput

INITIALIZATION_IMAGES = 32
# Adam moves a parameter by about its learning rate a step, whatever its gradient. Most of a weight's gradient is noise, so
# its moves are a random walk, learning rate x sqrt(steps) long. Weights of a ViT are about 0.05 large: on walks much longer
# than this one they forget, over many steps, what they were pretrained to; on shorter ones they learn less.
WEIGHT_WALK = 7.5e-3
SHORT = 600  # steps; in fewer, the rate rises no more: at 1e-3, 60 steps break more of a ViT than they mend
VECTOR_LR = 1e-3  # biases and LayerNorms: what rounding adds in the mean, a bias takes away again
QUANTIZER_LR = 2e-3  # scales and r are logarithms, zero points are counted in quantization steps
BETAS = 0.9, 0.99  # of Adam: the size of gradients is remembered for 100 steps, since it shrinks as the student learns
WARMUP = 0.02  # of the steps: the learning rates rise, since at first Adam knows no gradient's size
FADE = 0.5  # of the steps: ternary weights fade from W to W^, since a ViT whose weights are ternary at once knows nothing
# a_f and a_z of Eq. (11). What the blocks compute for every token says far more of an image than its class probabilities:
# with equal weights, Eq. (10) on images held back is a third to two thirds higher. Both are needed (README.md).
FEATURE_WEIGHT, LOGIT_WEIGHT = 50.0, 1.0
MARGIN = 1 / 7  # by which calibration images exceed the network's input, for the random crops: 32 pixels of 224
SMALLEST_CROP, ASPECT = 0.6, 4 / 3  # of random crops: the side, as a fraction of the picture's, and the largest distortion
STEPS, BATCH = 12_000, 64  # as many pictures as 24,000 steps of 32
TINY_STEPS, TINY_BATCH = 600, 32  # for --model tiny, whose pictures are learned in less
PICTURES = 960  # that are painted where no images are given: at least so many, and at least one a prompt
READ_EVERY = 10  # steps between two looks at the loss: each look makes the GPU wait
# A step is thousands of small kernels, most of them Eq. (1) and its gradient. Compiling the blocks fuses them; it takes
# some 20 s (Swin, whose blocks differ in shape: some minutes), which short runs do not earn back. On a GPU, launching the
# kernels would still take longer than they do, so one step is recorded as a CUDA graph and replayed as a whole.
COMPILE_FROM = 100  # steps
COMPILATIONS = 64  # of one function, for other shapes; torch gives up at 8
# what torch.compile needs on a CPU; where it is missing, steps are not compiled
CPU_COMPILER = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
RECORD_AT = 12  # the step that is recorded: the allocator has settled by then; with several processes it takes 11


# -------------------- The loss: Eq. (9)-(11)

def feature_loss(features, quantized_features):
    """Eq. (9), the mean over tokens and images. Two lists of h_l, (B, tokens, channels) each.

    The error is relative to each token, since the norm of h_l grows with depth and since a few tokens of a ViT carry
    massive activations: in ViT-Ti, 2 % of the tokens hold 97 % of || h_l ||^2 from block 8 on. With one norm for all tokens,
    the other 98 % would hardly be trained.
    """
    return torch.stack([((h - h_q).square().sum(-1) / h.square().sum(-1)).mean()
                        for h, h_q in zip(features, quantized_features)]).mean()


def logit_loss(logits, quantized_logits):
    """Eq. (10), the mean over the batch; (B, classes) each."""
    return F.kl_div(quantized_logits.log_softmax(-1), logits.log_softmax(-1), reduction="batchmean", log_target=True)


def joint_loss(features, quantized_features, logits, quantized_logits):
    """Eq. (11)."""
    return FEATURE_WEIGHT * feature_loss(features, quantized_features) \
        + LOGIT_WEIGHT * logit_loss(logits, quantized_logits)


# -------------------- The loop

def drawn(counts, draws):
    """Indices of images: every folder is as likely, and every image within it. counts: images in each folder, (F,).
    draws: uniform in [0, 1), any shape.

    So a thousand sharp photographs of what the network is for are not lost among twenty thousand others.
    """
    folder = (draws * len(counts)).long()
    return (counts.cumsum(0) - counts)[folder] + ((draws * len(counts) - folder) * counts[folder]).long()


def random_views(images, counts, draws, size):
    """Random crops, stretched to the network's input and mirrored at random; in half of them a second one shows through.

    images: uint8 (N, 3, S, S), those of one folder after those of another; counts: how many in each, (F,).
    draws: uniform in [0, 1), (7, 2, B). Returns float (B, 3, size, size) in [0, 255].
    A few thousand photographs are soon known by heart by millions of weights. Their views are not, and what the teacher
    says of half a dog or of a mixture is as good a target as any other (Beyer 2022).
    """
    index = drawn(counts, draws[0])  # (2, B): a view and what shows through it
    side = SMALLEST_CROP + (1 - SMALLEST_CROP) * draws[1]  # of the picture's side
    stretch = ASPECT ** (draws[2] - 0.5)
    width, height = (side * stretch).clamp_max(1), (side / stretch).clamp_max(1)
    mirrored_width = torch.where(draws[3] < 0.5, -width, width)
    # grid_sample's coordinates run from -1 to 1 over the picture
    centre_x, centre_y = (1 - width) * (2 * draws[4] - 1), (1 - height) * (2 * draws[5] - 1)
    pixels = (2 * torch.arange(size, device=images.device) + 1) / size - 1  # their centres
    x = (centre_x[..., None] + mirrored_width[..., None] * pixels).flatten(0, 1)  # (2 B, size)
    y = (centre_y[..., None] + height[..., None] * pixels).flatten(0, 1)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1)  # (2 B, size, size, 2)
    views = F.grid_sample(images[index.flatten()].float(), grid, padding_mode="border", align_corners=False)
    first, second = views.unflatten(0, (2, -1))
    share = (0.5 - draws[6, 0]).clamp_min(0).view(-1, 1, 1, 1)
    return first + share * (second - first)


def trained_parameters(model):
    """Theta of Eq. (11): name -> parameter. Position embeddings, class token and Swin's bias tables stay as they are."""
    kinds = (vitq.QuantWeight, vitq.ActivationQuantizer, vitq.RescaledLayerNorm, torch.nn.LayerNorm)
    trained = {id(parameter) for _, module in vitq.modules_of(model, kinds)
               for parameter in module.parameters(recurse=False)}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in trained}


def stages(model, method):
    """What is trained together, and by which loss: a list of (name -> parameter, loss function).

    "joint" has one stage: everything, Eq. (11). "block", as in BRECQ (Li 2021), has one a block: its parameters and
    its term of Eq. (9), while the blocks before it, already quantized, stay as they are. What stands before a block
    (the patch embedding, Swin's patch merging) is trained with it; after the last block nothing is. "rtn" has none.
    """
    if method == "rtn":
        return []
    parameters = trained_parameters(model)
    if method == "joint":
        return [(parameters, joint_loss)]
    inside = {id(parameter): l for l, block in enumerate(vitq.blocks(model)) for parameter in block.parameters()}
    groups = [{} for _ in vitq.blocks(model)]
    following = None
    for name, parameter in reversed(parameters.items()):
        following = inside.get(id(parameter), following)
        if following is not None:
            groups[following][name] = parameter
    return [(group, lambda features, quantized_features, *_, l=l:
             feature_loss(features[l:l + 1], quantized_features[l:l + 1])) for l, group in enumerate(groups)]


def optimizer_of(parameters, steps, device):
    """Adam over `parameters` (name -> parameter), which from now on require gradients, and its warm-up and cosine decay."""
    steps = max(steps, 1)
    weight_lr = WEIGHT_WALK / math.sqrt(max(steps, SHORT))
    groups = {weight_lr: [], VECTOR_LR: [], QUANTIZER_LR: []}
    for name, parameter in parameters.items():
        parameter.requires_grad_(True)
        of_quantizer = name.endswith(("log_scale", "zero_point", "log_r"))
        groups[QUANTIZER_LR if of_quantizer else VECTOR_LR if parameter.dim() == 1 else weight_lr].append(parameter)
    # the learning rate is a tensor, so that a step recorded on a GPU reads its present value
    optimizer = torch.optim.Adam([{"params": group, "lr": torch.tensor(lr, device=device)} for lr, group in groups.items()],
                                 betas=BETAS, fused=True, capturable=device.type == "cuda")
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(
        1, (done + 1) / (WARMUP * steps)) * (0.5 + 0.5 * math.cos(math.pi * done / steps)))


class Distillation(torch.nn.Module):
    """The loss of one batch: normalized pixels (B, 3, H, W) -> a scalar. A module, so that DistributedDataParallel can
    wrap it."""

    def __init__(self, student, teacher, loss_function):
        super().__init__()
        self.student, self.teacher, self.loss_function = student, teacher, loss_function
        self.blocks, self.quantized_blocks = vitq.Blocks(teacher), vitq.Blocks(student)

    def forward(self, pixels):
        # on a GPU, matrix products in bfloat16; quantizers, LayerNorms and the residual stream stay in float32
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.is_cuda):
            with torch.no_grad():
                logits = self.teacher(pixels).logits
            quantized_logits = self.student(pixels).logits
        return self.loss_function(self.blocks.take(), self.quantized_blocks.take(), logits.float(),
                                  quantized_logits.float())

    def remove(self):
        self.blocks.remove()
        self.quantized_blocks.remove()


def train(student, teacher, method, images, counts, preprocessing, steps, batch, progress):
    """Train `student` to follow `teacher`, without labels; both on the device of `images`.

    images: uint8 (N, 3, S, S); counts: how many of them in each folder, (F,). steps: in all; stages share them.
    Returns the losses, one a step.
    Raises BadInput at a non-finite loss.
    """
    device = images.device
    on_gpu = device.type == "cuda"
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    normalize = preprocessing.normalizer(device)
    if steps >= COMPILE_FROM and (on_gpu or shutil.which(CPU_COMPILER)):
        torch._dynamo.config.recompile_limit = COMPILATIONS
        # combo_kernels: independent small kernels, of which quantizing the weights takes hundreds, are launched as one
        compiled = partial(torch.compile, dynamic=False, options={"combo_kernels": on_gpu})
    else:
        def compiled(function):
            return function
    modules = [*vitq.blocks(student), *vitq.blocks(teacher),
               *(module for _, module in vitq.modules_of(student, vitq.QuantConv2d))]
    for module in modules:
        module.forward = compiled(module.forward)
    views = compiled(random_views)
    student.requires_grad_(False)
    losses = []
    all_stages = stages(student, method)

    def run_stage(parameters, loss_function, stage_steps):
        optimizer, schedule = optimizer_of(parameters, stage_steps, device)
        share = torch.ones((), device=device)
        fading = [layer for _, layer in vitq.modules_of(student, vitq.QuantWeight)
                  if layer.weight_bits == vitq.TERNARY and layer.weight.requires_grad]
        for layer in fading:
            layer.quantized_share = share
        distillation = Distillation(student, teacher, loss_function)
        parallel = DistributedDataParallel(distillation) if processes > 1 else distillation
        latest, unread = torch.zeros((), device=device), []

        def step():
            # every process draws the same numbers and takes its own share of them
            draws = torch.rand(7, 2, processes * batch, device=device)[..., rank * batch:(rank + 1) * batch]
            loss = parallel(normalize(views(images, counts, draws, preprocessing.crop)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            latest.copy_(loss.detach())

        for done in range(1, stage_steps + 1):
            share.fill_(min(1, done / (FADE * stage_steps)))
            if on_gpu and done == RECORD_AT:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):  # records the step's kernels without running them
                    step()
                step = graph.replay
            step()
            schedule.step()
            unread.append(latest.clone())
            if len(unread) == READ_EVERY or done == stage_steps:
                unread = torch.stack(unread)
                if processes > 1:
                    dist.all_reduce(unread)
                losses.extend((unread / processes).tolist())
                progress.update(len(unread))
                progress.set_postfix(loss=f"{losses[-1]:.4f}")
                unread = []
                if not all(map(math.isfinite, losses[-READ_EVERY:])):
                    first = next(i for i, value in enumerate(losses) if not math.isfinite(value))
                    raise BadInput(f"the loss is not finite at step {first + 1} of {steps}; nothing was written. "
                                   "Try other images or more bits")
        student.requires_grad_(False)
        distillation.remove()
        for layer in fading:
            layer.quantized_share = None

    # recording needs a stream of its own, which must not run ahead of what the default stream still computes
    if on_gpu:
        torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream() if on_gpu else None):
        for stage, (parameters, loss_function) in enumerate(all_stages):
            run_stage(parameters, compiled(loss_function) if method == "joint" else loss_function,
                      steps * (stage + 1) // len(all_stages) - steps * stage // len(all_stages))
    for module in modules:
        del module.forward
    return losses


# -------------------- Command line

def parser():
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, help="a name (deit_s, vit_t, swin_t, ...), a hub id, or a folder")
    parser.add_argument("--bits", required=True, help="wXaY: X bits a weight (158 is ternary, or 2..8), Y bits an "
                        "activation (2..8)")
    parser.add_argument("--images", nargs="+", metavar="DIR", help="unlabelled calibration images, any tree of image "
                        "files; several folders are joined (default: generated/<model>, painted first if missing)")
    parser.add_argument("--data", metavar="DIR", help="labelled images for the table at the end, one folder a class "
                        "(default for tiny: tiny/test, drawn first if missing)")
    parser.add_argument("--method", choices=["joint", "block", "rtn"], default="joint", help="joint optimization, or "
                        "one of the baselines (default: %(default)s)")
    parser.add_argument("--edge-bits", choices=["8", "same"], default="8", help="bits of the patch embedding and the "
                        "head (default: %(default)s)")
    parser.add_argument("--steps", type=int, help=f"optimizer steps (default: {STEPS}; for tiny {TINY_STEPS})")
    parser.add_argument("--batch", type=int, help=f"images a step, in each process (default: {BATCH}; for tiny "
                        f"{TINY_BATCH})")
    parser.add_argument("--seed", type=int, default=0, help="of the crops and of the images that set the first "
                        "scales (default: %(default)s)")
    parser.add_argument("--out", metavar="DIR", help="the folder to write (default: quantized/<model>-<bits>, "
                        "and -<method> for a baseline)")
    return parser


def paint_missing(model, classifier, device):
    """The folder generated/<model>, with learned prompts, after painting what it lacks of the model's classes."""
    classes = len(classifier.class_names)
    settings = generate.settings_of(model)
    folder = generate.default_folder(settings)
    per_mode = math.ceil(PICTURES / (classes * settings["modes"]))
    classifier.model.to(device).requires_grad_(False)
    seconds = generate.fill(folder, classifier, range(classes), device, per_mode, settings)
    if seconds and rank_and_processes()[0] == 0:
        print(f"{generate.summary(folder, classifier, range(classes), device)}, {seconds:.0f} s", flush=True)
    return folder


def peak_memory_mb(device):
    """Of the GPU's allocator, or of the process on a CPU; MB of 10^6 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def main():
    args = parser().parse_args()
    vitq.parse_bits(args.bits)
    for name, default in zip(("steps", "batch"), (TINY_STEPS, TINY_BATCH) if args.model == "tiny" else (STEPS, BATCH)):
        if getattr(args, name) is None:
            setattr(args, name, default)
        if getattr(args, name) < 1:
            raise BadInput(f"--{name} {getattr(args, name)}: must be 1 or more")
    edge_bits = args.edge_bits if args.edge_bits == "same" else int(args.edge_bits)
    device = torch_device(args.device)
    rank, processes = rank_and_processes()
    suffix = "" if args.method == "joint" else f"-{args.method}"
    out = Path(args.out or f"quantized/{Path(args.model).resolve().name}-{args.bits}{suffix}")
    vitq.check_output(out)
    folders = [list_images(folder) for folder in args.images or []]
    classifier = load_classifier(args.model)
    preprocessing = classifier.preprocessing
    if args.model == "tiny" and not args.data and rank == 0:
        args.data = shapes.test_folder()
    data = labelled_images(args.data, classifier.class_names) if args.data else None
    if not args.images:
        args.images = [str(paint_missing(args.model, classifier, device))]
        folders = [list_images(args.images[0])]

    if processes > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(args.seed)  # the same in all processes
    margin = 2 * round(MARGIN * preprocessing.crop / 2)
    images = [torch.cat([pixels for _, pixels in decode(paths, preprocessing.pixels(margin), "reading images")])
              for paths in folders]
    images, counts = torch.cat(images).to(device), torch.tensor([len(some) for some in images], device=device)
    teacher = classifier.model.to(device).requires_grad_(False)
    start = time.perf_counter()
    student = vitq.quantize_modules(copy.deepcopy(classifier.model).cpu(), args.bits, edge_bits).to(device)
    first = images[drawn(counts, torch.rand(INITIALIZATION_IMAGES).to(device))]
    vitq.initialize(student, preprocessing.normalizer(device)(VF.center_crop(first, [preprocessing.crop])))
    steps = 0 if args.method == "rtn" else args.steps
    with tqdm(total=steps, desc=f"{args.method} {args.bits}", unit="step",
              disable=None if steps and rank == 0 else True) as progress:
        losses = train(student, teacher, args.method, images, counts, preprocessing, steps, args.batch, progress)
    if processes > 1:
        dist.destroy_process_group()
    if rank > 0:
        return  # all of them hold the same student
    vitq.fold(student)
    seconds = time.perf_counter() - start

    metrics = {"model": args.model, "bits": args.bits, "edge_bits": edge_bits, "method": args.method,
               "images": args.images, "num_images": len(images), "steps": steps, "batch": args.batch,
               "processes": processes, "seed": args.seed, "seconds": seconds,
               "images_per_second": steps * args.batch * processes / seconds if steps else None,
               "peak_memory_mb": peak_memory_mb(device), "fp_mb": full_precision_mb(teacher),
               "loss_first": losses[0] if losses else None, "loss_last": losses[-1] if losses else None}

    def save():
        return vitq.save_quantized(student, out, args.bits, edge_bits,
                                   {"source": args.model, "preprocessing": asdict(preprocessing)}, metrics)

    size = save()  # already now: the evaluation may be interrupted, and the training must not be lost with it
    print(f"{out}: {metrics['fp_mb']:.2f} MB in float32, {size / 1e6:.2f} MB packed; "
          f"{len(images)} images, {steps} steps of batch {args.batch * processes}, seed {args.seed}, {seconds:.0f} s")
    if data:
        row = f"{args.bits} {args.method}"
        results = evaluate({FULL_PRECISION: teacher, row: student}, preprocessing, *data, device)
        metrics.update({"fp_top1": results[FULL_PRECISION]["top1"], "fp_top5": results[FULL_PRECISION]["top5"],
                        **{name: results[row][name] for name in ("top1", "top5", "agreement")}})
        save()
        print_table(result_rows(results, {FULL_PRECISION: metrics["fp_mb"], row: size / 1e6}))


if __name__ == "__main__":
    run(main)
