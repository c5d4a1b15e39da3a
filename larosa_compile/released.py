"""Parameters whose memory was given back after they were folded (`options={"release_originals": True}`)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch._dynamo.symbolic_convert import InstructionTranslator

from larosa_compile.errors import ReleasedWeightsError
from larosa_compile.memory import return_mapped

_METADATA = ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad", "_version")
_METHODS = ("size", "dim", "stride", "numel", "is_floating_point", "is_complex", "requires_grad_", "__hash__")
_MESSAGE = (
    "this weight was folded by larosa and its memory released (option 'release_originals'): call the compiled model "
    "instead, or load the model again to use it without larosa or with another recipe"
)


class ReleasedParameter(nn.Parameter):
    """A parameter without its values: says its shape and dtype, and refuses everything that would read or write.

    Only Dynamo may trace operations on it, and only for this backend, which folded what they compute.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():
            allowed = _is_traced_for_larosa()
        else:
            allowed = _asks_for_metadata(func)
        if not allowed:
            raise ReleasedWeightsError(_MESSAGE)
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ReleasedParameter({list(self.shape)}, {self.dtype})"


# Dynamo runs it while it traces rather than tracing it
@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _is_traced_for_larosa() -> bool:
    compiler = InstructionTranslator.current_tx().output.compiler_fn
    return getattr(compiler, "compiler_name", None) == "larosa"


def _asks_for_metadata(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") in _METADATA
    return name in _METHODS


def is_released(parameter: torch.Tensor) -> bool:
    return type(parameter) is ReleasedParameter


def check_not_released(parameters: Iterable[torch.Tensor]) -> None:
    """For code that compiled graphs run: Dynamo switches `__torch_function__` off there.

    Raises:
        ReleasedWeightsError: one of them was released.
    """
    if any(map(is_released, parameters)):
        raise ReleasedWeightsError(_MESSAGE)


def release(parameter: torch.Tensor) -> bool:
    """Gives a parameter's memory back; False where it is not its own: shared with another tensor, or a mapped file.

    What was read of a mapped file leaves the process all the same, and the parameter can be read again.
    """
    if type(parameter) is not nn.Parameter:
        return False
    storage = parameter.untyped_storage()
    if not storage.resizable():
        return_mapped([parameter], written=True)
        return False
    if _owners(storage) > 1:
        return False
    storage.resize_(0)
    parameter.__class__ = ReleasedParameter
    return True


def _owners(storage: torch.UntypedStorage) -> int:
    """Tensors that use a storage; the count holds one more for asking."""
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1
