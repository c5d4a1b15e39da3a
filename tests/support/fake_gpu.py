"""GPUs that are not there: what Inductor and Triton ask of a device is answered from `GPUS`.

The patches last only while code is generated. A CPU-only build of torch suffices.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.fx_passes.misc_patterns as misc_patterns
import torch.utils._triton as triton_support
import triton
from torch._dynamo import device_interface
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses.fake_tensor import FakeTensorMode
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
