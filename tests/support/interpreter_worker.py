"""`python -m tests.support.interpreter_worker GIVEN RESULT`, with TRITON_INTERPRET=1: see `interpreted.interpret`."""

import contextlib
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy
import torch
import triton.language as tl
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_heuristics import GridExpr
from triton.runtime import interpreter

import larosa_compile.kernels.lowering  # noqa: F401  (registers the ops, and what wrappers call besides kernels)

_SPELLED_OTHERWISE = {"fast_expf": "exp", "fast_dividef": "fdiv"}


class _DeviceFunctions:
    """libdevice by what the interpreter has of triton.language."""

    def __getattr__(self, name: str) -> Any:
        if name == "pow":
            return lambda base, exponent: tl.exp2(tl.log2(base) * exponent)
        return getattr(tl, _SPELLED_OTHERWISE.get(name, name))


class _Heuristics:
    """Decorators that leave the kernel as it is: the configuration has been chosen already."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: lambda kernel: kernel


def _converted(
    values: Any, source: Any, target: Any, rounding: object, original: Any = interpreter._convert_float
) -> Any:
    """bfloat16 as hardware converts it: the interpreter's own way truncates, and loses subnormals."""
    if (source, target) == (tl.bfloat16, tl.float32):
        return (values.astype(numpy.uint32) << 16).view(numpy.float32)
    if (source, target) == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(numpy.ascontiguousarray(values)).bfloat16()
        return rounded.view(torch.int16).numpy().view(numpy.uint16)
    return original(values, source, target, rounding)


class _Kernel:
    """What the wrapper launches: `run` with the arguments of the kernel, then those of its grid."""

    def __init__(self, described: dict[str, Any], folder: Path) -> None:
        self.config, self.meta = described["config"], described["meta"]
        self.function = getattr(_module(described, folder), described["name"])
        self.names = [name for name in self.function.arg_names if name not in self.config]
        self.grid = GridExpr.from_meta(self.meta, self.config)

    def run(self, *args: Any, stream: object = None) -> None:
        names = [*self.names, *self.meta.get("extra_launcher_args", ())]
        values = dict(zip(names, args, strict=True))
        grid = self.grid.eval_slow(values | self.config)
        self.function[grid](*(values[name] for name in self.names), **self.config)


def _module(described: dict[str, Any], folder: Path) -> ModuleType:
    # a file, because the interpreter reads the source that a kernel came from
    path = folder / f"{described['name']}.py"
    source = described["source"]
    # what these lines would bind is bound below
    for line in (
        "from torch._inductor.runtime import triton_helpers, triton_heuristics",
        "from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math",
        "triton_helpers.set_driver_to_gpu()",
    ):
        source = source.replace(line, "")
    path.write_text(source, encoding="utf-8")
    module = ModuleType(described["name"])
    module.__file__ = str(path)
    device = _DeviceFunctions()
    names = {"triton_helpers": triton_helpers, "triton_heuristics": _Heuristics(), "libdevice": device}
    module.__dict__.update(names, tl_math=device)
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


def _on_the_cpu(wrapper: str) -> str:
    for old, new in (
        ("from torch._C import _cuda_getCurrentRawStream as get_raw_stream", "get_raw_stream = lambda device: 0"),
        ("async_compile = AsyncCompile()", "async_compile = _COMPILED"),
        ("_empty_strided_cuda", "_empty_strided_cpu"),
        ("device='cuda", "device='cpu"),
        ("device(type='cuda'", "device(type='cpu'"),
    ):
        wrapper = wrapper.replace(old, new)
    return wrapper


def _run(case: dict[str, Any]) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        kernels = {described["name"]: _Kernel(described, Path(folder)) for described in case["kernels"]}
        compiled = SimpleNamespace(
            triton=lambda name, source, device_str: kernels[name], wait=lambda names: None, pool=None
        )
        names: dict[str, Any] = {"_COMPILED": compiled, "__name__": "wrapper"}
        exec(compile(_on_the_cpu(case["wrapper"]), "wrapper", "exec"), names)
        return list(names["call"](list(case["inputs"])))


def main(given: str, result: str) -> None:
    interpreter._convert_float = _converted
    torch.cuda._DeviceGuard = lambda device: contextlib.nullcontext()  # type: ignore[assignment,misc]
    torch.cuda.set_device = lambda device: None
    torch.save([_run(case) for case in torch.load(given, weights_only=False)], result)


if __name__ == "__main__":
    main(*sys.argv[1:])
