"""Models to decode with and the ways to run them, and where a token's time goes; how it is timed: the package's own."""

import gc
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.config as inductor_config
import torch._inductor.lowering  # imported first: starting from select_algorithm is a circular import
from torch._inductor import select_algorithm
from torch._inductor.codecache import PyCodeCache
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

import larosa_compile
from benchmarks import assets, measure, shapes
from larosa_compile.calibration import token_batches
from larosa_compile.decoding import Forward, Prompt
from larosa_compile.generation import unguarded
from larosa_compile.kernels.formats import FORMATS
from larosa_compile.memory import return_mapped
from larosa_compile.recipe import Recipe
from larosa_compile.recipe_checks import OWN_DTYPE

VARIANTS = ("eager", "inductor", "inductor-max", "larosa", *(f"larosa-{name}" for name in FORMATS))


@dataclass(frozen=True)
class Variant:
    """One of `VARIANTS`: a way to run a model. `sparsity` is larosa's, whose name also says the weights' format.

    guarded: Dynamo looks through all modules before every token.
    """

    name: str
    sparsity: float = 0.0
    guarded: bool = True

    def __str__(self) -> str:
        name = f"{self.name} {self.sparsity:.0%}" if self.is_larosa else self.name
        return name if self.guarded else f"{name}, unguarded"

    @property
    def is_larosa(self) -> bool:
        return self.name.partition("-")[0] == "larosa"

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe at this sparsity, for weights in this format."""
        return recipe.with_sparsity(self.sparsity).with_weights(self.name.partition("-")[2] or OWN_DTYPE)

    def forward(self, model: PreTrainedModel, recipe: Recipe | None, release: bool = False) -> Forward:
        """The model, to be called as this variant; what compiles does so at the first call.

        release: larosa's option `release_originals`.
        """
        if self.name == "eager":
            return model
        guards: dict[str, Any] = {} if self.guarded else unguarded()
        if self.name == "inductor":
            return torch.compile(model, options=guards or None)
        if self.name == "inductor-max":
            return Frozen(model)
        if self.name not in VARIANTS or recipe is None:
            raise ValueError(f"a variant is one of {', '.join(VARIANTS)}, larosa with a recipe; got {self.name!r}")
        options = {"recipe": self.of(recipe), "release_originals": release} | guards
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
        """Bytes of linear weights that one decode step reads."""
        return linear_bytes(self.model, variant.of(self.recipe) if self.recipe and variant.is_larosa else None)


def linear_bytes(model: PreTrainedModel, recipe: Recipe | None) -> int:
    """Bytes of linear weights that one token reads, dense without a recipe: a head counts, an embedding does not."""
    graphs = larosa_compile.explain(model, recipe=recipe).graphs
    return sum(graph.sparse_bytes if recipe else graph.dense_bytes for graph in graphs)


def forget_reading(model: PreTrainedModel) -> None:
    """What the eager model read of its file is no part of what a variant takes: neither held nor a peak."""
    return_mapped(model.parameters())
    measure.forget_peak()


def random_ids(model: PreTrainedModel, tokens: int, seed: int) -> torch.Tensor:
    """Token ids `[1, tokens]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (1, tokens), generator=generator)


SPARSE, DENSE, ATTENTION = "sparse products", "dense products", "attention"
GENERATED, OUTSIDE = "other generated kernels", "outside of kernels"
GROUPS = (SPARSE, DENSE, ATTENTION, GENERATED, OUTSIDE)

# The first that fits. A fused kernel is named after all it holds: one that holds attention, or only its masks and
# positions, bears its name or also writes the cache. The profiler puts `graph_0_` before generated kernels' names.
_PATTERNS = (
    (ATTENTION, re.compile(r"aten::.*scaled_dot_product|^(\w+_)?attend$|cpp_fused_\w*(scaled_dot_product|index_copy)")),
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
