"""From fake to real integers: a quantized model as one ONNX file that every engine reads.

    python export.py --model quantized/vit_t-w4a8                        # writes model.onnx there
    python export.py --model quantized/vit_t-w4a8 --data imagenet/val    # and compares with torch

Every linear layer and both products of attention become integer products, with the scales and zero
points as they were trained; LayerNorm, softmax, GELU and the residual additions stay in float32.

In the file, each product is a MatMul of two operands that are quantized and dequantized again:

    x -> QuantizeLinear -> Clip -> DequantizeLinear -> MatMul <- DequantizeLinear <- weights, int8

These are operators of ONNX itself. Taken literally, they are the fake quantization of vitq.py. An
engine that knows the pattern moves the scales behind the product, s_a (a - z_a) s_b (b - z_b) =
s_a s_b (a - z_a) (b - z_b), and adds products of 8-bit integers in 32 bits. ONNX Runtime does so
for all products. OpenVINO does so for the linear layers; a product of two activations stays in
float32 there, unless both zero points are 0, and q, k and v have either sign.

Integers of fewer than 8 bits take a byte each, because CPUs have no narrower products: they make
the file smaller only once it is compressed. Its metadata tell how to call it, see README.
"""
import copy
import json
from pathlib import Path

import numpy as np
import torch
from onnx.helper import set_model_props
from onnxruntime import InferenceSession
from torch import nn
from torch.onnx.ops import symbolic
from transformers import AttentionInterface

from checkpoints import load_result, require, write_whole
from eval import Parser, decode, list_images, run
from vitq import ActivationQuantizer, QuantWeight, modules_of

OPSET = 20  # the first with GELU as one operator; older engines refuse later ones
LARGEST = 2e9  # bytes of weights: protobuf, the format of an ONNX file, ends at 2^31


# -------------------- A network in integers

def dequantize(q, scale, zero_point, **axis):
    """DequantizeLinear, s (q - z): integers q, any shape -> float32. z may be None, for 0.

    With an axis, scale and zero_point have one number for each position along it.
    """
    return symbolic("DequantizeLinear", (q, scale, zero_point), axis, dtype=torch.float32,
                    shape=q.shape)


class IntegerQuantizer(nn.Module):
    """An ActivationQuantizer as ONNX operators: x -> q in uint8 -> s (q - z) in float32."""

    def __init__(self, quantizer):
        super().__init__()
        self.top = 2 ** quantizer.bits - 1
        # as constants: the exporter's own exp differs in the last digit
        self.register_buffer("scale", quantizer.log_scale.exp())
        self.register_buffer("zero_point", quantizer.zero_point.round().clamp(0, self.top).byte())

    def forward(self, x, factor=1):
        """Eq. (1), times `factor`. QuantizeLinear clips to [0, 255]; fewer bits need a Clip."""
        q = symbolic("QuantizeLinear", (x, self.scale, self.zero_point), dtype=torch.uint8,
                     shape=x.shape)
        q = q.clamp(0, self.top) if self.top < 255 else q  # of bytes, four times as fast as of x
        return dequantize(q, self.scale * factor, self.zero_point)


