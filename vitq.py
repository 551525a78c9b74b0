"""The fake-quant module set: Eq. (1)-(8) as torch modules, put into a Hugging Face ViT, DeiT or Swin.

Read from top to bottom, it is: the quantizers, the layers that use them, the attention that uses them, how a
pretrained network is fitted with them and given its first scales, and how the result is packed into a file.

"Fake" quantization computes in floating point with values that lie exactly on an integer grid, so that gradients
reach the weights and the scales. The same numbers come out of an integer matrix product followed by one
multiplication with the scales; see `test_a_quantized_layer_is_an_integer_matrix_product`.
"""
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (AttentionInterface, AutoConfig, DeiTForImageClassification,
                          DeiTForImageClassificationWithTeacher, SwinForImageClassification,
                          ViTForImageClassification)

TERNARY = 1.58  # log2(3), the information in one weight of three levels
EDGE_BITS = 8
FORMAT_VERSION = 3
FAMILIES = {family.__name__: family for family in (ViTForImageClassification, DeiTForImageClassification,
                                                   DeiTForImageClassificationWithTeacher, SwinForImageClassification)}


class BadInput(ValueError):
    """Something the user gave cannot be used; the message is one line that names it and the remedy."""


def parse_bits(text):
    """"w4a4" -> (4, 4), "w158a8" -> (1.58, 8): bits of the weights and of the activations."""
    match = re.fullmatch(r"w(158|[2-8])a([2-8])", text)
    if not match:
        raise BadInput(f"bits {text!r}: write wXaY with X one of 158 (ternary), 2, 3, .. 8 and Y one of 2, 3, .. 8, "
                       "for example w4a4 or w158a8")
    weight, activation = match.groups()
    return TERNARY if weight == "158" else int(weight), int(activation)


# -------------------- Quantizers: Eq. (1)-(3)

class RoundSTE(torch.autograd.Function):
    """round() with the gradient of the identity (straight-through estimator, Bengio 2013).

    The true derivative is zero almost everywhere, so nothing below a quantizer would ever learn.
    """

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


round_ste = RoundSTE.apply


def clip(x, low, high):
    """clamp() with gradient one on the closed interval [low, high] and zero outside.

    torch.clamp gives its two ends a gradient of one up to torch 2.13 and of zero from 2.14 on. Here values arrive
    rounded, so the ends are levels like any other: with three levels, all weights but the zeros would stop learning.
    """
    return torch.where(x < low, low, torch.where(x > high, high, x))


def fake_quantize(x, scale, zero_point, bits):
    """Eq. (1): activations, uniform affine. x any shape; scale and zero_point broadcast against it.

    With straight-through rounding, autograd alone yields the gradients of LSQ (Esser 2020) and LSQ+ (Bhalgat 2020):
    inside the range dx^/ds = q - round(z) - x/s and dx^/dz = 0; where x is clipped, q - round(z) and -s.
    """
    x, zero_point = x.to(scale.dtype), round_ste(zero_point)  # bfloat16 would round x / s before round() does
    q = clip(round_ste(x * (1 / scale)) + zero_point, 0, 2 ** bits - 1)
    return scale * (q - zero_point)


def weight_range(bits):
    """The lowest and the highest integer of a weight."""
    return (-1, 1) if bits == TERNARY else (-2 ** (bits - 1), 2 ** (bits - 1) - 1)


def fake_quantize_weight(weight, scale, bits):
    """Eq. (2), and Eq. (3) for bits = TERNARY. weight (O, ...), scale (O, 1, ...): one scale an output channel.

    No zero point: an asymmetric weight grid would add a term that depends on the input to every integer product.
    """
    return scale * clip(round_ste(weight * (1 / scale)), *weight_range(bits))


