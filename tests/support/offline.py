"""Generated kernels compiled to machine code for GPUs that are not there, and what that code says of itself."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from torch._inductor import config as inductor_config
from torch._inductor.codecache import PyCodeCache
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.support.fake_gpu import GPUS, fake_gpu
from tests.support.gpu_programs import Kernel, Program

AMD = {"gfx942": (304, 64)}
"""Targets of AMD: processors and threads in a warp (of an MI300X)."""

TARGETS = (*GPUS, *AMD)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Load:
    """One load instruction from global memory. predicated: runs only where a mask, or a branch on one, says so."""

    bits: int
    predicated: bool


@dataclass(frozen=True)
class Binary:
    """Machine code of one kernel. shared: bytes; spills: instructions that move registers to memory and back."""

    kernel: str
    target: str
    warps: int
    registers: int
    spills: int
    shared: int
    instructions: int
    loads: tuple[Load, ...]


def tuner_of(kernel: Kernel) -> Any:
    """Inductor's autotuner of a kernel: the Triton function, its signature, the configurations it may run with."""
    with inductor_config.patch(use_static_cuda_launcher=False):
        return getattr(PyCodeCache.load(kernel.source), kernel.name)


def binaries(program: Program, target: str, prefix: str = "") -> Iterator[Binary]:
    """Kernels whose names begin so, in the configuration they run with unless tuned on a device: the first."""
    with fake_gpu(program.target):
        for kernel in (kernel for kernel in program.kernels if kernel.name.startswith(prefix)):
            yield _compiled(tuner_of(kernel), kernel.name, target)


def _compiled(tuner: Any, name: str, target: str) -> Binary:
    amd = target in AMD
    architecture: int | str = target if amd else int(target.removeprefix("sm_"))
    warp = AMD[target][1] if amd else 32
    tuner.device_props = tuner.device_props._replace(type="hip" if amd else "cuda", cc=architecture, warp_size=warp)
    config = tuner.configs[0]
    meta = tuner._create_compile_meta(config)
    source = ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
    options = tuner._create_compile_options(config, meta)
    made = triton.compile(source, target=GPUTarget(meta["device_type"], architecture, warp), options=options)
    shared, warps = made.metadata.shared, made.metadata.num_warps
    if amd:
        return _from_gcn(name, target, warps, shared, made.asm["amdgcn"])
    return _from_sass(name, target, warps, shared, made.asm["cubin"])


_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\d+)\s+)?([A-Z][\w.]*)", re.M)


def _from_sass(name: str, target: str, warps: int, shared: int, cubin: bytes) -> Binary:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _output("nvdisasm", "-c", file.name)
        usage = _output("cuobjdump", "-res-usage", file.name)
    instructions = [(predicate, code) for predicate, code in _SASS.findall(text) if code != "NOP"]
    loads = [
        Load(int(width.group()) if (width := re.search(r"(?<=\.)(?:64|128|256)\b", code)) else 32, bool(predicate))
        for predicate, code in instructions
        if code.startswith("LDG")
    ]
    spills = sum(code.startswith(("LDL", "STL")) for _, code in instructions)
    (registers,) = re.findall(r"REG:(\d+)", usage)
    return Binary(name, target, warps, int(registers), spills, shared, len(instructions), tuple(loads))


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


_GCN = re.compile(r"^\t([a-z]\w+)(?: .*)?$", re.M)


def _from_gcn(name: str, target: str, warps: int, shared: int, text: str) -> Binary:
    """Masks are branches here: a load is predicated where an instruction between labels narrowed the active lanes."""
    code = text.partition(".Lfunc_end")[0]
    found = []
    masked = False
    for line in code.splitlines():
        if line.startswith(".LBB"):
            masked = False
        masked |= "saveexec" in line or "s_and_b64 exec" in line
        load = re.match(r"\t(?:global|buffer)_load_(?:dword(x2|x3|x4)?|[us]?(?:short|byte)\w*)\b", line)
        if load:
            found.append(Load(32 * int((load.group(1) or "x1")[1:]), masked))
    registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
    spills = re.search(r"\.vgpr_spill_count:\s+(\d+)", text)
    assert registers and spills
    return Binary(name, target, warps, int(registers[1]), int(spills[1]), shared, len(_GCN.findall(code)), tuple(found))
