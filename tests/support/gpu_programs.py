"""Programs for GPUs that are not there: Inductor generates whatever it would for one, and nothing runs.

Inputs are FakeTensors that say "cuda".
"""

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor import compile_fx, output_code
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tests.support.fake_gpu import fake_gpu


def _indexed(tensor: Tensor, index: Any) -> Tensor:
    """`tensor[index]` by ATen alone: the built-in form asks for a guard of the device, which a CPU build lacks."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is Ellipsis for part in parts):
        place = next(i for i, part in enumerate(parts) if part is Ellipsis)
        taken = sum(part is not None and part is not Ellipsis for part in parts)
        parts[place : place + 1] = [slice(None)] * (tensor.ndim - taken)
    dimension = 0
    for part in parts:
        if part is None:
            tensor = torch.unsqueeze(tensor, dimension)
        elif isinstance(part, slice):
            if part != slice(None):
                tensor = torch.ops.aten.slice.Tensor(tensor, dimension, part.start, part.stop, part.step or 1)
        elif isinstance(part, Tensor):
            tensor = torch.index_select(tensor, dimension, part)
        else:
            tensor = torch.select(tensor, dimension, part)
            continue
        dimension += 1
    return tensor


def _copied(tensor: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`tensor.copy_(source)`, likewise."""
    copied: Tensor = torch.ops.aten.copy_.default(tensor, source, non_blocking)
    return copied


def _without_device_guards() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.multiple(torch.Tensor, __getitem__=_indexed, copy_=_copied)


@dataclass(frozen=True)
class Kernel:
    """One Triton kernel of a program. source: the module that Inductor would write to its cache."""

    name: str
    source: str


@dataclass(frozen=True)
class Program:
    """What Inductor generated for one graph: the wrapper that allocates and launches, and the kernels.

    order: which of the function's inputs each of the graph's is; Dynamo numbers them by their first use.
    obstacles: why Inductor would not record the calls in a CUDA graph; None if it was not asked to.
    """

    wrapper: str
    kernels: tuple[Kernel, ...]
    target: str
    order: tuple[int, ...]
    obstacles: tuple[str, ...] | None

    def arguments(self, inputs: Sequence[Any]) -> list[Any]:
        """The wrapper's arguments for inputs of the function."""
        return [inputs[index] for index in self.order]

    @property
    def names(self) -> list[str]:
        """What the wrapper calls its arguments: the names of the graph's inputs."""
        found = re.search(r"^ +([\w, ]+?),? = args$", self.wrapper, re.M)
        assert found
        return found[1].split(", ")

    @property
    def launches(self) -> list[str]:
        """What a call launches, in order: Triton kernels and library calls by name."""
        body = _KERNEL.sub("", self.wrapper).partition("def benchmark_compiled_module")[0]
        found = re.findall(
            r"(\w+)\.run\(|(extern_kernels\.\w+|aten\.\w+(?:\.\w+)?|torch\.ops\.[\w.]+)\(|\.(zero_)\(", body
        )
        return ["".join(names) for names in found]

    @property
    def templates(self) -> list[str]:
        """Names of the launched kernels that are made from a template."""
        return [name for name in self.launches if name.startswith("triton_tem_")]


_KERNEL = re.compile(r"^(\w+) = async_compile\.triton\('\w+', '''\n(.*?)''', device_str='cuda'\)", re.S | re.M)


def fake_inputs(*tensors: Tensor) -> list[Tensor]:
    """Fake CUDA tensors of the same sizes, strides and dtypes, of one mode."""
    with FakeTensorMode():
        return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") for t in tensors]


_CONFIG = {
    "fx_graph_cache": False,
    "compile_threads": 1,
    "joint_graph_constant_folding": False,  # would compute the constants on the device
    "shape_padding": False,  # would time products on the device
}


class _GeneratedError(Exception):
    """Ends a compilation whose code is there."""


def generate(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    target: str = "sm_90",
    backend: str | Callable[..., Any] = "inductor",
    options: dict[str, Any] | None = None,
    **compile_arguments: Any,
) -> Program:
    """The program for one call of `function`, a module or a function, with FakeTensors on "cuda".

    backend: a name or a callable that compiles through Inductor. options: Inductor's.
    """
    mode = next(value.fake_mode for value in inputs if isinstance(value, FakeTensor))
    inner: Any = torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend
    wrappers: list[str] = []
    order: list[int] = []
    obstacles: tuple[str, ...] | None = None

    def keep_code(graph: GraphLowering) -> Any:
        wrapper, _ = graph.codegen()
        wrappers.append(wrapper.value)
        return SimpleNamespace(call=lambda *args: None, __file__="")

    def keep_obstacles(inputs: object, compiled: Any, *rest: object) -> None:
        nonlocal obstacles
        obstacles = tuple(reason for reason, *_ in compiled.cudagraph_info.cudagraph_fail_reasons)

    def generating(module: torch.fx.GraphModule, examples: list[Tensor]) -> Any:
        order.extend(index for example in examples for index, value in enumerate(inputs) if value is example)
        with (
            fake_gpu(target),
            # what a cache holds was not generated now, and what is generated now must not reach a real run
            inductor_config.patch({**_CONFIG, **(options or {})}),
            functorch_config.patch(enable_autograd_cache=False),
            mock.patch.object(GraphLowering, "compile_to_module", keep_code),
            # advice on float32 products, meant for whoever owns the GPU
            mock.patch.object(compile_fx, "_warn_tf32_disabled", lambda: None),
            # in the place of what records CUDA graphs
            mock.patch.object(output_code, "cudagraph_post_compile", keep_obstacles),
            mock.patch.object(output_code, "cudagraph_partition_post_compile", keep_obstacles),
        ):
            inner(module, examples)
        return stop

    def stop(*values: Any) -> Any:
        raise _GeneratedError

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=generating, fullgraph=True, **compile_arguments)
    with torch.no_grad(), mode, _without_device_guards(), contextlib.suppress(_GeneratedError):
        compiled(*inputs)
    (wrapper,) = wrappers
    return Program(
        wrapper, tuple(Kernel(*found) for found in _KERNEL.findall(wrapper)), target, tuple(order), obstacles
    )
