"""Where sparse kernels exist."""

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def refusal_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no sparse kernel can serve a linear on this device and dtype; None if one can."""
    if device.type != "cpu":
        return f"there is no sparse kernel for device '{device.type}' yet; it stays dense"
    if dtype not in DTYPES:
        return f"there is no sparse kernel for {dtype} (supported: {', '.join(map(str, DTYPES))}); it stays dense"
    return None
