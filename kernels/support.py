"""Where sparse kernels exist."""

import torch

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