# Eq. (6) searches these fractions of the largest magnitude. Logarithmic, because a few tokens of a ViT carry massive
# activations: where the maximum is a hundred times the 99.9th percentile, the best range is a few percent of it.
CLIPPING_GRID = torch.logspace(0, -2, 80)
CANDIDATES_AT_ONCE = 8  # of the grid: bounds the memory
# A quantizer looks at no more values than this of its first images: the error of a range is a mean, and 2^17 values
# give it to better than the grid's resolution at a hundredth of the time.
INITIALIZATION_VALUES = 2 ** 17
MASSIVE = 3  # a token of more than so many times the median squared norm counts in Eq. (6) as if it had no more


def sorted_sums(x, importance):
    """Rows of x (R, N), sorted, and the running sums of w and of w x, (2, R, N + 1), in that order; w: importance (R, N)."""
    x, order = x.sort(1)
    x, w = x.double(), importance.gather(1, order).double()
    return x, F.pad(torch.stack([w, w * x]).cumsum(2), (1, 0))  # the sums of the first 0, 1, ... N values


def smallest_error(x, sums, candidates, levels):
    """For each row of x (R, N), the one of K candidates whose quantization error is least.

    x, sums: of `sorted_sums`. candidates: a tuple of tensors (R, K), the arguments of `levels`, which returns the values
    that x^ can take, ascending, (R, K, L). Returns a tuple of (R, 1).

    Rounding takes each x to its nearest level. Were all of them at the highest, v_L, the error sum w (x - v_L)^2 would be
    v_L^2 sum w - 2 v_L sum w x and a term that is the same for all candidates. Those below the middle m of two neighbours
    go from the upper to the lower one, which takes 2 (upper - lower) sum w (m - x) away. So running sums tell the error,
    and a candidate costs as many operations as it has levels, not as there are values.
    """
    candidates = torch.broadcast_tensors(*candidates)
    all_w, all_wx = sums[..., -1:]  # (R, 1) each
    errors = []
    for some in zip(*(values.split(CANDIDATES_AT_ONCE, 1) for values in candidates)):
        v = levels(*some).double()
        middles, highest = (v[..., 1:] + v[..., :-1]) / 2, v[..., -1]
        below = torch.searchsorted(x, middles.flatten(1))  # how many values are, (R, some * (L - 1))
        w, wx = sums.gather(2, below.expand(2, -1, -1)).view(2, *middles.shape)
        errors.append(highest * (highest * all_w - 2 * all_wx) - 2 * (v.diff() * (middles * w - wx)).sum(2))
    best = torch.cat(errors, 1).argmin(1, keepdim=True)
    return tuple(values.gather(1, best) for values in candidates)


def activation_scale(x, importance, bits):
    """Eq. (6) for activations: x (R, N) and the weight of each error (R, N) -> scale and zero point, (R, 1) each.

    Both ends of the range shrink together, then each alone, since GELU and softmax are far from symmetric.
    """
    def scale_and_zero_point(low, high):
        scale = (high - low).clamp_min(1e-8) / (2 ** bits - 1)
        return scale, -low / scale

    def levels(low, high):
        scale, zero_point = scale_and_zero_point(low[..., None], high[..., None])
        return scale * (torch.arange(2 ** bits, device=x.device) - zero_point.round())

    sums = sorted_sums(x, importance)
    # zero stays inside the range: padding and the floor of GELU and softmax are then represented almost exactly
    fractions = CLIPPING_GRID.to(x)
    lowest = fractions * x.amin(1, keepdim=True).clamp_max(0)  # (R, K)
    highest = fractions * x.amax(1, keepdim=True).clamp_min(0)
    low, high = smallest_error(*sums, (lowest, highest), levels)
    low, high = smallest_error(*sums, (low, torch.cat([high, highest], 1)), levels)
    low, high = smallest_error(*sums, (torch.cat([low, lowest], 1), high), levels)
    return scale_and_zero_point(low, high)


