"""Float32 products with bfloat16 weights, computed in bfloat16: what folding a model spends its time on."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Self

import torch


class Halves:
    """Products of a float32 matrix with bfloat16 weights, at the speed of bfloat16 arithmetic.

    `A = H + L`, each rounded to bfloat16, keeps 16 bits of A's 24. `[H L]` times the weight twice is then a product of
    bfloat16 numbers: exact term by term, summed in float32. The result is to be rounded to 8 bits.
    """

    def __init__(self, split: bool) -> None:
        self._split = split

    @classmethod
    @contextlib.contextmanager
    def where_they_pay(cls, weight: torch.Tensor, dtype: torch.dtype) -> Iterator[Self]:
        """Within the context float32 products may be computed in bfloat16, if the processor has instructions for it.

        torch has this as one switch for the process: other threads' products are meanwhile rounded like that, too.
        """
        split = weight.dtype == dtype == torch.bfloat16 and weight.device.type == "cpu" and _multiplies_bfloat16()
        backend: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before = backend.fp32_precision
        if split:
            backend.fp32_precision = "bf16"
        try:
            yield cls(split)
        finally:
            backend.fp32_precision = before

    def of(self, matrix: torch.Tensor, dim: int) -> torch.Tensor:
        """Both halves side by side along the dimension that is summed over."""
        if not self._split:
            return matrix
        upper = matrix.bfloat16().float()
        return torch.cat([upper, (matrix - upper).bfloat16().float()], dim)

    def against(self, weight: torch.Tensor, dim: int) -> torch.Tensor:
        """The weight once for each half."""
        return torch.cat([weight, weight], dim) if self._split else weight


@functools.cache
def _multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
