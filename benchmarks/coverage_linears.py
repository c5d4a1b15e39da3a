"""The weights of a model's linears, counted from its modules and eager products: coverage that asks no compiler."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "_grouped_mm"}


@dataclass(frozen=True)
class LinearWeights:
    """Weights by path, each parameter once; `aliases` knows every path of every parameter, tied ones included.

    read: those that a causal forward multiplies with or that its logits depend on; unread: the others, such as a
    vision tower's.
    """

    read: dict[str, nn.Parameter]
    unread: dict[str, nn.Parameter]
    aliases: dict[str, str]

    @classmethod
    def of(cls, model: PreTrainedModel, inputs: dict[str, Tensor]) -> "LinearWeights":
        """The linears of a model, and which of them a forward over `inputs` reads."""
        products = _products(model, inputs)
        found = _linear_weights(model, products)
        # either alone misses some: a choice passes no gradient on, and a weight may be copied before its product
        depended = _depended_on(model, inputs, list(found.values()))
        depended |= {id(weight) for weight in found.values() if _storage(weight) in products.factors}
        names = {id(parameter): path for path, parameter in found.items()}
        aliases = {
            path: names.get(id(parameter), path) for path, parameter in model.named_parameters(remove_duplicate=False)
        }
        read = {path: parameter for path, parameter in found.items() if id(parameter) in depended}
        return cls(read, {path: found[path] for path in found if path not in read}, aliases)

    def counts(self) -> dict[str, int]:
        """How many weights there are and their bytes; the unread ones are only counted."""
        return {"weights": len(self.read), "bytes": _bytes(self.read.values()), "unread": len(self.unread)}

    def name_of(self, path: str) -> str:
        """The path under which the weight at `path` is listed here."""
        return self.aliases.get(path, path)

    def among(self, paths: Iterable[str]) -> set[str]:
        """Those of the read weights that are at any of `paths`."""
        return {self.name_of(path) for path in paths} & self.read.keys()

    def bytes_share(self, paths: set[str]) -> float | None:
        """The share of the read bytes that is at `paths`; None where nothing is read."""
        total = _bytes(self.read.values())
        return _bytes(self.read[path] for path in paths) / total if total else None


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _linear_weights(model: PreTrainedModel, products: "_Products") -> dict[str, nn.Parameter]:
    """Weights of linears, stacks of experts (3-d parameters of anything but a convolution), and factors of products.

    An expert that no token chose is multiplied with nothing, and a stack may be gathered from first.
    """
    modules: dict[str, nn.Parameter] = {}
    others: dict[str, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            path = f"{prefix}.{name}" if prefix else name
            is_linear = isinstance(module, nn.Linear | Conv1D) and name == "weight"
            # a size of one is no stack but a vector, broadcast
            is_stack = parameter.ndim == 3 and min(parameter.shape) > 1 and not isinstance(module, _ConvNd)
            if is_linear or (is_stack and _storage(parameter) not in products.exponents):
                modules[path] = parameter
            elif parameter.ndim > 1 and _storage(parameter) in products.factors:
                others[path] = parameter
    # a tied weight goes by the name of its linear
    names = {id(parameter): path for path, parameter in reversed((modules | others).items())}
    return {path: parameter for path, parameter in (modules | others).items() if names[id(parameter)] == path}


class _Products(TorchDispatchMode):
    """Collects the storages that products read, and exponentials (decay rates); a view shares its parameter's."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.factors: set[int] = set()
        self.exponents: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            factors = args[1:] if "add" in name else args  # what is added is no weight
            self.factors |= {_storage(factor) for factor in tree_leaves(factors) if isinstance(factor, Tensor)}
        elif name == "exp":
            self.exponents.add(_storage(args[0]))
        return func(*args, **(kwargs or {}))


def _products(model: PreTrainedModel, inputs: dict[str, Tensor]) -> _Products:
    products = _Products()
    with torch.no_grad(), products:
        model(**inputs)
    return products


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _depended_on(model: PreTrainedModel, inputs: dict[str, Tensor], parameters: list[nn.Parameter]) -> set[int]:
    """The ids of the parameters with a gradient; none where the model has no backward."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        with torch.enable_grad():
            logits = model(**inputs).logits
            gradients = torch.autograd.grad(logits[logits.isfinite()].sum(), trained, allow_unused=True)
    except (RuntimeError, TypeError, NotImplementedError, AssertionError):
        return set()
    return {id(parameter) for parameter, grad in zip(trained, gradients, strict=True) if grad is not None}
