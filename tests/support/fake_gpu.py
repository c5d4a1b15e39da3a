"""Programs for GPUs that are not there: Inductor generates whatever it would for one, and nothing runs.

Tensors are FakeTensors that say "cuda". What Inductor and Triton ask of the device is answered from `GPUS`, by patches
that last only while code is generated. A CPU-only build of torch suffices.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.fx_passes.misc_patterns as misc_patterns
import torch.utils._triton as triton_support
import triton
from torch import Tensor
from torch._dynamo import device_interface
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor import output_code
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver


@dataclass(frozen=True)
class Gpu:
    """What generated code may depend on; figures from NVIDIA's data sheets and its CUDA programming guide."""

    name: str
    capability: tuple[int, int]
    processors: int
    shared_memory: int  # bytes that one block may opt in to
    cache: int  # bytes of L2

    @property
    def properties(self) -> SimpleNamespace:
        """As `torch.cuda.get_device_properties` would give them."""
        return SimpleNamespace(
            name=self.name,
            major=self.capability[0],
            minor=self.capability[1],
            multi_processor_count=self.processors,
            total_memory=80 * 2**30,
            regs_per_multiprocessor=65536,
            max_threads_per_multi_processor=2048,
            max_threads_per_block=1024,
            warp_size=32,
            shared_memory_per_block=48 * 2**10,
            shared_memory_per_block_optin=self.shared_memory,
            shared_memory_per_multiprocessor=self.shared_memory + 1024,
            L2_cache_size=self.cache,
            gcnArchName="",
        )


GPUS = {
    "sm_80": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166_912, 40 * 2**20),
    "sm_90": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 232_448, 50 * 2**20),
    "sm_100": Gpu("NVIDIA B200", (10, 0), 148, 232_448, 126 * 2**20),
}


class _CompileOnlyDriver(CudaDriver):  # type: ignore[misc]
    """Triton's driver without a device. A subclass of the real one, because Inductor would replace any other."""

    def __init__(self, gpu: Gpu) -> None:
        self._target = GPUTarget("cuda", 10 * gpu.capability[0] + gpu.capability[1], 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


_CACHED_ANSWERS: tuple[Any, ...] = (
    DeviceProperties.create,
    triton_support.has_triton,
    triton_support._device_supports_tma,
    triton_support.has_triton_experimental_host_tma,
    triton_support.has_triton_tensor_descriptor_host_tma,
    triton_support.has_triton_tma_device,
    triton_support.has_datacenter_blackwell_tma_device,
    triton_support.has_triton_stable_tma_api,
    triton_support.triton_backend,
    triton_support.triton_hash_with_backend,
)


@contextlib.contextmanager
def fake_gpu(target: str = "sm_90") -> Iterator[Gpu]:
    """Within the context, torch and Triton take the machine for one with this GPU, as far as generating code goes."""
    gpu = GPUS[target]
    properties = gpu.properties
    answers: list[tuple[object, str, object]] = [
        # what Inductor asks torch.cuda
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_properties", lambda device=None: properties),
        (torch.cuda, "get_device_capability", lambda device=None: gpu.capability),
        (torch.cuda, "get_device_name", lambda device=None: gpu.name),
        (torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
        (torch.cuda, "is_tf32_supported", lambda: True),
        (torch.version, "cuda", "13.0"),
        (torch._C, "_cuda_cudaCachingAllocator_is_enabled", lambda: True),
        # AOTAutograd keeps the state of random numbers
        (torch.cuda, "get_rng_state", lambda device=0: torch.empty(0, dtype=torch.uint8)),
        (torch.cuda, "set_rng_state", lambda state, device=0: None),
        # with CUDA "available", making a fake tensor would touch the device
        (FakeTensorMode, "avoid_device_init", property(lambda mode: True)),
        # patterns for training, made of random numbers on the device
        (misc_patterns, "_misc_patterns_init", _on_the_cpu(misc_patterns._misc_patterns_init)),
        (torch.cuda.device, "__enter__", lambda guard: None),
        (torch.cuda.device, "__exit__", lambda guard, *error: False),
        # Dynamo's interface holds copies of torch.cuda's functions
        (device_interface.CudaInterface, "current_device", staticmethod(lambda: 0)),
        (device_interface.CudaInterface, "device_count", staticmethod(lambda: 1)),
        (device_interface.CudaInterface, "get_device_properties", staticmethod(lambda device=None: properties)),
        (device_interface.CudaInterface, "is_bf16_supported", staticmethod(lambda including_emulation=True: True)),
        (device_interface.CudaInterface, "get_raw_stream", staticmethod(lambda device=0: 0)),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, answer in answers:
            stack.enter_context(mock.patch.object(owner, name, answer, create=True))
        stack.enter_context(mock.patch.dict(device_interface.caching_worker_device_properties, {"cuda": [properties]}))
        before = triton.runtime.driver._active
        triton.runtime.driver.set_active(_CompileOnlyDriver(gpu))
        stack.callback(setattr, triton.runtime.driver, "_active", before)
        for cached in _CACHED_ANSWERS:
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        yield gpu


def _on_the_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(torch.device("cpu"))


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
