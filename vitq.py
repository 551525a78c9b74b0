"""The fake-quant module set: Eq. (1)-(8), as modules that go into a Hugging Face ViT, DeiT or Swin.

From top to bottom: the quantizers and their first scales, the layers built from them, attention,
and how a pretrained network is fitted with all of it.

"Fake" quantization computes with integers that are held in floating point, so that gradients reach
the weights and the scales. Each layer is written as the integer product that a device would run.

The numbers of the equations are this repository's own. [paper] marks what the paper's abstract and
published summaries state; [ours] marks a form or a constant that was chosen here.
"""
import re
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import AttentionInterface

TERNARY = 1.58  # log2(3): the information in a weight of three levels
FAMILIES = {name: getattr(transformers, name) for name in (
    "ViTForImageClassification", "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher", "SwinForImageClassification")}


def parse_bits(text):
    """"w4a4" -> (4, 4), "w158a8" -> (1.58, 8): bits of the weights and of the activations.
    Raises ValueError."""
    match = re.fullmatch(r"w(158|[2-8])a([2-8])", text)
    if not match:
        raise ValueError(f"bits {text!r}: not wXaY, X: 158 (ternary) or 2..8; Y: 2..8; as in w4a4")
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

    torch.clamp's gradient at the two ends depends on the version, and is zero in recent ones. The
    values that arrive here are rounded, so the ends are levels like any other: without their
    gradient, only those ternary weights that are zero would go on learning.
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

    Five numbers at 2 bits, with s = 0.5 and z = 1, so that the four levels are -0.5, 0, 0.5, 1:

        x      -1.3   -0.2    0.3    0.9    2.0
        q         0      1      2      3      3
        x^     -0.5      0    0.5      1      1

    "Differentiable uniform quantization" is [paper]; affine and per tensor is [ours]. With
    straight-through rounding, autograd yields the gradients of LSQ (Esser 2020) and LSQ+
    (Bhalgat 2020):

        d x^ / d s  = (q - z) - x / s  for levels inside the range: how far rounding moved x
                    = q - z            for clipped ones: the level of the end, here -1 or 2
        d x^ / d z' = 0                inside
                    = -s               clipped

    Clipping comes after rounding and therefore begins half a level further out than in LSQ.
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


# -------------------- First scales: Eq. (6)

# The fractions of the full range that are tried, from 102 to 1 %. Logarithmic, because a few
# tokens of a ViT carry massive activations (Sun 2024): in block 7 of a ViT-Ti, the input of fc2
# reaches 215, while 99.9 % of its values are below 2.5. The first fraction exceeds 1, for images:
# with a mean of 0.5, a range that ends at black and white would put each pixel halfway between two
# levels.
CLIPPING_GRID = torch.logspace(0.01, -2, 40)
SAMPLE = 2 ** 15  # values of a tensor that Eq. (6) looks at
MASSIVE = 3  # a token is massive if its squared norm exceeds this many medians


def error_weights(x):
    """u of Eq. (6), which broadcasts against x. [ours]

    For the input (B, T, C) or (B, C) of a linear layer, the error of a massive token is divided by
    its squared norm, and that of the others by a constant: u = 1 / max(||x_t||^2, 3 median). With
    u = 1, the range would follow the few massive tokens and leave all others a handful of levels.
    For an image and attention's operands, (B, ., ., .), u = 1.
    """
    if x.dim() == 4:
        return torch.ones_like(x)
    norms = x.square().sum(-1, keepdim=True)
    return 1 / norms.clamp_min(MASSIVE * norms.median()).clamp_min(1e-8)


def scale_and_zero_point(low, high, bits):
    """s and z of a range [low, high] that holds zero."""
    scale = (high - low).clamp_min(1e-8) / (2 ** bits - 1)
    return scale, -low / scale


