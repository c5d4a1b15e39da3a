"""Rotations of bfloat16 weights, computed in bfloat16: what folding a model spends its time on."""

import functools

import torch


def in_halves(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a bfloat16 weight, rotated and rounded to `dtype` once, is best multiplied in bfloat16.

    A matrix `A = H + L`, each part rounded to bfloat16, keeps 16 bits of A's 24. `[H L]` times the weight twice is then
    a product of bfloat16 numbers: exact term by term, summed in float32, and rounded to 8 bits at its end.
    """
    return weight.dtype == dtype == torch.bfloat16 and weight.device.type == "cpu" and _multiplies_bfloat16()


def halves(matrix: torch.Tensor, dim: int) -> torch.Tensor:
    """`[H L]` of a float32 matrix, side by side along the dimension that is summed over."""
    upper = matrix.bfloat16()
    return _side_by_side(upper, (matrix - upper.float()).bfloat16(), dim)


def twice(weight: torch.Tensor, dim: int) -> torch.Tensor:
    """The weight, of two dimensions, once for each half."""
    return _side_by_side(weight, weight, dim)


def _side_by_side(first: torch.Tensor, second: torch.Tensor, dim: int) -> torch.Tensor:
    """Transposed views are copied in the order that they have in memory, which is several times as fast."""
    if first.stride(0) == 1:
        return torch.cat([first.T, second.T], 1 - dim).T
    return torch.cat([first, second], dim)


@functools.cache
def _multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