def weight_scale(weight, bits):
    """Eq. (6) for weights: (O, ...) -> (O, 1)."""
    rows = weight.flatten(1)
    smallest, largest = weight_range(bits)
    candidates = CLIPPING_GRID.to(rows) * rows.abs().amax(1, keepdim=True).clamp_min(1e-8) / largest  # (O, K)
    return smallest_error(*sorted_sums(rows, torch.ones_like(rows)), (candidates,), lambda scale:
                          scale[..., None] * torch.arange(smallest, largest + 1, device=rows.device))[0]


class ActivationQuantizer(nn.Module):
    """Eq. (1) with its learned scale and zero point: one pair a tensor, or one a head for x (B, heads, T, d).

    The scale is kept as its logarithm: it cannot turn negative, and one step of Adam, whose size does not depend on
    the gradient's, changes every scale of the network by the same fraction.
    """

    def __init__(self, bits, heads=None):
        super().__init__()
        self.bits, self.enabled = bits, True
        shape = () if heads is None else (heads, 1, 1)
        self.log_scale = nn.Parameter(torch.zeros(shape))
        self.zero_point = nn.Parameter(torch.zeros(shape))

    @torch.no_grad()
    def initialize(self, x):
        """Eq. (6) on the values x (..., channels) that arrive here.

        In a ViT a few tokens carry massive activations (Sun 2024): where 2 % of the tokens reach 215 and the rest stay
        below 5, the plain squared error keeps a range of 215, in which the other 98 % are a handful of levels. So the
        error of a massive token is taken relative to that token, which clips the few. That of the others is not: quiet
        tokens would then count as much as those that say something.
        """
        tokens = x.reshape(1, -1, x.shape[-1]) if self.log_scale.dim() == 0 else x.transpose(0, 1).flatten(1, 2)
        norms = tokens.square().sum(2, keepdim=True)  # (1 or heads, tokens, 1)
        importance = 1 / norms.clamp_min(MASSIVE * norms.median(1, keepdim=True).values).clamp_min(1e-8)
        values, importance = tokens.flatten(1), importance.expand_as(tokens).flatten(1)  # (1 or heads, N)
        # a random sample, since a regular stride would always meet the same channels
        keep = torch.randint(values.shape[1], (INITIALIZATION_VALUES // len(values),)) if values.numel() > \
            INITIALIZATION_VALUES else torch.arange(values.shape[1])
        keep = keep.to(values.device)
        scale, zero_point = activation_scale(values[:, keep], importance[:, keep], self.bits)
        self.log_scale.copy_(scale.log().view_as(self.log_scale))
        self.zero_point.copy_(zero_point.view_as(self.zero_point))

    def forward(self, x):
        if not self.enabled:
            return x
        return fake_quantize(x, self.log_scale.exp(), self.zero_point, self.bits)


# -------------------- Layers: Eq. (2)-(5)

class QuantWeight:
    """What QuantLinear and QuantConv2d share: a weight with a learned scale an output channel, and a quantized input.

    Eq. (5), W = W_0 + dW, needs no code of its own: `weight` starts as the pretrained W_0 and is trained itself.
    """

    def fit(self, layer, weight_bits, input_quantizer, log_r=None):
        """Take over the weights of the floating-point `layer`.

        A layer that reads a RescaledLayerNorm shares that one's log_r, and has no input_quantizer, since there the
        input comes quantized.
        """
        self.load_state_dict(layer.state_dict())
        self.weight_bits, self.input_quantizer, self.enabled = weight_bits, input_quantizer, True
        self.weight_log_scale = nn.Parameter(torch.zeros(len(self.weight), *[1] * (self.weight.dim() - 1)))
        self.register_parameter("log_r", log_r)
        self.quantized_share = None  # while ternary weights fade in: a number from 0 to 1, else all is quantized
        return self

    def rescaled_weight(self):
        """The right-hand factor of Eq. (4), W diag(r)."""
        return self.weight if self.log_r is None else self.weight * self.log_r.exp()

    @torch.no_grad()
    def initialize(self):
        scale = weight_scale(self.rescaled_weight(), self.weight_bits)
        self.weight_log_scale.copy_(scale.log().view_as(self.weight_log_scale))

    def effective_weight(self):
        """The weight that the forward uses: quantized by Eq. (2) or (3), after the rescaling of Eq. (4)."""
        weight = self.rescaled_weight()
        if not self.enabled:
            return weight
        quantized = fake_quantize_weight(weight, self.weight_log_scale.exp(), self.weight_bits)
        return quantized if self.quantized_share is None else torch.lerp(weight, quantized, self.quantized_share)

    @torch.no_grad()
    def fold(self):
        if self.log_r is not None:
            self.weight.copy_(self.rescaled_weight())
            self.log_r = None

    @torch.no_grad()
    def integers(self):
        """The integers of Eq. (2) or (3), int8, shaped as the weight. Only after `fold`."""
        # as the forward rounds: W / s and W (1 / s) may lie on two sides of a half
        return clip((self.weight * (1 / self.weight_log_scale.exp())).round(), *weight_range(self.weight_bits)).char()

    @torch.no_grad()
    def set_integers(self, q):
        # s q lies on the grid, so rounding it again in the forward returns exactly s q
        self.weight.copy_(self.weight_log_scale.exp() * q)


class QuantLinear(QuantWeight, nn.Linear):
    """y = Q(x) W^^T + b. x (..., in), y (..., out). An nn.Linear still, as transformers reads its `weight`."""

    def __init__(self, linear, *args):
        nn.Linear.__init__(self, linear.in_features, linear.out_features, linear.bias is not None)
        self.fit(linear, *args)

    def forward(self, x):
        x = x if self.input_quantizer is None else self.input_quantizer(x)
        return F.linear(x, self.effective_weight(), self.bias)


class QuantConv2d(QuantWeight, nn.Conv2d):
    """The patch embedding: a convolution whose stride is its kernel, so a linear layer on pixels."""

    def __init__(self, conv, *args):
        nn.Conv2d.__init__(self, conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
                           bias=conv.bias is not None)
        self.fit(conv, *args)

    def forward(self, x):
        # written as that linear layer: for convolutions of this shape there are only slow kernels
        side = self.stride[0]
        patches = self.input_quantizer(x).unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (B, 3, rows, p, columns, p)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, rows, columns, 3 p p)
        return F.linear(patches, self.effective_weight().flatten(1), self.bias).permute(0, 3, 1, 2)


class RescaledLayerNorm(nn.LayerNorm):
    """The left-hand factor of Eq. (4), LN(x) / r, with r = exp(log_r) > 0 learned, (channels,); then Eq. (1).

    The channels of a LayerNorm's output differ in range by a factor of a hundred, and one scale must cover them all:
    without r the quiet channels round to zero. The layers that read this output multiply r back into their weights.
    The output is quantized here, once for all its readers (q, k and v), as an integer engine would.
    """

    def __init__(self, norm, output_quantizer):
        super().__init__(norm.normalized_shape, norm.eps)
        self.load_state_dict(norm.state_dict())
        self.log_r = nn.Parameter(torch.zeros_like(norm.weight))
        self.output_quantizer = output_quantizer

    def forward(self, x):
        shrink = 1.0 if self.log_r is None else (-self.log_r).exp()
        return self.output_quantizer(F.layer_norm(x, self.normalized_shape, self.weight * shrink, self.bias * shrink,
                                                  self.eps))

    @torch.no_grad()
    def fold(self):
        if self.log_r is not None:
            self.weight.mul_((-self.log_r).exp())
            self.bias.mul_((-self.log_r).exp())
            self.log_r = None


def quantized_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Eq. (8). query, key, value (B, heads, T, d); attention_mask added to the scores, or None (Swin's relative
    position bias and window mask come in there). Returns (B, T, heads, d) and None, as transformers expects.

    Both operands of both products are quantized; the left one of the second are the probabilities before they are divided
    by their sum. A query that looks at one token has a probability near 1, one that looks at all 197 has none above 0.01:
    a scale that covers the one rounds the other to nothing. Relative to the largest of their row, both reach 1. The
    division is one factor a row of the result, as in kernels that never hold a whole row (FlashAttention, Dao 2022).
    """
    # Keys that nobody looks at, up to a multiple of 8: GPUs multiply matrices with rows of 197 numbers at a third of the speed.
    tokens = key.shape[-2]
    key, value = (F.pad(x, (0, 0, 0, -tokens % 8)) for x in (module.key_quantizer(key), module.value_quantizer(value)))
    scores = (module.query_quantizer(query) @ key.transpose(-1, -2)).float() * scaling  # (B, heads, T, T or a little more)
    if attention_mask is not None:
        scores = scores + F.pad(attention_mask, (0, -tokens % 8))
    scores = torch.where(torch.arange(key.shape[-2], device=key.device) < tokens, scores, -torch.inf)
    # The gradient passes through the maximum too: the largest, 1 whatever its score, gains only by what the others lose.
    relative = (scores - scores.amax(-1, keepdim=True)).exp()  # probabilities, the largest of a row being 1
    output = module.probability_quantizer(relative) @ value / relative.sum(-1, keepdim=True)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register("vitq", quantized_attention)


# -------------------- A whole network

def blocks(model):
    """The transformer blocks in the order in which they run (ViTLayer, DeiTLayer or SwinLayer)."""
    return [module for module in model.modules() if hasattr(module, "layernorm_before")]


class Blocks:
    """Collects h_l, the output of every transformer block, during a model's forward."""

    def __init__(self, model):
        self.outputs = []
        self.handles = [block.register_forward_hook(self.collect) for block in blocks(model)]

    def collect(self, block, inputs, output):
        self.outputs.append(output[0] if isinstance(output, tuple) else output)  # (B, tokens, channels)

    def take(self):
        outputs, self.outputs = self.outputs, []
        return outputs

    def remove(self):
        for handle in self.handles:
            handle.remove()


def quantize_modules(model, bits, edge_bits=EDGE_BITS):
    """Put the fake-quant modules into `model`, in place; the scales are still to be set by `initialize`.

    bits such as "w4a4"; edge_bits 8, or "same" to give the patch embedding and the head the bits of the rest.
    Raises BadInput for another architecture than ViT, DeiT and Swin for image classification.
    """
    if type(model).__name__ not in FAMILIES:
        raise BadInput(f"{type(model).__name__}: only {', '.join(FAMILIES)} can be quantized")
    weight_bits, activation_bits = parse_bits(bits)
    edge_weight, edge_activation = (weight_bits, activation_bits) if edge_bits == "same" else (edge_bits, edge_bits)

    def replace(parent, name, weight_bits, activation_bits):
        setattr(parent, name, QuantLinear(getattr(parent, name), weight_bits, ActivationQuantizer(activation_bits)))

    def rescale(owner, norm_name, parent, names):
        """The LayerNorm and the linear layers that read it, Eq. (4)."""
        norm = RescaledLayerNorm(getattr(owner, norm_name), ActivationQuantizer(activation_bits))
        setattr(owner, norm_name, norm)
        for name in names:
            setattr(parent, name, QuantLinear(getattr(parent, name), weight_bits, None, norm.log_r))

    for block in blocks(model):
        attention, mlp = block.attention, block.mlp
        rescale(block, "layernorm_before", attention, ("q_proj", "k_proj", "v_proj"))
        # each head is a product of its own and has a range of its own: a scale a head
        for operand in ("query", "key", "value", "probability"):
            setattr(attention, f"{operand}_quantizer", ActivationQuantizer(activation_bits,
                                                                           attention.num_attention_heads))
        rescale(block, "layernorm_after", mlp, ("fc1",))
        replace(attention, "o_proj", weight_bits, activation_bits)
        replace(mlp, "fc2", weight_bits, activation_bits)
    for merging in [module for module in model.modules() if hasattr(module, "reduction")]:  # Swin, between stages
        rescale(merging, "norm", merging, ("reduction",))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Conv2d:  # the patch embedding; its input, the image, is 8-bit to begin with
                setattr(parent, name, QuantConv2d(child, edge_weight, ActivationQuantizer(8)))
            elif type(child) is nn.Linear:  # the head, or the two heads of a distilled DeiT
                replace(parent, name, edge_weight, edge_activation)
    model.set_attn_implementation("vitq")
    return model.eval()


def modules_of(model, kind):
    """Names and modules of one kind, in the order in which they are registered."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]


def enable(model, enabled):
    """Turn rounding and clipping on or off. Off, the model computes in full precision, rescaling of Eq. (4) included."""
    for _, module in modules_of(model, (ActivationQuantizer, QuantWeight)):
        module.enabled = enabled


@torch.no_grad()
def initialize(model, pixels):
    """Set r by Eq. (7) and centre the channels, then set every scale and zero point by Eq. (6), on `pixels` (32, 3, H, W),
    normalized."""
    enable(model, False)
    outputs = {}  # LayerNorm -> its output x, (32, positions, channels)
    handles = [norm.register_forward_hook(lambda norm, _, output: outputs.__setitem__(norm, output))
               for _, norm in modules_of(model, RescaledLayerNorm)]
    model(pixels)
    for handle in handles:
        handle.remove()
    for norm, x in outputs.items():
        mean = x.flatten(0, -2).mean(0)
        # Of all positions, the one where a channel is largest: the class token, one of 197 and the one that the head reads, is
        # large in other channels than the patches, and a mean over all tokens would not see it.
        spread = (x - mean).square().mean(0).sqrt().flatten(0, -2).amax(0)
        readers = [layer for _, layer in modules_of(model, QuantLinear) if layer.log_r is norm.log_r]
        rms = torch.cat([layer.weight for layer in readers]).square().mean(0).sqrt()
        # Eq. (7): x_c / r_c and r_c W_oc are then as large: neither side carries the whole spread of the channels
        log_r = 0.5 * (spread.clamp_min(1e-5).log() - rms.clamp_min(1e-5).log())
        norm.log_r.copy_(log_r - log_r.mean())
        # Channels are centred, since one zero point must serve them all: W x + b = W (x - mean) + (b + W mean).
        if all(layer.bias is not None for layer in readers):  # Swin's patch merging has none to take W mean up
            norm.bias.sub_(mean)
            for layer in readers:
                layer.bias.add_(layer.weight @ mean)

    handles = [quantizer.register_forward_pre_hook(lambda quantizer, inputs: quantizer.initialize(inputs[0]))
               for _, quantizer in modules_of(model, ActivationQuantizer)]
    model(pixels)
    for handle in handles:
        handle.remove()
    for _, layer in modules_of(model, QuantWeight):
        layer.initialize()
    enable(model, True)
    return model


def fold(model):
    """Eq. (4): move r into the LayerNorms and the weights for good, so that it costs nothing at inference."""
    for _, module in modules_of(model, (QuantWeight, RescaledLayerNorm)):
        module.fold()
    return model


# -------------------- The packed checkpoint

POWERS_OF_3 = np.array([1, 3, 9, 27, 81], dtype=np.uint8)


def pack(q, bits):
    """Integers of `weight_range(bits)`, any shape -> a flat uint8 tensor.

    Ternary: five weights a byte, as the digits of a number in base 3 (3^5 = 243 of 256 values: 1.6 bits a weight).
    Otherwise: `bits` bits a weight, least significant first, without gaps; the last byte is filled with zeros.
    """
    unsigned = (q.numpy().ravel().astype(np.int16) - weight_range(bits)[0]).astype(np.uint8)  # from 0 upwards
    if bits == TERNARY:
        unsigned = np.pad(unsigned, (0, -len(unsigned) % 5)).reshape(-1, 5)
        return torch.from_numpy((unsigned * POWERS_OF_3).sum(1, dtype=np.uint8))
    binary = np.unpackbits(unsigned[:, None], axis=1, count=bits, bitorder="little")  # (weights, bits)
    return torch.from_numpy(np.packbits(binary, bitorder="little"))


def unpack(packed, bits, shape):
    """The inverse of `pack`: int8 integers of the given shape."""
    count = int(np.prod(shape))
    if bits == TERNARY:
        unsigned = (packed.numpy()[:, None] // POWERS_OF_3 % 3).ravel()[:count]
    else:
        binary = np.unpackbits(packed.numpy(), count=count * bits, bitorder="little").reshape(count, bits)
        unsigned = np.packbits(binary, axis=1, bitorder="little").ravel()
    return torch.from_numpy((unsigned.astype(np.int16) + weight_range(bits)[0]).astype(np.int8)).view(*shape)


def save_quantized(model, folder, bits, edge_bits, about, metrics=None):
    """Write a folded model to `folder`: model.safetensors, config.json, and metrics.json if there are metrics.

    `about` is a dictionary stored beside the network's own configuration (source, preprocessing).
    The folder appears whole or not at all. An older result there is replaced; anything else raises BadInput.
    Returns the size of model.safetensors in bytes.
    """
    check_output(folder)
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    for name, layer in modules_of(model, QuantWeight):
        tensors[f"{name}.weight"] = pack(layer.integers().cpu(), layer.weight_bits)
    config = {"format": "vitq", "version": FORMAT_VERSION, "bits": bits, "edge_bits": edge_bits, **about,
              "architecture": type(model).__name__, "network": model.config.to_dict()}
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        save_file(tensors, aside / "model.safetensors")
        (aside / "config.json").write_text(json.dumps(config, indent=1))
        size = (aside / "model.safetensors").stat().st_size
        if metrics is not None:
            (aside / "metrics.json").write_text(json.dumps({**metrics, "packed_mb": size / 1e6}, indent=1))
        aside.chmod(0o755)  # mkdtemp made it private
        retired = Path(f"{aside}.old")
        if folder.exists():
            os.rename(folder, retired)
        os.rename(aside, folder)
        shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return size


def check_output(folder):
    """Raise BadInput if `folder` cannot be written, or holds something else than an earlier result."""
    folder = Path(folder)
    if folder.exists() and not is_quantized(folder):
        raise BadInput(f"{folder}: exists and is not a quantized model; it is left alone, name another folder")
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise BadInput(f"{folder}: {parent} is not a folder that can be written to; name another one with --out")


def is_quantized(folder):
    """Whether `folder` was written by `save_quantized`, of whatever version."""
    try:
        return json.loads((Path(folder) / "config.json").read_text()).get("format") == "vitq"
    except (OSError, ValueError, AttributeError):
        return False


def load_quantized(folder):
    """A model from a folder of `save_quantized`, needing no other file and no network, and its config dictionary.

    Raises BadInput for another format version and for a file that is damaged or cut short.
    """
    config = json.loads((Path(folder) / "config.json").read_text())
    if config.get("version") != FORMAT_VERSION:
        raise BadInput(f"{folder}: format version {config.get('version')}, but this code reads version {FORMAT_VERSION}; "
                       "quantize the model again")
    try:
        network = AutoConfig.for_model(**config["network"])
        model = fold(quantize_modules(FAMILIES[config["architecture"]](network), config["bits"], config["edge_bits"]))
        tensors = load_file(Path(folder) / "model.safetensors")
        layers = modules_of(model, QuantWeight)
        packed = {name: tensors.pop(f"{name}.weight") for name, _ in layers}
        model.load_state_dict({**tensors, **{f"{name}.weight": layer.weight for name, layer in layers}})
        for name, layer in layers:
            layer.set_integers(unpack(packed[name], layer.weight_bits, layer.weight.shape))
    except (OSError, SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(f"{folder}: the quantized model is damaged or cut short ({reason}); quantize it again") from error
    return model.eval(), config
