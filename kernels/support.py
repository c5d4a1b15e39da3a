"""Where sparse kernels exist."""

import torch

from larosa_compile.kernels import heuristics, triton_heuristics
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


def skips_weights(device: torch.device, rows: int | None, features: int, kept: int) -> bool:
    """Whether a product of so many rows, each of which keeps `kept` features, has a kernel that skips weights.

    rows: None where they are not known when the kernel is made. All other products read every weight.
    """
    if rows is None:
        return False
    if device.type == "cpu":
        return rows <= heuristics.MAX_GEMV_ROWS
    return rows <= triton_heuristics.max_gemv_rows(features, kept)
