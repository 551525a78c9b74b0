"""Quantize a pretrained ViT, DeiT or Swin by training all its layers at once to follow the full-precision model.

    python quantize.py --model vit_t --bits w4a4 --images photos --data imagenet/val
    python quantize.py --model deit_s --bits w158a8 --images photos
    python quantize.py --model vit_t --bits w4a4 --images photos --method rtn      # baseline: round to nearest
    python quantize.py --model vit_t --bits w4a4 --images photos --method block    # baseline: block by block

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
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as VF
from tqdm import tqdm

import generate
import vitq
from eval import (FULL_PRECISION, Parser, decode, evaluate, full_precision_mb, labelled_images, list_images,
                  load_classifier, print_table, result_rows, run, torch_device)
from tiny import shapes
from vitq import BadInput

INITIALIZATION_IMAGES = 32
# Adam moves a parameter by about its learning rate a step, whatever its gradient: weights of a ViT are about 0.05
# large, scales and r are logarithms, zero points are counted in quantization steps.
WEIGHT_LR = 2e-4
QUANTIZER_LR = 1e-3
FEATURE_WEIGHT, LOGIT_WEIGHT = 1.0, 1.0  # a_f and a_z of Eq. (11)
MARGIN = 1 / 7  # by which calibration images exceed the network's input, for the random crops: 32 pixels of 224
STEPS = {"tiny": 600}  # model -> steps; for all others 3,000
PICTURES = 960  # that are painted where no images are given: at least so many, and at least one a prompt
READ_EVERY = 10  # steps between two looks at the loss: each look makes the GPU wait
# A step is thousands of small kernels, most of them Eq. (1) and its gradient. Compiling the blocks fuses them; it takes
# some 20 s, which short runs do not earn back. On a GPU, launching the kernels would still take longer than they do,
# so after a few ordinary steps one step is recorded as a CUDA graph and replayed as a whole.
COMPILE_FROM = 100  # steps
# what torch.compile needs on a CPU; where it is missing, steps are not compiled
CPU_COMPILER = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
RECORD_AT = 4  # the step that is recorded; the allocator and the libraries have settled by then


# -------------------- The loss: Eq. (9)-(11)

def feature_loss(features, quantized_features):
    """Eq. (9). Two lists of h_l, (B, tokens, channels) each; relative, since the norm of h_l grows with depth."""
    return torch.stack([(h - h_q).square().sum() / h.square().sum()
                        for h, h_q in zip(features, quantized_features)]).mean()


def logit_loss(logits, quantized_logits):
    """Eq. (10), the mean over the batch; (B, classes) each."""
    return F.kl_div(quantized_logits.log_softmax(-1), logits.log_softmax(-1), reduction="batchmean", log_target=True)


def joint_loss(features, quantized_features, logits, quantized_logits):
    """Eq. (11)."""
    return FEATURE_WEIGHT * feature_loss(features, quantized_features) \
        + LOGIT_WEIGHT * logit_loss(logits, quantized_logits)


# -------------------- The loop

def random_crops(images, size, batch):
    """A batch of randomly cropped and mirrored images: uint8 (N, 3, S, S) -> uint8 (batch, 3, size, size).

    A few hundred photographs are soon known by heart by millions of weights; crops of them are not.
    """
    device = images.device
    index = torch.randint(len(images), (batch, 1, 1), device=device)
    top, left = torch.randint(images.shape[-1] - size + 1, (2, batch, 1, 1), device=device)
    mirrored = torch.rand(batch, 1, 1, device=device) < 0.5
    offsets = torch.arange(size, device=device)
    rows = top + offsets.view(1, size, 1)  # (batch, size, 1)
    columns = left + torch.where(mirrored, size - 1 - offsets, offsets)  # (batch, 1, size)
    return images[index, :, rows, columns].permute(0, 3, 1, 2)  # (batch, size, size, 3) before the permutation


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
    """Adam over `parameters` (name -> parameter), which from now on require gradients, and its cosine decay to zero."""
    groups = {WEIGHT_LR: [], QUANTIZER_LR: []}
    for name, parameter in parameters.items():
        parameter.requires_grad_(True)
        groups[QUANTIZER_LR if name.endswith(("log_scale", "zero_point", "log_r")) else WEIGHT_LR].append(parameter)
    # the learning rate is a tensor, so that a step recorded on a GPU reads its present value
    optimizer = torch.optim.Adam([{"params": group, "lr": torch.tensor(lr, device=device)}
                                  for lr, group in groups.items()], fused=True, capturable=device.type == "cuda")
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))


def train(student, teacher, method, images, preprocessing, steps, batch, progress):
    """Train `student` to follow `teacher`, without labels; both on the device of `images`.

    images: uint8 (N, 3, S, S). steps: in all; stages share them. Returns the losses, one a step.
    Raises BadInput at a non-finite loss.
    """
    device = images.device
    on_gpu = device.type == "cuda"
    normalize = preprocessing.normalizer(device)
    blocks, quantized_blocks = vitq.Blocks(teacher), vitq.Blocks(student)
    compiled = vitq.blocks(student) if steps >= COMPILE_FROM and (on_gpu or shutil.which(CPU_COMPILER)) else []
    for block in compiled:
        block.forward = torch.compile(block.forward)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs: its 10 bits of mantissa hold every level of 8 bits
    student.requires_grad_(False)
    losses = []
    all_stages = stages(student, method)
    for stage, (parameters, loss_function) in enumerate(all_stages):
        stage_steps = steps * (stage + 1) // len(all_stages) - steps * stage // len(all_stages)
        optimizer, schedule = optimizer_of(parameters, stage_steps, device)
        latest, unread = torch.zeros((), device=device), []

        def step():
            pixels = normalize(random_crops(images, preprocessing.crop, batch))
            with torch.no_grad():
                logits = teacher(pixels).logits
            quantized_logits = student(pixels).logits
            loss = loss_function(blocks.take(), quantized_blocks.take(), logits, quantized_logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            latest.copy_(loss.detach())

        # recording needs a stream of its own, which must not run ahead of what the default stream still computes
        if on_gpu:
            torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream() if on_gpu else None):
            for done in range(1, stage_steps + 1):
                if on_gpu and done == RECORD_AT:
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):  # records the step's kernels without running them
                        step()
                    step = graph.replay
                step()
                schedule.step()
                unread.append(latest.clone())
                if len(unread) == READ_EVERY or done == stage_steps:
                    losses += torch.stack(unread).tolist()
                    progress.update(len(unread))
                    progress.set_postfix(loss=f"{losses[-1]:.4f}")
                    unread = []
                    if not all(map(math.isfinite, losses[-READ_EVERY:])):
                        first = next(i for i, value in enumerate(losses) if not math.isfinite(value))
                        raise BadInput(f"the loss is not finite at step {first + 1} of {steps}; nothing was written. "
                                       "Try other images or more bits")
        student.requires_grad_(False)
    torch.set_float32_matmul_precision("highest")
    for block in compiled:
        del block.forward
    blocks.remove()
    quantized_blocks.remove()
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
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 3000; for tiny "
                        f"{STEPS['tiny']})")
    parser.add_argument("--batch", type=int, default=32, help="images a step (default: %(default)s)")
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
    if seconds:
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
    args.steps = STEPS.get(args.model, 3000) if args.steps is None else args.steps
    for name in ("steps", "batch"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name} {getattr(args, name)}: must be 1 or more")
    edge_bits = args.edge_bits if args.edge_bits == "same" else int(args.edge_bits)
    device = torch_device(args.device)
    suffix = "" if args.method == "joint" else f"-{args.method}"
    out = Path(args.out or f"quantized/{Path(args.model).resolve().name}-{args.bits}{suffix}")
    vitq.check_output(out)
    paths = [path for folder in args.images or [] for path in list_images(folder)]
    classifier = load_classifier(args.model)
    preprocessing = classifier.preprocessing
    if args.model == "tiny" and not args.data:
        args.data = shapes.test_folder()
    data = labelled_images(args.data, classifier.class_names) if args.data else None
    if not args.images:
        args.images = [str(paint_missing(args.model, classifier, device))]
        paths = list_images(args.images[0])

    torch.manual_seed(args.seed)
    margin = 2 * round(MARGIN * preprocessing.crop / 2)
    images = torch.cat([pixels for _, pixels in decode(paths, preprocessing.pixels(margin), "reading images")])
    images = images.to(device)
    teacher = classifier.model.to(device)
    start = time.perf_counter()
    student = vitq.quantize_modules(copy.deepcopy(classifier.model).cpu(), args.bits, edge_bits).to(device)
    first = images[torch.randperm(len(images))[:INITIALIZATION_IMAGES].to(device)]
    vitq.initialize(student, preprocessing.normalizer(device)(VF.center_crop(first, [preprocessing.crop])))
    steps = 0 if args.method == "rtn" else args.steps
    with tqdm(total=steps, desc=f"{args.method} {args.bits}", unit="step", disable=None if steps else True) as progress:
        losses = train(student, teacher, args.method, images, preprocessing, steps, args.batch, progress)
    vitq.fold(student)
    seconds = time.perf_counter() - start

    metrics = {"model": args.model, "bits": args.bits, "edge_bits": edge_bits, "method": args.method,
               "images": args.images, "num_images": len(images), "steps": steps, "batch": args.batch,
               "seed": args.seed, "seconds": seconds, "images_per_second": steps * args.batch / seconds if steps else None,
               "peak_memory_mb": peak_memory_mb(device), "fp_mb": full_precision_mb(teacher),
               "loss_first": losses[0] if losses else None, "loss_last": losses[-1] if losses else None}
    def save():
        return vitq.save_quantized(student, out, args.bits, edge_bits,
                                   {"source": args.model, "preprocessing": asdict(preprocessing)}, metrics)

    size = save()  # already now: the evaluation may be interrupted, and the training must not be lost with it
    print(f"{out}: {metrics['fp_mb']:.2f} MB in float32, {size / 1e6:.2f} MB packed; "
          f"{len(images)} images, {steps} steps of batch {args.batch}, seed {args.seed}, {seconds:.0f} s")
    if data:
        row = f"{args.bits} {args.method}"
        results = evaluate({FULL_PRECISION: teacher, row: student}, preprocessing, *data, device)
        metrics.update({"fp_top1": results[FULL_PRECISION]["top1"], "fp_top5": results[FULL_PRECISION]["top5"],
                        **{name: results[row][name] for name in ("top1", "top5", "agreement")}})
        save()
        print_table(result_rows(results, {FULL_PRECISION: metrics["fp_mb"], row: size / 1e6}))


if __name__ == "__main__":
    run(main)
