"""One peer in a process of its own, for `benchmarks.peers`: loads a model, decodes and predicts text when asked.

As a program it reads JSON lines: a `Job` first, then requests, `{"decode": tokens}` or `{"losses": true}`. It answers
every line with one: `{"ready": true}` once the model is loaded and warm, `{"seconds": […]}` per decoded token,
`{"losses": […]}` in nats per window of the job with `"bytes"` of linear weights that a token reads, or `{"error": "why
not"}`.

Decoding is the same everywhere: one sequence, the prompt first and not timed, then greedy, token by token. What a
runtime needs besides the model, a GGUF file of some type or a recipe, is written to the job's folder by the first
process that asks for it.
"""

import importlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import transformers
from torch._inductor import config as inductor_config

import larosa_compile
from benchmarks import assets, decoding, gguf_files
from larosa_compile import loading
from larosa_compile.decoding import decode_seconds
from larosa_compile.evaluation import next_token_losses
from larosa_compile.generation import unguarded
from larosa_compile.recipe_checks import OWN_DTYPE

WARM_UP = 4  # tokens decoded before the first timed ones: compilation, first touches of memory

LLAMA_OPTIONS = {"avx2": "AVX2", "fma3": "FMA", "f16c": "F16C", "avx512_bw": "AVX512"} | {
    f"avx512_{name}": f"AVX512_{name.upper()}" for name in ("vbmi", "vnni", "bf16")
}


@dataclass(frozen=True)
class Job:
    """What one process is to run; `folder` is for files made from the model, token ids are plain lists."""

    runtime: str  # a key of RUNTIMES
    model: str  # what `assets.load_model` takes
    gguf: str | None  # the model's GGUF file, for runtimes that read nothing else
    weights: str  # "bf16", a format such as "int8", or a type of GGUF files such as "q8_0"
    sparsity: float
    threads: int
    folder: str
    prompt: list[int]
    windows: list[list[int]]  # of one length
    calibration: list[list[int]]
    recipe: str | None = None  # a file, where larosa is not to calibrate

    @property
    def gguf_file(self) -> Path:
        """The model's file with the job's weights."""
        assert self.gguf is not None, "benchmarks.peers starts no such runtime without one"
        return gguf_files.gguf_file(Path(self.gguf), self.weights, Path(self.folder))


