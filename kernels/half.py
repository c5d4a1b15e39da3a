"""Products of CPU matrices in 16 bits, on processors without instructions for them.

There oneDNN has none either, and ATen's own loops are slow, most of all over weights stored input-major, as folded ones
are: DESIGN.md has figures. A product in float32 is many times as fast.
"""

import functools

import torch
from torch import Tensor
from torch.fx import Graph

aten = torch.ops.aten

FEWEST_ROWS = 16
"""From so many on a weight stored output-major, in whose order ATen's loops run, is worth a float32 copy: an estimate
from DESIGN's figures and what a copy has to read and write."""


@functools.cache
def is_slow(dtype: torch.dtype) -> bool:
    """Whether ATen multiplies CPU matrices of this dtype by loops of its own."""
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if not torch.backends.mkldnn.is_available():
        return True
    onednn = torch.ops.mkldnn
    supported = onednn._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else onednn._is_mkldnn_fp16_supported
    return not supported()


def product(x: Tensor, weight_t: Tensor) -> Tensor:
    """`x @ weight_t` of one dtype, [rows, in] times [in, out]; through float32, rounded once, where that is faster.

    Not where gradients are wanted: the copies would live until they are.
    """
    return (x.float() @ weight_t.float()).to(x.dtype) if _gains(x, weight_t) else x @ weight_t


def product_and_bias(bias: Tensor, x: Tensor, weight_t: Tensor) -> Tensor:
    """`bias + x @ weight_t`, in the same way."""
    if not _gains(x, weight_t):
        return torch.addmm(bias, x, weight_t)
    return torch.addmm(bias.float(), x.float(), weight_t.float()).to(x.dtype)


def replace_products(graph: Graph) -> None:
    """Has the products of a graph that is run operation by operation made as above; its module is not recompiled."""
    for target, made in ((aten.mm.default, product), (aten.addmm.default, product_and_bias)):
        for node in graph.find_nodes(op="call_function", target=target):
            if not node.kwargs:  # factors of addmm's terms
                node.target = made


def _gains(x: Tensor, weight_t: Tensor) -> bool:
    if x.device.type != "cpu" or not is_slow(x.dtype) or torch.is_grad_enabled():
        return False
    return weight_t.stride(0) != 1 or x.shape[0] >= FEWEST_ROWS
