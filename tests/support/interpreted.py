"""Generated programs run without a GPU: Triton kernels in Triton's interpreter, library calls by ATen on the CPU."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support import fake_gpu, offline
from tests.support.gpu_programs import Program

ROOT = Path(__file__).resolve().parent.parent.parent
_META = ("grid_type", "fixed_grid", "extra_launcher_args", "precomputed_grids", "combo_grid_meta")


def interpret(cases: Sequence[tuple[Program, Sequence[Any]]]) -> list[list[Tensor]]:
    """What each program returns for the arguments of its wrapper, CPU tensors; it may write to these.

    One process for all: the interpreter has to be asked for before triton is imported, and importing takes longer
    than a small kernel.
    """
    described = [{**_described(program), "inputs": list(arguments)} for program, arguments in cases]
    with tempfile.TemporaryDirectory() as folder:
        given, result = f"{folder}/given.pt", f"{folder}/result.pt"
        torch.save(described, given)
        run = subprocess.run(
            [sys.executable, "-m", "tests.support.interpreter_worker", given, result],
            cwd=ROOT,
            env=os.environ | {"TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode:
            raise RuntimeError(f"the interpreter failed:\n{run.stderr[-6000:]}")
        outputs: list[list[Tensor]] = torch.load(result)
    return outputs


def _described(program: Program) -> dict[str, Any]:
    kernels = []
    with fake_gpu.fake_gpu(program.target):
        for kernel in program.kernels:
            tuner = offline.tuner_of(kernel)
            meta = {key: value for key, value in tuner.inductor_meta.items() if key in _META}
            kernels.append(
                {"name": kernel.name, "source": kernel.source, "config": tuner.configs[0].kwargs, "meta": meta}
            )
    return {"wrapper": program.wrapper, "kernels": kernels}