def activation_scale(x, u, bits):
    """Eq. (6), activations: s, z = argmin over clipping ranges of sum u (x - x^)^2. [ours]

    x, u (N,) -> scale and zero point, (1,) each. Both ends of the range shrink together, then each
    of them alone, since the output of GELU is far from symmetric.
    """
    def best(low, high):  # of K ranges, (K, 1) each
        x_q = fake_quantize(x, *scale_and_zero_point(low, high, bits), bits)
        return (u * (x - x_q).square()).sum(1).argmin()

    fractions = CLIPPING_GRID.to(x)[:, None]
    # Zero stays inside the range, so that it is a level: Swin pads with it, and most outputs of
    # GELU are close to it.
    lows, highs = fractions * x.min().clamp_max(0), fractions * x.max().clamp_min(0)  # (K, 1)
    low = lows[best(lows, highs)]
    high = highs[best(low, highs)]
    low = lows[best(lows, high)]
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

    What is learned is log s: s cannot turn negative, and a step of Adam, whose size does not depend
    on the size of the gradient, changes all scales of the network by the same fraction.
    """

    def __init__(self, bits):
        super().__init__()
        self.bits, self.enabled = bits, True
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.zero_point = nn.Parameter(torch.zeros(()))

    def initialize(self, x):
        """Eq. (6) on a random sample of the values x."""
        index = torch.randint(x.numel(), (SAMPLE,)).to(x.device)
        x, u = x.flatten()[index], error_weights(x).expand_as(x).flatten()[index]
        scale, zero_point = activation_scale(x, u, self.bits)
        self.log_scale.copy_(scale.log().squeeze())
        self.zero_point.copy_(zero_point.squeeze())

    def forward(self, x):
        """x, any shape -> the integers q - z, held in floating point, and the scale s."""
        scale = self.log_scale.exp()
        if not self.enabled:
            return x / scale, scale
        # Both are expanded to one number per row. Under autocast, a single number would leave the
        # division in x's bfloat16, too coarse for 8 bits; and the fused kernel of the backward pass
        # can sum the gradient row by row.
        s, z = [number.expand(*x.shape[:-1], 1) for number in (scale, self.zero_point)]
        return quantize_activation(x, s, z, self.bits), scale


# -------------------- Layers: Eq. (2)-(5)

class RescaledLayerNorm(nn.LayerNorm):
    """Eq. (4): LN(x) W^T = (LN(x) / r) (W diag(r))^T; this is the left-hand factor.

    "Channel-wise rescaling" is [paper]; where it stands, and r = exp(log_r) > 0, (channels,), is
    [ours]. The channels of a LayerNorm's output differ widely in range, and one scale must cover
    them all: without r, the quiet channels round to zero. It stands behind the LayerNorms of the
    blocks and of patch merging, since there 1 / r can be folded into the LayerNorm's own weight and
    bias and costs nothing later. GELU, before fc2, is no linear map that it could pass through.
    """

    def __init__(self, norm):
        super().__init__(norm.normalized_shape, norm.eps)
        self.load_state_dict(norm.state_dict())
        self.log_r = nn.Parameter(torch.zeros_like(norm.weight))

    def forward(self, x):
        y = super().forward(x)
        return y if self.log_r is None else y / self.log_r.exp()


class QuantWeight:
    """What QuantLinear and QuantConv2d share: a weight with a learned scale per output channel.

    Eq. (5): W = W_0 + dW, dW = 0 at the start. "Weight refinement" is [paper]. It needs no code of
    its own: `weight` starts as the pretrained W_0 and is trained itself. [ours]
    """
    fade = None  # t of quantize.py's `fade_in`, from 0 to 1 while ternary weights fade in

    def rescaled_weight(self):
        """The right-hand factor of Eq. (4), W diag(r)."""
        return self.weight if self.log_r is None else self.weight * self.log_r.exp()

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
    """y = s_x s_w (q_x q_w^T) + b: an integer product, then one factor per output channel.

    x (..., in) -> y (..., out); q_x is the q - z of Eq. (1). Still an nn.Linear, because
    transformers reads its `weight`.
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


# -------------------- Attention: Eq. (8)

