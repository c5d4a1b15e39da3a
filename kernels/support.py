"""Where sparse kernels exist."""

import torch
from torch._inductor.cpu_vec_isa import VecAVX512, pick_vec_isa

from larosa_compile.kernels.reference import MAGNITUDE_VIEWS

DEVICES = ("cpu", "cuda")
"""Types of devices with kernels, as torch names them: AMD's GPUs are "cuda" too."""


def refusal_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no sparse kernel can serve a linear on this device and dtype; None if one can."""
    if device.type not in DEVICES:
        return f"there is no sparse kernel for device '{device.type}' yet; it stays dense"
    if dtype not in MAGNITUDE_VIEWS:
        return (
            f"there is no sparse kernel for {dtype} (supported: {', '.join(map(str, MAGNITUDE_VIEWS))}); it stays dense"
        )
    return None


def multiplies_pairs() -> bool:
    """Whether generated C++ code may multiply and add pairs of bfloat16 numbers: AVX512_BF16."""
    vectors = pick_vec_isa()
    return isinstance(vectors, VecAVX512) and vectors.is_avx512_bf16_supported()
