"""Greedy decoding of one sequence through a static cache: models and the ways to run them, timed token by token."""

import copy
import gc
import inspect
import re
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.config as inductor_config
import torch._inductor.lowering  # imported first: starting from select_algorithm is a circular import
from torch._inductor import select_algorithm
from torch._inductor.codecache import PyCodeCache
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel, StaticCache

import larosa_compile
from benchmarks import assets, shapes
from benchmarks.measure import Spread
from larosa_compile.calibration import token_batches
from larosa_compile.recipe import Recipe

Forward = Callable[..., Any]

VARIANTS = ("eager", "inductor", "inductor-max", "larosa")

ROOM = 128
"""Tokens that a cache has room for behind the prompt."""


@dataclass(frozen=True)
class Variant:
    """One of `VARIANTS`: a way to run a model. `sparsity` is larosa's."""

    name: str
    sparsity: float = 0.0

    def __str__(self) -> str:
        return f"{self.name} {self.sparsity:.0%}" if self.name == "larosa" else self.name

    def forward(self, model: PreTrainedModel, recipe: Recipe | None, release: bool = False) -> Forward:
        """The model, to be called as this variant; what compiles does so at the first call.

        release: larosa's option `release_originals`.
        """
        if self.name == "eager":
            return model
        if self.name == "inductor":
            return torch.compile(model)
        if self.name == "inductor-max":
            return Frozen(model)
        if self.name != "larosa" or recipe is None:
            raise ValueError(f"a variant is one of {', '.join(VARIANTS)}, larosa with a recipe; got {self.name!r}")
        options: Any = {"recipe": recipe.with_sparsity(self.sparsity), "release_originals": release}
        return torch.compile(model, backend="larosa", options=options)


