"""The fake-quant module set: Eq. (1)-(8), as modules that go into a Hugging Face ViT, DeiT or Swin.

From top to bottom: the quantizers, the layers built from them, attention, how a pretrained network
is fitted with them and given its first scales, and the packed checkpoint.

"Fake" quantization computes with integers that are held in floating point, so that gradients reach
the weights and the scales. Each layer is written as the integer product that a device would run.

The numbers of the equations are this repository's own. [paper] marks what the paper's abstract and
published summaries state; [ours] marks a form or a constant that was chosen here.
"""
import hashlib
import json
import os
import re
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn
from transformers import AttentionInterface, AutoConfig

TERNARY = 1.58  # log2(3): the information in a weight of three levels
FORMAT_VERSION = 6
FAMILIES = {name: getattr(transformers, name) for name in (
    "ViTForImageClassification", "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher", "SwinForImageClassification")}


class BadInput(ValueError):
    """Something the user gave cannot be used; the message is one line: its name and the remedy."""


def require(condition, what, fault, remedy="give a checkpoint without that"):
    """Raise BadInput, one line that names the fault and the remedy, unless the condition holds."""
    if not condition:
        raise BadInput(f"{what}: {fault}; {remedy}")


@contextmanager
def reading(what, remedy):
    """Within it, whatever a damaged file causes becomes a BadInput with its name and the remedy."""
    try:
        yield
    except (BadInput, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadInput(f"{what}: damaged or incomplete ({reason}); {remedy}") from error


def parse_bits(text):
    """"w4a4" -> (4, 4), "w158a8" -> (1.58, 8): bits of the weights and of the activations."""
    match = re.fullmatch(r"w(158|[2-8])a([2-8])", text)
    require(match, f"bits {text!r}", "not wXaY", "X: 158 (ternary) or 2..8; Y: 2..8; such as w4a4")
    weight, activation = match.groups()
    return TERNARY if weight == "158" else int(weight), int(activation)


# -------------------- Quantizers: Eq. (1)-(3)

def round_ste(x):
    """round() with the gradient of the identity: the straight-through estimator (Bengio 2013).

    The true derivative is zero almost everywhere, so nothing below a quantizer would ever learn.
    Difference and sum are both exact in floating point: what comes out is an integer.
    """
    return x + (x.round() - x).detach()


def clip(x, low, high):
    """clamp() with gradient one on the closed interval [low, high] and zero outside.

    torch.clamp's gradient at the two ends depends on the version. The values that arrive here are
    rounded, so the ends are levels like any other: without their gradient, only those ternary
    weights that are zero would go on learning.
    """
    return torch.where(x < low, low, torch.where(x > high, high, x))


def quantize_activation(x, scale, zero_point, bits):
    """The integers q - z of Eq. (1). x any shape; scale and zero_point broadcast against it."""
    z = clip(round_ste(zero_point), 0, 2 ** bits - 1)
    q = clip(round_ste(x / scale) + z, 0, 2 ** bits - 1)
    return q - z


def fake_quantize(x, scale, zero_point, bits):
    """Eq. (1), activations: q = clip(round(x / s) + z, 0, 2^b - 1), x^ = s (q - z),
    where z = clip(round(z'), 0, 2^b - 1) is an integer at all times. [ours]

    "Differentiable uniform quantization" is [paper]; affine and per tensor is [ours]. With
    straight-through rounding, autograd alone yields the gradients of torch's learnable
    fake-quantize operators: those of LSQ (Esser 2020) and LSQ+ (Bhalgat 2020), except that clipping
    comes after rounding and therefore begins half a level further out.
    """
    return scale * quantize_activation(x, scale, zero_point, bits)


def weight_range(bits):
    """The lowest and the highest integer of a weight."""
    return (-1, 1) if bits == TERNARY else (-2 ** (bits - 1), 2 ** (bits - 1) - 1)


def quantize_weight(weight, scale, bits):
    """The integers of Eq. (2) and (3). weight (O, ...); scale broadcasts against it."""
    return clip(round_ste(weight / scale), *weight_range(bits))


def fake_quantize_weight(weight, scale, bits):
    """Eq. (2), weights: W^_o = s_o clip(round(W_o / s_o), -2^(b-1), 2^(b-1) - 1). [ours]
    Eq. (3), ternary: W^_o = g_o clip(round(W_o / g_o), -1, 1), by bits = TERNARY. [ours]

    One scale per output channel o. There is no zero point: it would add a term that depends on the
    input to every integer product.
    """
    return scale * quantize_weight(weight, scale, bits)


# Eq. (6) tries these fractions of the full range. Logarithmic, because a few tokens of a ViT carry
# massive activations: the best range may be a few percent of the full one. The first exceeds 1, for
# images: with a mean of 0.5, a range that ends at black and white would put each pixel halfway
# between two levels.
CLIPPING_GRID = torch.logspace(0.01, -2, 40)
SAMPLE = 2 ** 15  # values of a tensor that Eq. (6) looks at
MASSIVE = 3  # in Eq. (6), a token whose squared norm exceeds this many medians is massive


def massive_token_weights(x):
    """The weights w of Eq. (6), (..., 1), for the input x (..., C) of a linear layer. [ours]

    A few tokens of a ViT carry massive activations (Sun 2024). The plain squared error would keep
    the range of these few and leave all other tokens a handful of levels. So the error of a
    massive token is divided by its squared norm, and that of the others by a constant.
    """
    norms = x.square().sum(-1, keepdim=True)
    return 1 / norms.clamp_min(MASSIVE * norms.median()).clamp_min(1e-8)


def scale_and_zero_point(low, high, bits):
    """s and z of a range [low, high] that holds zero."""
    scale = (high - low).clamp_min(1e-8) / (2 ** bits - 1)
    return scale, -low / scale


def best_range(x, w, bits, low, high):
    """Of K candidate ranges [low, high], (K, 1) each, the one of the least sum w (x - x^)^2."""
    x_q = fake_quantize(x, *scale_and_zero_point(low, high, bits), bits)
    errors = (w * (x - x_q).square()).sum(1)
    return low[errors.argmin()], high[errors.argmin()]


def activation_scale(x, w, bits):
    """Eq. (6), activations: s, z = argmin over clipping ranges of sum w (x - x^)^2. [ours]

    x, w (N,) -> scale and zero point, (1,) each. Both ends of the range shrink together, then each
    of them alone, since the output of GELU is far from symmetric.
    """
    fractions = CLIPPING_GRID.to(x)[:, None]
    # Zero stays inside the range, so that it is a level: Swin pads with it, and most outputs of
    # GELU are close to it.
    lowest, highest = fractions * x.min().clamp_max(0), fractions * x.max().clamp_min(0)
    low, high = best_range(x, w, bits, lowest, highest)
    low, high = best_range(x, w, bits, low.expand_as(highest), highest)
    low, high = best_range(x, w, bits, lowest, high.expand_as(lowest))
    return scale_and_zero_point(low, high, bits)


def weight_scale(weight, bits):
    """Eq. (6), weights: s_o = argmin of ||W_o - W^_o||^2. weight (O, ...) -> (O,). [ours]"""
    rows = weight.flatten(1)
    largest = rows.abs().amax(1, keepdim=True).clamp_min(1e-8) / weight_range(bits)[1]  # (O, 1)
    errors = torch.stack([(rows - fake_quantize_weight(rows, f * largest, bits)).square().sum(1)
                          for f in CLIPPING_GRID.tolist()])  # (K, O)
    return largest[:, 0] * CLIPPING_GRID.to(rows)[errors.argmin(0)]


class ActivationQuantizer(nn.Module):
    """Eq. (1) with its learned scale and zero point, one pair per tensor.

    The scale is kept as its logarithm: it cannot turn negative, and a step of Adam, whose size does
    not depend on the size of the gradient, changes all scales of the network by the same fraction.
    """

    def __init__(self, bits):
        super().__init__()
        self.bits, self.enabled = bits, True
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.zero_point = nn.Parameter(torch.zeros(()))

    def initialize(self, x, w):
        """Eq. (6) on a random sample of the values x, any shape, with weights w that broadcast."""
        index = torch.randint(x.numel(), (SAMPLE,)).to(x.device)
        x, w = x.flatten()[index], w.expand_as(x).flatten()[index]
        scale, zero_point = activation_scale(x, w, self.bits)
        self.log_scale.copy_(scale.log().squeeze())
        self.zero_point.copy_(zero_point.squeeze())

    def forward(self, x):
        """x, any shape -> the integers q - z, held in floating point, and the scale s."""
        scale = self.log_scale.exp()
        if not self.enabled:
            return x / scale, scale
        # One per row, for two reasons. Under autocast, a scalar would leave the division in x's
        # bfloat16, too coarse for 8 bits; and the fused kernel of the backward pass sums the
        # gradient within the row, instead of writing all of it out to be summed later.
        s, z = [number.expand(*x.shape[:-1], 1) for number in (scale, self.zero_point)]
        return quantize_activation(x, s, z, self.bits), scale


# -------------------- Layers: Eq. (2)-(5)

class QuantWeight:
    """What QuantLinear and QuantConv2d share: a weight with a learned scale per output channel.

    Eq. (5): W = W_0 + dW, dW = 0 at the start. "Weight refinement" is [paper]. It needs no code of
    its own: `weight` starts as the pretrained W_0 and is trained itself. [ours]
    """
    fade = None  # a tensor from 0 to 1 while ternary weights fade in, see quantize.py

    def __init__(self, layer, weight_bits, input_quantizer, log_r=None):
        """Take over the sizes and the weights of the floating-point `layer`.

        Layers that read the same tensor share its quantizer, and the log_r of the RescaledLayerNorm
        before them, if there is one.
        """
        sizes = [getattr(layer, name) for name in self.sizes]
        super().__init__(*sizes, bias=layer.bias is not None)  # nn.Linear's or nn.Conv2d's
        self.load_state_dict(layer.state_dict())
        self.weight_bits, self.input_quantizer, self.enabled = weight_bits, input_quantizer, True
        self.weight_log_scale = nn.Parameter(torch.zeros(len(self.weight)))
        self.register_parameter("log_r", log_r)

    def rescaled_weight(self):
        """The right-hand factor of Eq. (4), W diag(r)."""
        return self.weight if self.log_r is None else self.weight * self.log_r.exp()

    def quantized_weight(self):
        """The integers of Eq. (2) or (3), (O, ...), and their scales, (O,)."""
        weight, scales = self.rescaled_weight(), self.weight_log_scale.exp()
        scale = scales.view(-1, *[1] * (weight.dim() - 1))
        if not self.enabled:
            return weight / scale, scales
        q = quantize_weight(weight, scale, self.weight_bits)
        return (q if self.fade is None else torch.lerp(weight / scale, q, self.fade)), scales

    def initialize(self):
        self.weight_log_scale.copy_(weight_scale(self.rescaled_weight(), self.weight_bits).log())


class QuantLinear(QuantWeight, nn.Linear):
    """y = s_x s_w (q_x q_w^T) + b, an integer product, then one factor per output channel; q_x is
    q - z of Eq. (1).

    x (..., in) -> y (..., out). Still an nn.Linear, because transformers reads its `weight`.
    """
    sizes = "in_features", "out_features"  # what nn.Linear is made from

    def forward(self, x):
        (q_x, s_x), (q_w, s_w) = self.input_quantizer(x), self.quantized_weight()
        product = F.linear(q_x, q_w)  # bfloat16 under autocast, and so is what is returned
        y = s_x * s_w * product
        return (y if self.bias is None else y + self.bias).to(product.dtype)


class QuantConv2d(QuantWeight, nn.Conv2d):
    """The patch embedding, as QuantLinear: images (B, 3, H, W) -> (B, channels, rows, columns).

    Without padding, and with a bias, as all three families have it.
    """
    sizes = "in_channels", "out_channels", "kernel_size", "stride"  # what nn.Conv2d is made from

    def forward(self, x):
        (q_x, s_x), (q_w, s_w) = self.input_quantizer(x), self.quantized_weight()
        y = F.conv2d(q_x, q_w, stride=self.stride)
        return (s_x * s_w)[:, None, None] * y + self.bias[:, None, None]


class RescaledLayerNorm(nn.LayerNorm):
    """Eq. (4): LN(x) W^T = (LN(x) / r) (W diag(r))^T; this is the left-hand factor.

    "Channel-wise rescaling" is [paper]; where it stands, and r = exp(log_r) > 0, (channels,), is
    [ours]. The channels of a LayerNorm's output differ widely in range, and one scale must cover
    them all: without r, the quiet channels round to zero. The right-hand factor is
    `QuantWeight.rescaled_weight`.
    """

    def __init__(self, norm):
        super().__init__(norm.normalized_shape, norm.eps)
        self.load_state_dict(norm.state_dict())
        self.log_r = nn.Parameter(torch.zeros_like(norm.weight))

    def forward(self, x):
        y = super().forward(x)
        return y if self.log_r is None else y / self.log_r.exp()


# -------------------- Attention: Eq. (8)

def quantized_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Eq. (8): o = Q(e) Q(v) / sum e, e = exp(a - max a), a = Q(q) Q(k)^T / sqrt(d) + bias. [ours]

    query, key, value (B, heads, T, d); attention_mask, which is added to the scores, holds Swin's
    relative position bias and window mask, or is None. Returns (B, T, heads, d), and None, which
    transformers expects.

    Both operands of both products are quantized, with one scale per tensor. The softmax is
    quantized before its division. A query that looks at one token has a probability near 1; one
    that looks at all 197 has none above 0.01, and a scale that covers the first rounds the second
    to nothing. Relative to the largest of their row, both reach the highest level. In effect each
    row has a scale of its own, computed as it runs, so a comparison with methods that quantize the
    output of the softmax favours this one.
    """
    (q_q, s_q), (q_k, s_k) = module.query_quantizer(query), module.key_quantizer(key)
    a = s_q * (s_k * scaling) * (q_q @ q_k.transpose(-1, -2)).float()  # (B, heads, T, T)
    if attention_mask is not None:
        a = a + attention_mask
    # The maximum is not detached: the largest e of a row is always 1, so its score has a gradient
    # only as the maximum that is subtracted from all the other scores.
    e = (a - a.amax(-1, keepdim=True)).exp()
    (q_e, s_e), (q_v, s_v) = module.exp_quantizer(e), module.value_quantizer(value)
    o = s_e * s_v * (q_e @ q_v).float() / e.sum(-1, keepdim=True)  # (B, heads, T, d)
    return o.transpose(1, 2).contiguous(), None


AttentionInterface.register("vitq", quantized_attention)


# -------------------- A whole network

def blocks(model):
    """The transformer blocks in the order in which they run (ViTLayer, DeiTLayer or SwinLayer)."""
    return [module for module in model.modules() if hasattr(module, "layernorm_before")]


@contextmanager
def block_outputs(model):
    """Yields a list with the h_l, (B, T, channels), of all blocks in the model's latest forward.

    Within this context, the residual stream stays float32 also under autocast; Swin's patch merging
    would hand on bfloat16.
    """
    order = {block: l for l, block in enumerate(blocks(model))}
    outputs = [None] * len(order)

    def widen(block, inputs):
        return inputs[0].float(), *inputs[1:]

    def keep(block, inputs, output):
        outputs[order[block]] = output[0] if isinstance(output, tuple) else output

    with ExitStack() as hooks:
        for block in order:
            hooks.enter_context(block.register_forward_pre_hook(widen))
            hooks.enter_context(block.register_forward_hook(keep))
        yield outputs


def modules_of(model, kind):
    """Names and modules of one kind, in the order in which they are registered."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]


def quantize_modules(model, bits, edge_bits=8):
    """Put the fake-quant modules into `model`, in place; `initialize` then sets their scales.

    bits such as "w4a4"; edge_bits 8, or "same": patch embedding and head have the bits of the rest.
    No parameter requires gradients, until a training asks for them.
    Raises BadInput for another architecture than ViT, DeiT and Swin for image classification.
    """
    require(type(model).__name__ in FAMILIES, type(model).__name__, "cannot be quantized",
            f"give one of {', '.join(FAMILIES)}")
    weight_bits, activation_bits = parse_bits(bits)
    edge = (weight_bits, activation_bits) if edge_bits == "same" else (edge_bits, edge_bits)

    def replace(parent, names, norm=None, bits=(weight_bits, activation_bits)):
        """Linear layers that read the same tensor, here the output of `norm` if there is one."""
        quantizer = ActivationQuantizer(bits[1])
        for name in names:
            layer = getattr(parent, name)
            setattr(parent, name, QuantLinear(layer, bits[0], quantizer, norm and norm.log_r))

    def rescale(owner, name):
        setattr(owner, name, RescaledLayerNorm(getattr(owner, name)))
        return getattr(owner, name)

    for block in blocks(model):
        replace(block.attention, ["q_proj", "k_proj", "v_proj"], rescale(block, "layernorm_before"))
        for operand in ("query", "key", "value", "exp"):
            setattr(block.attention, f"{operand}_quantizer", ActivationQuantizer(activation_bits))
        replace(block.attention, ["o_proj"])
        replace(block.mlp, ["fc1"], rescale(block, "layernorm_after"))
        replace(block.mlp, ["fc2"])
    for parent in list(model.modules()):
        if hasattr(parent, "reduction"):  # Swin, between stages
            replace(parent, ["reduction"], rescale(parent, "norm"))
        for name, child in list(parent.named_children()):
            if type(child) is nn.Conv2d:  # the patch embedding; its input, the image, has 8 bits
                setattr(parent, name, QuantConv2d(child, edge[0], ActivationQuantizer(8)))
            elif type(child) is nn.Linear:  # the head, or the two heads of a distilled DeiT
                replace(parent, [name], bits=edge)
    model.set_attn_implementation("vitq")
    return model.eval().requires_grad_(False)


def enable(model, enabled):
    """Turn rounding and clipping on or off. Off, the model computes what the original does."""
    for _, module in modules_of(model, (ActivationQuantizer, QuantWeight)):
        module.enabled = enabled


def first_rescaling(x, weights):
    """Eq. (7): r_c = sqrt(magnitude of channel c / rms of W's column c), geometric mean 1. [ours]

    x: a LayerNorm's output, (images, positions, channels); weights: of the layers that read it,
    (out, channels) each. Returns log r. Magnitude: the rms over images, at the position where it is
    largest. x_c / r_c and r_c W_oc are then proportional over the channels c: neither side carries
    the whole difference between them.
    """
    # The class token, one of 197, is large in other channels than the patches: a mean over
    # positions would miss it.
    magnitude = x.square().mean(0).sqrt().amax(0)
    rms = torch.cat(weights).square().mean(0).sqrt()
    log_r = 0.5 * (magnitude.clamp_min(1e-5).log() - rms.clamp_min(1e-5).log())
    return log_r - log_r.mean()


def initialize(model, pixels):
    """Eq. (7) and (6), in the order in which the network runs, on `pixels` (32, 3, H, W).

    32 images are [paper]; what is done with them is [ours].
    """
    enable(model, False)
    layers = [layer for _, layer in modules_of(model, QuantLinear)]
    # For each quantizer without a scale yet, what gives the weights w of Eq. (6): 1 for the image
    # and attention's operands, which are no inputs of linear layers.
    waiting = {module: torch.ones_like for _, module in modules_of(model, ActivationQuantizer)}
    waiting |= {layer.input_quantizer: massive_token_weights for layer in layers}

    def set_r(norm, inputs, x):
        readers = [layer.weight for layer in layers if layer.log_r is norm.log_r]
        norm.log_r.copy_(first_rescaling(x, readers))
        return x * (-norm.log_r).exp()

    def set_scale(quantizer, inputs):
        if quantizer in waiting:  # it runs three times where q, k and v share it
            weights = waiting.pop(quantizer)
            quantizer.initialize(*inputs, weights(*inputs))

    with ExitStack() as hooks:
        for _, norm in modules_of(model, RescaledLayerNorm):
            hooks.enter_context(norm.register_forward_hook(set_r))
        for quantizer in waiting:
            hooks.enter_context(quantizer.register_forward_pre_hook(set_scale))
        model(pixels)
    for _, layer in modules_of(model, QuantWeight):
        layer.initialize()
    enable(model, True)
    return model


def fold(model):
    """Eq. (4): move r into the LayerNorms and the weights for good, so that it costs nothing."""
    for _, layer in modules_of(model, QuantWeight):
        layer.weight.copy_(layer.rescaled_weight())
        layer.log_r = None
    for _, norm in modules_of(model, RescaledLayerNorm):
        norm.weight.mul_((-norm.log_r).exp())
        norm.bias.mul_((-norm.log_r).exp())
        norm.log_r = None
    return model


# -------------------- The packed checkpoint

POWERS_OF_3 = np.array([1, 3, 9, 27, 81], dtype=np.uint8)


def pack(q, bits):
    """Integers of `weight_range(bits)`, any shape -> a flat uint8 tensor.

    Ternary: five weights per byte, as the digits of a number in base 3 (3^5 = 243 of 256 values:
    1.6 bits per weight). Otherwise: `bits` bits per weight, least significant first, without gaps;
    the last byte is filled with zeros.
    """
    unsigned = (q.numpy().ravel().astype(np.int16) - weight_range(bits)[0]).astype(np.uint8)
    if bits == TERNARY:
        unsigned = np.pad(unsigned, (0, -len(unsigned) % 5)).reshape(-1, 5)
        return torch.from_numpy((unsigned * POWERS_OF_3).sum(1, dtype=np.uint8))
    binary = np.unpackbits(unsigned[:, None], axis=1, count=bits, bitorder="little")  # (N, bits)
    return torch.from_numpy(np.packbits(binary, bitorder="little"))


def unpack(packed, bits, shape):
    """The inverse of `pack`: int8 integers of the given shape. Raises ValueError."""
    count = int(np.prod(shape))
    if bits == TERNARY:
        unsigned = (packed.numpy()[:, None] // POWERS_OF_3 % 3).ravel()[:count]
    else:
        binary = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little")
        unsigned = np.packbits(binary.reshape(count, bits), axis=1, bitorder="little").ravel()
    q = torch.from_numpy((unsigned.astype(np.int16) + weight_range(bits)[0]).astype(np.int8))
    if len(q) != count or not torch.equal(pack(q, bits), packed):
        raise ValueError(f"{packed.shape} of {packed.dtype} are not {count} weights of {bits} bits")
    return q.view(*shape)


def write_whole(path, data):
    """Write bytes to a file that appears whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes(data)
        os.replace(aside, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
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
    `quantize_modules`; for eval.py and export.py also preprocessing, source and model, as
    quantize.py has them. Returns the size in bytes. Raises BadInput if a number is not finite.
    """
    tensors = {name: tensor.cpu() for name, tensor in model.named_parameters()}
    require(all(tensor.isfinite().all() for tensor in tensors.values()), "result",
            "not all weights or scales are finite", "nothing was written")
    for name, layer in modules_of(model, QuantWeight):
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
    with suppress(OSError, SafetensorError, ValueError):
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            config = json.loads((file.metadata() or {}).get("config", "null"))
    return config if isinstance(config, dict) and config.get("format") == "vitq" else None


def check_output(folder, identity):
    """Raise BadInput if `folder` cannot be written, or holds anything but a result of the same
    model and settings: `identity`, some items of its configuration."""
    config, remedy = read_config(folder), "it is left alone, name another folder with --out"
    others = folder.is_dir() and any(path.name[0] != "." for path in folder.iterdir())
    require(config or not others, folder, "is not a quantized model", remedy)
    for name, value in identity.items() if config else ():
        require(config.get(name) == value, folder,
                f"holds a result with {name} {config.get(name)}, not {value}", remedy)
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    require(there.is_dir() and os.access(there, os.W_OK), folder,
            f"{there} is not a folder that can be written to", remedy)


def load_quantized(folder):
    """A model from a folder of `save_quantized`, and its configuration, from that one file alone.

    Raises BadInput for another format version and for a file that is damaged or cut short.
    """
    config, remedy = read_config(folder), "remove it and quantize again"
    require(config, folder, "no quantized model, or a damaged one", remedy)
    require(config.get("version") == FORMAT_VERSION, folder, "of another format version", remedy)
    with reading(folder, remedy):
        tensors = load_file(Path(folder) / "model.safetensors")
        text = json.dumps({name: value for name, value in config.items() if name != "checksum"})
        require(checksum(text, tensors) == config["checksum"], folder, "damaged", remedy)
        network = FAMILIES[config["architecture"]](AutoConfig.for_model(**config["network"]))
        model = fold(quantize_modules(network, config["bits"], config["edge_bits"]))
        for name, layer in modules_of(model, QuantWeight):
            q = unpack(tensors[f"{name}.weight"], layer.weight_bits, layer.weight.shape)
            scale = tensors[f"{name}.weight_log_scale"].exp().view(-1, *[1] * (q.dim() - 1))
            tensors[f"{name}.weight"] = scale * q  # on the grid: the forward rounds it to exactly q
        require(all(tensor.isfinite().all() for tensor in tensors.values()), folder,
                "not all numbers are finite", remedy)
        tensors = {name: tensors[name] for name, _ in model.named_parameters()}  # or a KeyError
        model.load_state_dict(tensors, strict=False)  # what q, k and v share is named once
    return model, config