def quantized_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Eq. (8): y = Q(e) Q(v) / sum e, e = exp(a - max a), a = Q(q) Q(k)^T / sqrt(d) + bias. [ours]

    query, key, value (B, heads, T, d); attention_mask, which is added to the scores, holds Swin's
    relative position bias and window mask, or is None. Returns (B, T, heads, d), and None, which
    transformers expects. One function serves all three families.

    Both operands of both products are quantized, with one scale per tensor. The softmax is
    quantized before its division. A query that looks at one token has a probability near 1; one
    that looks at all 197 has none above 0.01, and a scale that covers the first rounds the second
    to nothing. Relative to the largest of their row, both reach the highest level. In effect each
    row has a scale of its own, computed at run time. Methods that quantize the softmax's output do
    not have it: mind that in a comparison.
    """
    (q_q, s_q), (q_k, s_k) = module.query_quantizer(query), module.key_quantizer(key)
    a = s_q * (s_k * scaling) * (q_q @ q_k.transpose(-1, -2)).float()  # (B, heads, T, T)
    if attention_mask is not None:
        a = a + attention_mask
    # The maximum is not detached: the largest e of a row is always 1, so its score has a gradient
    # only as the maximum that is subtracted from all the other scores.
    e = (a - a.amax(-1, keepdim=True)).exp()
    (q_e, s_e), (q_v, s_v) = module.exp_quantizer(e), module.value_quantizer(value)
    y = s_e * s_v * (q_e @ q_v).float() / e.sum(-1, keepdim=True)  # (B, heads, T, d)
    return y.transpose(1, 2).contiguous(), None


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

    bits such as "w4a4"; edge_bits 8, or "same": patch embedding and head have the bits of the rest,
    but for the image, which always has 8.
    No parameter requires gradients, until a training asks for them.
    Raises ValueError for another architecture than ViT, DeiT and Swin for image classification.
    """
    if type(model).__name__ not in FAMILIES:
        raise ValueError(f"{type(model).__name__}: give one of {', '.join(FAMILIES)}")
    weight_bits, activation_bits = parse_bits(bits)
    edge = (weight_bits, activation_bits) if edge_bits == "same" else 2 * (int(edge_bits),)

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
    """Eq. (7): r_c = sqrt(spread of channel c / rms of W's column c), geometric mean 1. [ours]

    x: a LayerNorm's output, (images, positions, channels); weights: of the layers that read it,
    (out, channels) each. Returns log r. Spread: the rms over images, at the position where it is
    largest. x_c / r_c and r_c W_oc are then proportional over the channels c: neither side carries
    the whole difference between them.
    """
    # The class token, one of 197, is large in other channels than the patches: a mean over
    # positions would miss it.
    spread = x.square().mean(0).sqrt().amax(0)
    rms = torch.cat(weights).square().mean(0).sqrt()
    log_r = 0.5 * (spread.clamp_min(1e-5).log() - rms.clamp_min(1e-5).log())
    return log_r - log_r.mean()


def initialize(model, pixels):
    """Eq. (7) and (6), in the order in which the network runs, on `pixels` (32, 3, H, W).

    32 images, and all that is done with them, are [ours].
    """
    enable(model, False)
    layers = [layer for _, layer in modules_of(model, QuantLinear)]
    waiting = {quantizer for _, quantizer in modules_of(model, ActivationQuantizer)}

    def set_r(norm, inputs, x):
        readers = [layer.weight for layer in layers if layer.log_r is norm.log_r]
        norm.log_r.copy_(first_rescaling(x, readers))
        return x * (-norm.log_r).exp()

    def set_scale(quantizer, inputs):
        if quantizer in waiting:  # it runs three times where q, k and v share it
            waiting.remove(quantizer)
            quantizer.initialize(*inputs)

    with ExitStack() as hooks:
        for _, norm in modules_of(model, RescaledLayerNorm):
            hooks.enter_context(norm.register_forward_hook(set_r))
        for _, quantizer in modules_of(model, ActivationQuantizer):
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
