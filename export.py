"""From fake to real integers: a quantized model as an ONNX file for ONNX Runtime on a CPU.

    python export.py --model quantized/vit_t-w4a8                        # writes model.onnx there
    python export.py --model quantized/vit_t-w4a8 --data imagenet/val    # and compares with torch

Every linear layer and both products of attention become integer products, with the zero points and
scales as they were trained; LayerNorm, softmax, GELU and the residual additions stay in float32.
The command prints size and time per picture, beside the network in float32 exported in the same
way. OMP_NUM_THREADS=1 gives both one thread.
"""
import copy
import time
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import nn
from torch.onnx.ops import symbolic
from transformers import AttentionInterface, AutoConfig

import vitq
from eval import Parser, Preprocessing, decode, list_images, require, run

OPSET = 25  # the first with integers of two bits
BATCHES, SECONDS = (1, 32), 10  # whose times are printed, and how long each is measured
TOLERANCE = 1e-3  # of the logits' spread, below which they count as equal


# -------------------- The two operations

def quantize(x, scale, zero_point, top):
    """q of Eq. (1), uint8: QuantizeLinear clips to [0, 255], for fewer bits Min to `top`. [ours]"""
    q = symbolic("QuantizeLinear", (x, scale, zero_point), dtype=torch.uint8, shape=x.shape)
    if top == 255:
        return q
    return symbolic("Min", (q, zero_point.new_tensor(top)), dtype=torch.uint8, shape=x.shape)


def product(a, s_a, z_a, b, s_b, z_b, bias=None):
    """s_a s_b (a - z_a) (b - z_b) + bias, float32, of integers a (..., T, K) and b (..., K, N)."""
    return symbolic("com.microsoft::MatMulIntegerToFloat", (a, b, s_a, s_b, z_a, z_b, bias),
                    dtype=torch.float32, shape=(*a.shape[:-1], b.shape[-1]), version=1)


# -------------------- A network of these operations

class IntegerQuantizer(nn.Module):
    """An ActivationQuantizer that gives the integers: x -> q in uint8, s, z in uint8."""

    def __init__(self, quantizer):
        super().__init__()
        self.top = 2 ** quantizer.bits - 1
        # as constants: the exporter's own exp would be another one in the last digit
        self.register_buffer("scale", quantizer.log_scale.exp())
        self.register_buffer("zero_point", quantizer.zero_point.round().clamp(0, self.top).byte())

    def forward(self, x):
        return quantize(x, self.scale, self.zero_point, self.top), self.scale, self.zero_point


class IntegerLinear(nn.Module):
    """A QuantLinear, or a QuantConv2d as the product with each patch, in integers."""

    def __init__(self, layer):
        super().__init__()
        q, scale = layer.quantized_weight()
        q = q.flatten(1).T
        # Two products of unsigned with signed 8-bit numbers may overflow the 16 bits in which a CPU
        # with AVX2 alone adds them; unsigned with unsigned, it adds in 32. Below 8 bits they fit.
        middle = 128 if layer.weight_bits == 8 else 0
        self.register_buffer("q", (q + middle).byte() if middle else q.char())
        self.register_buffer("z", self.q.new_tensor(middle))
        self.register_buffer("weight", scale)  # so called because transformers asks for its type
        self.bias, self.patch = layer.bias, getattr(layer, "kernel_size", None)
        self.input_quantizer = IntegerQuantizer(layer.input_quantizer)

    def forward(self, x):
        if self.patch:  # (B, 3, H, W) -> (B, rows, columns, 3 x height x width of a patch)
            height, width = self.patch
            x = x.unflatten(3, (-1, width)).unflatten(2, (-1, height))
            x = x.permute(0, 2, 4, 1, 3, 5).flatten(3)
        y = product(*self.input_quantizer(x), self.q, self.weight, self.z, self.bias)
        return y.permute(0, 3, 1, 2) if self.patch else y


def integer_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Eq. (8) in integers, for arguments and results as of `vitq.quantized_attention`. [ours]"""
    q_k, s_k, z_k = module.key_quantizer(key)
    a = product(*module.query_quantizer(query), q_k.transpose(-1, -2), s_k * scaling, z_k)
    if attention_mask is not None:
        a = a + attention_mask
    e = (a - a.amax(-1, keepdim=True)).exp()
    o = product(*module.exp_quantizer(e), *module.value_quantizer(value))
    o = o / e.sum(-1, keepdim=True)
    return o.transpose(1, 2), None


AttentionInterface.register("vitq_integers", integer_attention)


@torch.no_grad()
def integer_network(model):
    """Put the integer layers and attention into a model of `vitq.load_quantized`, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, vitq.QuantWeight):
                setattr(parent, name, IntegerLinear(child))
            elif isinstance(child, vitq.ActivationQuantizer):
                setattr(parent, name, IntegerQuantizer(child))
    model.set_attn_implementation("vitq_integers")
    return model


# -------------------- The file