class Frozen:
    """Inductor's max-autotune with the weights frozen into the graph, which is a setting while the first call compiles.

    As an option of `torch.compile` it would come too late: Dynamo reads it as well.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._compiled: Forward = torch.compile(model, mode="max-autotune")
        self._called = False

    def __call__(self, **inputs: Any) -> Any:
        if self._called:
            return self._compiled(**inputs)
        self._called = True
        quiet = {"freezing": True, "max_autotune_report_choices_stats": False}
        with (
            inductor_config.patch(quiet),
            patch.object(select_algorithm, "PRINT_AUTOTUNE", False),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # met inside the autotuner
            return self._compiled(**inputs)


def forget_compiled() -> None:
    """Drops all compiled graphs, with the weights that they hold."""
    torch.compiler.reset()
    for module in PyCodeCache.modules:
        # Inductor keeps the modules that it generated, and these keep frozen weights
        for name, constant in list(vars(module).items()):
            if isinstance(constant, torch.Tensor):
                delattr(module, name)
    PyCodeCache.cache_clear()
    gc.collect()


@dataclass(frozen=True)
class Subject:
    """A model in bfloat16, a recipe for it where one is needed, and prompts `[1, context]` by context."""

    name: str
    layers: int
    model: PreTrainedModel
    recipe: Recipe | None
    prompts: dict[int, torch.Tensor]

    @classmethod
    def prepared(
        cls, name: str, layers: int | None, contexts: Sequence[int], calibrated: bool, windows: int = 24
    ) -> "Subject":
        """Random token ids for a model of a known shape; wiki text for a real one, `windows` of it to calibrate."""
        if name in shapes.SHAPES:
            model = shapes.build(name, layers)
            calibration = [random_ids(model, 256, seed=1)]
            prompts = {context: random_ids(model, context, seed=2) for context in contexts}
        else:
            loaded, tokenizer = assets.load_model(name, torch.bfloat16)
            model, text = shapes.without_gradients(loaded), assets.text("wiki")
            calibration = list(token_batches(text, tokenizer, 1024))[:windows]
            prompts = {context: list(token_batches(text, tokenizer, context))[-1] for context in contexts}
        recipe = larosa_compile.calibrate(model, calibration, sparsity=0.5) if calibrated else None
        return cls(name, model.config.num_hidden_layers, model, recipe, prompts)

    def weight_bytes(self, variant: Variant) -> int:
        """Bytes of linear weights that one decode step reads: a head counts, tied or not, an embedding does not."""
        recipe = self.recipe.with_sparsity(variant.sparsity) if self.recipe and variant.name == "larosa" else None
        graphs = larosa_compile.explain(self.model, recipe=recipe).graphs
        return sum(graph.sparse_bytes if recipe else graph.dense_bytes for graph in graphs)


def random_ids(model: PreTrainedModel, tokens: int, seed: int) -> torch.Tensor:
    """Token ids `[1, tokens]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (1, tokens), generator=generator)


@dataclass(frozen=True)
class Prompt:
    """A prompt that the eager model has read: its length, the cache, and the token `[1, 1]` that comes next."""

    length: int
    cache: StaticCache
    token: torch.Tensor

    @classmethod
    def read_by(cls, model: PreTrainedModel, ids: torch.Tensor) -> "Prompt":
        """ids: [1, length]."""
        length = ids.shape[1]
        cache = StaticCache(config=model.config, max_cache_len=length + ROOM)
        # all logits of a long prompt would be the largest tensor of the process
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        with torch.no_grad():
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, **last)
        return cls(length, cache, output.logits[:, -1:].argmax(-1))

    def decode_seconds(self, forward: Forward, tokens: int) -> list[float]:
        """Seconds of each decoded token; every call starts behind the prompt, with a copy of its cache."""
        if tokens > ROOM:
            raise ValueError(f"the cache has room for {ROOM} tokens behind the prompt, got {tokens}")
        cache, step = copy.deepcopy(self.cache), self.token
        seconds = []
        with torch.no_grad():
            for index in range(tokens):
                position = torch.tensor([[self.length + index]])
                start = time.perf_counter()
                output = forward(input_ids=step, past_key_values=cache, use_cache=True, position_ids=position)
                step = output.logits[:, -1:].argmax(-1)
                seconds.append(time.perf_counter() - start)
        return seconds


def decode_seconds(model: PreTrainedModel, forward: Forward, prompt: torch.Tensor, tokens: int) -> list[float]:
    """Seconds of each decoded token; the prompt `[1, length]` is processed by the eager model and not timed."""
    return Prompt.read_by(model, prompt).decode_seconds(forward, tokens)


def compare(
    model: PreTrainedModel,
    variants: dict[str, Forward],
    prompt: torch.Tensor,
    tokens: int,
    rounds: int,
    done: Callable[[], None] = lambda: None,
    between: Callable[[], None] = lambda: None,
) -> dict[str, tuple[float, Spread]]:
    """Variant -> (seconds to its first tokens, compile included; spread of the seconds per token over all rounds).

    The variants take turns, so that a machine that slows down slows all of them down. `done` is called after every
    turn, `between` after those that are timed.
    """
    read = Prompt.read_by(model, prompt)
    warm = {}
    for name, forward in variants.items():
        start = time.perf_counter()
        read.decode_seconds(forward, 4)
        warm[name] = time.perf_counter() - start
        done()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, forward in variants.items():
            # the first token of a turn finds the caches full of the other variant's weights
            seconds[name] += read.decode_seconds(forward, tokens + 1)[1:]
            between()
            done()
    return {name: (warm[name], Spread.of(values)) for name, values in seconds.items()}


SPARSE, DENSE, ATTENTION = "sparse products", "dense products", "attention"
GENERATED, OUTSIDE = "other generated kernels", "outside of kernels"
GROUPS = (SPARSE, DENSE, ATTENTION, GENERATED, OUTSIDE)

# The first that fits. A fused kernel is named after all it holds: one that holds attention, or only its masks and
# positions, bears its name or also writes the cache. The profiler puts `graph_0_` before generated kernels' names.
_PATTERNS = (
    (ATTENTION, re.compile(r"aten::.*scaled_dot_product|cpp_fused_\w*(scaled_dot_product|index_copy)")),
    (GENERATED, re.compile(r"cpp_fused_")),
    (
        DENSE,
        re.compile(r"aten::(mm|addmm|bmm|baddbmm|mv|addmv|linear|matmul)$|mkldnn::|aten::mkldnn|gemm_m\d+n\d+k\d+"),
    ),
    (SPARSE, re.compile(r"^(\w+_)?kernel$")),
)


def kernel_group(name: str) -> str | None:
    """Where the time of a profiler's event belongs; None for what is no kernel, but may hold some."""
    return next((group for group, pattern in _PATTERNS if pattern.search(name)), None)


def time_split(prompt: Prompt, forward: Forward, tokens: int) -> dict[str, float]:
    """Milliseconds per token by group of kernels, under the profiler.

    Sparse products are all that our templates compute: rotations, and dense products that were left to them, too.
    Generated kernels show if they were compiled with Inductor's `cpp.enable_kernel_profile`.
    """
    with profile(activities=[ProfilerActivity.CPU]) as run:
        seconds = prompt.decode_seconds(forward, tokens)
    split = dict.fromkeys(GROUPS, 0.0)
    _add_times([event for event in run.events() or [] if event.cpu_parent is None], split)
    split = {group: total / tokens for group, total in split.items()}
    return split | {OUTSIDE: sum(seconds) / tokens * 1e3 - sum(split.values())}


def _add_times(events: Iterable[Any], split: dict[str, float]) -> None:
    for event in events:
        group = kernel_group(event.name)
        if group is None:
            _add_times(event.cpu_children, split)
        else:
            split[group] += event.time_range.elapsed_us() / 1e3