class Torch:
    """A model of transformers through `torch.compile`: Inductor's, with int8 weights by torchao, or larosa's."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        inductor_config.freezing = job.runtime == "frozen"  # Inductor's own kernels for int8 weights need constants
        self._job = job
        # without the tokenizer, which takes a quarter of a minute of a GGUF file: a job is in tokens
        self._model = loading.load_model(assets.source(job.model), torch.bfloat16, "cpu")
        if job.weights == "int8" and job.runtime != "larosa":
            torchao = importlib.import_module("torchao.quantization")
            torchao.quantize_(self._model, torchao.Int8WeightOnlyConfig())
        self._compiled = self._compile()

    def decode(self, tokens: int) -> list[float]:
        return decode_seconds(self._model, self._compiled, torch.tensor([self._job.prompt]), tokens)

    def losses(self) -> list[float]:
        # a second shape would make Dynamo compile the first one again, for any shape
        torch._dynamo.reset()
        return next_token_losses(self._compile(), [torch.tensor([window]) for window in self._job.windows])

    def weight_bytes(self) -> int | None:
        if self._job.runtime == "larosa":
            return decoding.linear_bytes(self._model, self._recipe())
        # of a quantised subclass of Tensor the graph says what its values would take
        return decoding.linear_bytes(self._model, None) if self._job.weights == "bf16" else None

    def _compile(self) -> Any:
        if self._job.runtime != "larosa":
            return torch.compile(self._model, options=unguarded())
        return torch.compile(self._model, backend="larosa", options=unguarded(recipe=self._recipe()))

    def _recipe(self) -> larosa_compile.Recipe:
        """At the job's sparsity, for weights in the job's format."""
        weights = {"bf16": OWN_DTYPE}.get(self._job.weights, self._job.weights)
        return self._calibrated().with_sparsity(self._job.sparsity).with_weights(weights)

    def _calibrated(self) -> larosa_compile.Recipe:
        if self._job.recipe is not None:
            return larosa_compile.Recipe.load(self._job.recipe)
        path = Path(self._job.folder) / "recipe.safetensors"
        if not path.exists():
            windows = [torch.tensor([window]) for window in self._job.calibration]
            larosa_compile.calibrate(self._model, windows, sparsity=0.5, progress=False).save(path)
        return larosa_compile.Recipe.load(path)


class LlamaCpp:
    """llama.cpp through llama-cpp-python, one call of the library per token: its samplers would only add to that."""

    def __init__(self, job: Job) -> None:
        self._job, self._path = job, job.gguf_file
        self._library = importlib.import_module("llama_cpp")
        self._llama = self._loaded(len(job.prompt) + 128, every_logit=False)

    def decode(self, tokens: int) -> list[float]:
        library, context = self._library, self._llama.ctx
        library.llama_memory_clear(library.llama_get_memory(context), True)
        step, seconds = self._next(self._job.prompt), []
        for _ in range(tokens):
            start = time.perf_counter()
            step = self._next([step])
            seconds.append(time.perf_counter() - start)
        return seconds

    def losses(self) -> list[float]:
        llama = self._llama = self._loaded(len(self._job.windows[0]), every_logit=True)
        found = []
        for window in self._job.windows:
            llama.reset()
            llama.eval(window)
            logits = torch.from_numpy(llama.scores[: len(window) - 1])
            found.append(torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:])).item())
        return found

    def weight_bytes(self) -> int:
        return gguf_files.linear_bytes(self._path)

    def _loaded(self, context: int, every_logit: bool) -> Any:
        sizes = dict.fromkeys(("n_ctx", "n_batch", "n_ubatch"), context)
        threads = dict.fromkeys(("n_threads", "n_threads_batch"), self._job.threads)
        return self._library.Llama(str(self._path), logits_all=every_logit, verbose=False, **sizes, **threads)

    def _next(self, tokens: list[int]) -> int:
        library, context = self._library, self._llama.ctx
        ids = (library.llama_token * len(tokens))(*tokens)  # the batch points to it, and does not keep it alive
        if code := library.llama_decode(context, library.llama_batch_get_one(ids, len(tokens))):
            raise RuntimeError(f"llama_decode returned {code}")
        logits = np.ctypeslib.as_array(library.llama_get_logits_ith(context, -1), (self._llama.n_vocab(),))
        return int(logits.argmax())


class OpenVino:
    """OpenVINO GenAI on a GGUF file, with its defaults for everything but the number of threads."""

    def __init__(self, job: Job) -> None:
        self._job, self._path = job, job.gguf_file
        self._genai = importlib.import_module("openvino_genai")
        self._tensor = importlib.import_module("openvino").Tensor
        self._properties = {"INFERENCE_NUM_THREADS": job.threads}
        self._pipeline = self._genai.LLMPipeline(str(self._path), "CPU", **self._properties)

    def decode(self, tokens: int) -> list[float]:
        # the first token comes out of the prompt
        results = self._pipeline.generate(self._ids(self._job.prompt), self._greedy(tokens + 1))
        microseconds = results.perf_metrics.raw_metrics.m_durations
        if len(microseconds) != tokens:
            raise RuntimeError(f"asked for {tokens} tokens after the first, got {len(microseconds)}")
        return [duration / 1e6 for duration in microseconds]

    def losses(self) -> list[float]:
        """By the pipeline that serves several requests: the other one shows no probabilities."""
        del self._pipeline
        schedule = self._genai.SchedulerConfig()
        schedule.max_num_batched_tokens = len(self._job.windows[0])
        pipeline = self._genai.ContinuousBatchingPipeline(str(self._path), schedule, "CPU", properties=self._properties)
        config = self._greedy(1)
        config.echo, config.logprobs = True, 1
        found = []
        for number, window in enumerate(self._job.windows):
            request = pipeline.add_request(number, self._ids(window), config)
            while pipeline.has_non_finished_requests():
                pipeline.step()
            (output,) = request.read_all()
            if output.generated_ids[: len(window)] != window:
                raise RuntimeError("the pipeline did not echo the tokens it was given")
            # the first token has no probability, and the last is the one that was generated
            found.append(-sum(output.generated_log_probs[1 : len(window)]) / (len(window) - 1))
        return found

    def weight_bytes(self) -> None:
        """What it makes of the file is its own business."""

    def _ids(self, tokens: list[int]) -> Any:
        return self._tensor(np.array([tokens], dtype=np.int64))

    def _greedy(self, tokens: int) -> Any:
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, True, False
        return config


Runtime = Torch | LlamaCpp | OpenVino
"""`decode` gives the seconds of each of so many tokens after the prompt, `losses` the mean loss of each window,
`weight_bytes` what a token reads of linear weights, where that is known."""

RUNTIMES: dict[str, Callable[[Job], Runtime]]
RUNTIMES = {"torch": Torch, "frozen": Torch, "larosa": Torch, "llama.cpp": LlamaCpp, "openvino": OpenVino}


def version(package: str) -> str | None:
    """Of the installed package; None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def install_hint(package: str) -> str:
    """The command that installs a package; llama.cpp is compiled, for the instructions that torch sees here."""
    # a native build goes by what the processor shows, and crashes where a virtual machine shows AMX without giving it
    able = torch.cpu.get_capabilities() if package == "llama-cpp-python" else {}
    options = [f"-DGGML_{option}=ON" for flag, option in LLAMA_OPTIONS.items() if able.get(flag)]
    arguments = f'CMAKE_ARGS="{" ".join(["-DGGML_NATIVE=OFF", *options])}" ' if options else ""
    return f"{arguments}pip install {package}"


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answers requests, of which the first is the job, until there are no more."""
    runtime: Runtime | None = None
    for line in requests:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            if runtime is None:
                job = Job(**request)
                runtime = RUNTIMES[job.runtime](job)
                runtime.decode(WARM_UP)
                answer = {"ready": True}
            elif "decode" in request:
                answer = {"seconds": runtime.decode(request["decode"])}
            else:
                answer = {"losses": runtime.losses(), "bytes": runtime.weight_bytes()}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    """The process's entry: answers go to standard output, whatever the libraries print to standard error."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
