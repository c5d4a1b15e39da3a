"""How a model's weights arrived where they were not simply stored: what the report says of it."""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from larosa_compile import registry
from larosa_compile.passes.graph import Refusal
from larosa_compile.passes.quantised import is_quantised

CODES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)
"""dtypes in which only quantised weights are stored as matrices."""


def origins(parameters: Sequence[torch.Tensor]) -> tuple[str, ...]:
    """In a sentence each: what parameters were before they were what is folded."""
    found = Counter(filter(None, map(_origin, parameters)))
    return tuple(f"{count} weights {origin}" for origin, count in found.items())


def _origin(parameter: torch.Tensor) -> str | None:
    if is_quantised(parameter):
        kind = type(parameter)
        return f"arrived as {kind.__name__} ({kind.__module__.partition('.')[0]}), read at their dequantised values"
    return registry.origin_of(parameter)


def unreadable(tensors: Mapping[str, torch.Tensor]) -> tuple[Refusal, ...]:
    """Refusals of codes among a model's tensors, path -> parameter or buffer, whose meaning only their module knows."""
    return tuple(
        Refusal(
            path,
            f"it holds {str(tensor.dtype).removeprefix('torch.')} codes that only its module can read, so what it is "
            "multiplied with stays as it is; load the model unquantised and give options={'weights': 'int8'}",
        )
        for path, tensor in tensors.items()
        if tensor.ndim >= 2 and tensor.dtype in CODES and not is_quantised(tensor)
    )
