"""Products of CPU matrices in 16 bits, on processors without instructions for them.

There oneDNN has none either, and ATen's own loops are slow, most of all over weights stored input-major, as folded ones
are: DESIGN.md has figures. A product in float32 is many times as fast.
"""

import functools

import torch
from torch import Tensor


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
    if x.device.type != "cpu" or not is_slow(x.dtype) or weight_t.stride(0) == 1 or torch.is_grad_enabled():
        return x @ weight_t
    return (x.float() @ weight_t.float()).to(x.dtype)