class IntegerLinear(nn.Module):
    """A QuantLinear, or a QuantConv2d as the product with each patch, as ONNX operators.

    Weights of 7 bits or fewer are int8, those of 8 bits uint8 with zero point 128. The reason is
    CPUs with AVX2 but not VNNI: for activations in uint8 and weights in int8, they add pairs of
    products in 16 bits, which 2 x 255 x 127 overflows and 2 x 255 x 64 does not; for weights in
    uint8, in 32 bits. With VNNI, int8 would be right at 8 bits, too, and faster. One file cannot
    have both: the engine chooses its instructions by the type that the file gives.
    """

    def __init__(self, layer):
        super().__init__()
        q, scale = layer.quantized_weight()
        q, few = q.flatten(1).T.contiguous(), layer.weight_bits < 8  # (in, out)
        self.register_buffer("q", q.char() if few else (q + 128).byte())
        self.register_buffer("zero_point", None if few else torch.full_like(scale, 128).byte())
        self.register_buffer("weight", scale)  # so called because transformers asks for its type
        # Of a product with a bias (out,), ONNX Runtime makes a Gemm, which would stay in float32;
        # of three dimensions it cannot.
        self.register_buffer("bias", None if layer.bias is None else layer.bias.view(1, 1, -1))
        self.patch = layer.kernel_size if isinstance(layer, nn.Conv2d) else None
        self.input_quantizer = IntegerQuantizer(layer.input_quantizer)

    def forward(self, x):
        """x (B, T, in) -> (B, T, out), (B, in) -> (B, out), or images as an nn.Conv2d."""
        if x.dim() == 2:  # the head's, once more because of the Gemm
            return self(x[:, None])[:, 0]
        if self.patch:  # (B, 3, H, W) -> (B, rows, columns, 3 x height x width of a patch)
            (rows, h), (columns, w) = ((side // p, p) for side, p in zip(x.shape[2:], self.patch))
            x = x[:, :, :rows * h, :columns * w].reshape(-1, x.shape[1], rows, h, columns, w)
            x = x.permute(0, 2, 4, 1, 3, 5).flatten(3)
        y = self.input_quantizer(x) @ dequantize(self.q, self.weight, self.zero_point, axis=1)
        y = y if self.bias is None else y + self.bias
        return y.permute(0, 3, 1, 2) if self.patch else y


def integer_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Eq. (8) in integers, for arguments and results as of `vitq.quantized_attention`. [ours]"""
    a = module.query_quantizer(query) @ module.key_quantizer(key.transpose(-1, -2), scaling)
    a = a if attention_mask is None else a + attention_mask
    e = (a - a.amax(-1, keepdim=True)).exp()
    o = module.exp_quantizer(e) @ module.value_quantizer(value) / e.sum(-1, keepdim=True)
    return o.transpose(1, 2), None


AttentionInterface.register("vitq_integers", integer_attention)


def integer_network(model):
    """Put the integer layers and attention into a model of `checkpoints.load_result`, in place."""
    for name, layer in modules_of(model, QuantWeight):
        model.set_submodule(name, IntegerLinear(layer))
    for name, quantizer in modules_of(model, ActivationQuantizer):  # of attention
        model.set_submodule(name, IntegerQuantizer(quantizer))
    model.set_attn_implementation("vitq_integers")
    return model


# -------------------- The file

def to_onnx(model):
    """The ONNX model of a network: pixel_values (B, 3, H, W) -> logits (B, classes)."""
    side = model.config.image_size
    proto = torch.onnx.export(
        model.eval().requires_grad_(False), (torch.zeros(2, 3, side, side),), verbose=False,
        opset_version=OPSET, input_names=["pixel_values"], output_names=["logits"],
        dynamic_shapes=({0: "batch"},)).model_proto
    del proto.graph.output[1:]  # of a distilled DeiT, those of its two heads
    del proto.graph.value_info[:]  # the exporter's notes, larger than a small network's weights
    for node in proto.graph.node:
        del node.metadata_props[:]
    return proto


def describe(proto, classifier, config):
    """Store in an ONNX model's metadata, as JSON texts, how to call it and what its logits mean.

    resize, crop, interpolation, mean, std and rounds are those of `checkpoints.Preprocessing`.
    """
    about = {"class_names": classifier.class_names, "bits": config["bits"],
             "edge_bits": config["edge_bits"], **vars(classifier.preprocessing)}
    set_model_props(proto, {name: json.dumps(value) for name, value in about.items()})
    return proto


# -------------------- Command line

def agreement(proto, classifier, paths):
    """Whether ONNX Runtime and torch give an image the same first class, for each that is read.

    The integer products are equal, but LayerNorm, softmax and GELU differ in the last digit from
    one engine, or version, to the next. A value halfway between two levels may then round the
    other way, which later layers amplify, the more so the fewer levels there are.
    """
    session = InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    normalize = classifier.preprocessing.normalizer(torch.device("cpu"))
    for _, pixels in decode(paths, classifier.preprocessing.pixels(), "comparing"):
        for batch in normalize(pixels).split(32):
            logits, = session.run(None, {"pixel_values": batch.numpy()})  # (B, classes)
            yield from logits.argmax(1) == classifier.model(batch).logits.numpy().argmax(1)


def parser():
    parser = Parser(__doc__, device=False)
    parser.add_argument("--model", required=True, help="a folder of quantize.py")
    parser.add_argument("--data", metavar="DIR", help="images, to compare with torch")
    return parser


def main():
    args = parser().parse_args()
    paths = list_images(args.data) if args.data else []
    classifier, config = load_result(args.model)
    network, path = integer_network(copy.deepcopy(classifier.model)), Path(args.model, "model.onnx")
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    require(size < LARGEST, args.model, f"{size / 1e9:.1f} GB in 8-bit integers, of which an ONNX "
            "file holds 2", "export a smaller model")
    proto = describe(to_onnx(network), classifier, config)
    write_whole(path, proto.SerializeToString())
    print(f"{path}: {proto.ByteSize() / 1e6:.2f} MB")
    if paths:
        same = [*agreement(proto, classifier, paths)]
        print(f"{100 * np.mean(same):.2f} % of {len(same)} images get the first class torch gives")


if __name__ == "__main__":
    run(main)
