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
import timeit
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.onnx.ops import symbolic
from transformers import AttentionInterface, AutoConfig

import vitq
from eval import Parser, decode, list_images, load_result, run
from vitq import require

OPSET = 25  # the first with integers of two bits
BATCHES, SECONDS = (1, 32), 10  # whose times are printed, and how long each is measured


# -------------------- A network in integers

class IntegerQuantizer(nn.Module):
    """An ActivationQuantizer that gives the integers: x -> q in uint8, s, z in uint8."""

    def __init__(self, quantizer):
        super().__init__()
        self.top = 2 ** quantizer.bits - 1
        # as constants: the exporter's own exp differs in the last digit
        self.register_buffer("scale", quantizer.log_scale.exp())
        self.register_buffer("zero_point", quantizer.zero_point.round().clamp(0, self.top).byte())

    def forward(self, x):
        """Eq. (1): QuantizeLinear clips to [0, 255], so fewer bits need only an upper bound."""
        q = symbolic("QuantizeLinear", (x, self.scale, self.zero_point), dtype=torch.uint8,
                     shape=x.shape)
        return q.clamp_max(self.top) if self.top < 255 else q, self.scale, self.zero_point


def product(a, s_a, z_a, b, s_b, z_b, bias=None):
    """s_a s_b (a - z_a) (b - z_b) + bias, float32, of integers a (..., T, K) and b (..., K, N)."""
    return symbolic("com.microsoft::MatMulIntegerToFloat", (a, b, s_a, s_b, z_a, z_b, bias),
                    dtype=torch.float32, shape=(*a.shape[:-1], b.shape[-1]), version=1)


class IntegerLinear(nn.Module):
    """A QuantLinear, or a QuantConv2d as the product with each patch, in integers."""

    def __init__(self, layer):
        super().__init__()
        q, scale = layer.quantized_weight()
        q = q.flatten(1).T
        # A CPU with only AVX2 adds two products of unsigned with signed 8-bit numbers in 16 bits,
        # which weights of 8 bits overflow; of unsigned with unsigned, in 32. Below 8 bits they fit.
        middle = 128 if layer.weight_bits == 8 else 0
        self.register_buffer("q", (q + middle).byte() if middle else q.char())
        self.register_buffer("z", self.q.new_tensor(middle))
        self.register_buffer("weight", scale)  # so called because transformers asks for its type
        self.patch = layer.kernel_size[0] if isinstance(layer, nn.Conv2d) else None
        self.bias = layer.bias
        self.input_quantizer = IntegerQuantizer(layer.input_quantizer)

    def forward(self, x):
        if self.patch:  # (B, 3, H, W) -> (B, rows, columns, 3 x height x width of a patch)
            x = nn.functional.pixel_unshuffle(x, self.patch).permute(0, 2, 3, 1)
        y = product(*self.input_quantizer(x), self.q, self.weight, self.z, self.bias)
        return y.permute(0, 3, 1, 2) if self.patch else y


def integer_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Eq. (8) in integers, for arguments and results as of `vitq.quantized_attention`. [ours]"""
    q_k, s_k, z_k = module.key_quantizer(key)
    a = product(*module.query_quantizer(query), q_k.transpose(-1, -2), s_k * scaling, z_k)
    if attention_mask is not None:
        a = a + attention_mask
    e = (a - a.amax(-1, keepdim=True)).exp()
    o = product(*module.exp_quantizer(e), *module.value_quantizer(value)) / e.sum(-1, keepdim=True)
    return o.transpose(1, 2), None


AttentionInterface.register("vitq_integers", integer_attention)


def integer_network(model):
    """Put the integer layers and attention into a model of `vitq.load_quantized`, in place."""
    for name, layer in vitq.modules_of(model, vitq.QuantWeight):
        model.set_submodule(name, IntegerLinear(layer))
    for name, quantizer in vitq.modules_of(model, vitq.ActivationQuantizer):  # of attention
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


def store_packed(proto, bits):
    """Store the int8 weights of an ONNX model in 2 or 4 bits, if `bits` is that small, in place.

    ONNX Runtime carries out the Cast to 8 bits once, when it loads the file.
    """
    few = helper.tensor_dtype_to_np_dtype(TensorProto.INT2 if bits <= 2 else TensorProto.INT4)
    for tensor in proto.graph.initializer if bits <= 4 else ():
        if tensor.data_type == TensorProto.INT8 and len(tensor.dims) == 2:
            q, name = numpy_helper.to_array(tensor), tensor.name
            tensor.CopyFrom(numpy_helper.from_array(q.astype(few), f"{name}_packed"))
            cast = helper.make_node("Cast", [tensor.name], [name], to=TensorProto.INT8)
            proto.graph.node.insert(0, cast)
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
        taken.append([timeit.timeit(lambda: session.run(None, {"pixel_values": pixels}), number=1)
                      for session in sessions])
    return 1000 * np.median(taken, axis=0) / batch


def agreement(session, model, preprocessing, paths):
    """Whether ONNX Runtime and torch give an image the same first class, for each that is read.

    The integer products are equal, but LayerNorm, softmax and GELU may differ in the last digit. A
    value halfway between two levels may then round the other way, which later layers amplify.
    """
    normalize, same = preprocessing.normalizer(torch.device("cpu")), []
    for _, pixels in decode(paths, preprocessing.pixels(), "comparing"):
        for batch in normalize(pixels).split(32):
            logits, = session.run(None, {"pixel_values": batch.numpy()})  # (B, classes)
            same.extend(logits.argmax(1) == model(batch).logits.numpy().argmax(1))
    return same


# -------------------- Command line

def parser():
    parser = Parser(__doc__, device=False)
    parser.add_argument("--model", required=True, help="a folder of quantize.py")
    parser.add_argument("--data", metavar="DIR", help="images, to compare with torch")
    return parser


def main():
    args = parser().parse_args()
    classifier, config = load_result(args.model)
    model, preprocessing = classifier.model, classifier.preprocessing
    paths, side = list_images(args.data) if args.data else [], model.config.image_size
    patch = model.config.patch_size  # a number, or one for the height and one for the width
    require(np.ptp(patch) == 0 and side % np.max(patch) == 0, args.model, f"patch_size {patch} "
            f"does not cut image_size {side} into squares", "export one without pixels left over")
    # Random weights are as fast as trained ones; "sdpa" would become ONNX's slower Attention.
    original = type(model)(AutoConfig.for_model(**config["network"], attn_implementation="eager"))
    integers = store_packed(to_onnx(integer_network(copy.deepcopy(model))),
                            vitq.parse_bits(config["bits"])[0])
    protos = {"float32": to_onnx(original), f"{config['bits']} integers": integers}
    path = Path(args.model) / "model.onnx"
    vitq.write_whole(path, integers.SerializeToString())

    sessions = [session_of(proto) for proto in protos.values()]
    times = [milliseconds(sessions, side, batch) for batch in BATCHES]
    print(f"{path}: threads {torch.get_num_threads()}, ONNX Runtime {onnxruntime.__version__}, "
          f"milliseconds per picture in batches of {BATCHES}")
    for (name, proto), *row in zip(protos.items(), *times):
        print(f"{name:15}{proto.ByteSize() / 1e6:10.2f} MB" + "".join(f"{ms:10.2f}" for ms in row))
    if paths:
        same = agreement(sessions[-1], model, preprocessing, paths)
        print(f"{100 * np.mean(same):.2f} % of {len(same)} images get the first class torch gives")


if __name__ == "__main__":
    run(main)