def to_onnx(model):
    """The ONNX model of a network: pixel_values (B, 3, H, W) -> logits (B, classes)."""
    side = model.config.image_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        proto = torch.onnx.export(
            model.requires_grad_(False), (torch.zeros(2, 3, side, side),), dynamo=True,
            verbose=False, opset_version=OPSET, input_names=["pixel_values"],
            output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch")},)).model_proto
    del proto.graph.output[1:]  # of a distilled DeiT, those of its two heads
    del proto.graph.value_info[:]  # the exporter's notes, larger than a small network's weights
    for node in proto.graph.node:
        del node.metadata_props[:]
    return proto


def store_packed(proto, bits):
    """Store the int8 weights of an ONNX model in 2 or 4 bits, if they have as few `bits`, in place.

    ONNX Runtime carries out the Cast to 8 bits once, when it loads the file.
    """
    width, kind = (2, TensorProto.INT2) if bits <= 2 else (4, TensorProto.INT4)
    for tensor in proto.graph.initializer if bits <= 4 else ():
        if tensor.data_type == TensorProto.INT8 and len(tensor.dims) == 2:
            q, name = onnx.numpy_helper.to_array(tensor), tensor.name
            binary = np.unpackbits(q.view(np.uint8).reshape(-1, 1), axis=1, count=width,
                                   bitorder="little")  # two's complement, lowest bit first
            data = np.packbits(binary, bitorder="little").tobytes()
            tensor.CopyFrom(helper.make_tensor(f"{name}_packed", kind, q.shape, data, raw=True))
            proto.graph.node.insert(0, helper.make_node("Cast", [tensor.name], [name],
                                                        to=TensorProto.INT8))
    return proto


# -------------------- Time and agreement

def session_of(proto):
    """ONNX Runtime with a model, on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(proto.SerializeToString(), options,
                                        providers=["CPUExecutionProvider"])


def milliseconds(sessions, side, batch):
    """Per picture, the median of runs in turn, so that a busy machine slows all sessions alike."""
    pixels = np.random.default_rng(0).standard_normal((batch, 3, side, side), dtype=np.float32)
    taken, end = [], time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(taken) < 3:
        marks = [time.perf_counter()]
        for session in sessions:
            session.run(None, {"pixel_values": pixels})
            marks.append(time.perf_counter())
        taken.append(np.diff(marks))
    return 1000 * np.median(taken, axis=0) / batch


@torch.no_grad()
def compare(session, model, preprocessing, paths):
    """One line: what ONNX Runtime and torch make of the same images."""
    normalize, ours, theirs = preprocessing.normalizer(torch.device("cpu")), [], []
    for _, pixels in decode(paths, preprocessing.pixels(), "comparing"):
        for batch in normalize(pixels).split(32):
            ours.append(torch.from_numpy(session.run(None, {"pixel_values": batch.numpy()})[0]))
            theirs.append(model(batch).logits)
    ours, theirs = torch.cat(ours), torch.cat(theirs)  # (N, classes)
    same = 100 * (ours.argmax(1) == theirs.argmax(1)).double().mean()
    equal = 100 * ((ours - theirs).abs().amax(1) < TOLERANCE * theirs.std()).double().mean()
    return (f"{len(ours)} images: {same:.2f} % get the first class that torch gives; the logits of "
            f"{equal:.2f} % are torch's, for the rest a value was at a tie and went the other way")


# -------------------- Command line

def parser():
    parser = Parser(__doc__, device=False)
    parser.add_argument("--model", required=True, help="a folder of quantize.py")
    parser.add_argument("--data", metavar="DIR", help="images, to compare with torch")
    return parser


def main():
    args = parser().parse_args()
    model, config = vitq.load_quantized(args.model)
    paths, side = list_images(args.data) if args.data else [], model.config.image_size
    require(side % model.config.patch_size == 0, args.model, f"image_size {side} is no multiple of "
            f"patch_size {model.config.patch_size}", "export a model that has no pixels left over")
    # Random weights are as fast as trained ones; "sdpa" would become ONNX's slower Attention.
    original = type(model)(AutoConfig.for_model(**config["network"]))
    original.set_attn_implementation("eager")
    weight_bits, _ = vitq.parse_bits(config["bits"])
    protos = {"float32": to_onnx(original.eval()), f"{config['bits']} integers": store_packed(
        to_onnx(integer_network(copy.deepcopy(model))), weight_bits)}
    *_, proto = protos.values()
    path = Path(args.model) / "model.onnx"
    vitq.write_whole(path, proto.SerializeToString())

    sessions = [session_of(proto) for proto in protos.values()]
    times = [milliseconds(sessions, side, batch) for batch in BATCHES]
    print(f"{path}: threads {torch.get_num_threads()}, ONNX Runtime {onnxruntime.__version__}, "
          f"milliseconds per picture in batches of {BATCHES}")
    for (name, proto), *row in zip(protos.items(), *times):
        print(f"{name:15}{proto.ByteSize() / 1e6:10.2f} MB" + "".join(f"{ms:10.2f}" for ms in row))
    if paths:
        print(compare(sessions[-1], model, Preprocessing(**config["preprocessing"]), paths))


if __name__ == "__main__":
    run(main)
