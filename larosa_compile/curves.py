"""What a model costs and gains at several sparsities, measured: perplexity, and time per decoded token."""

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import larosa_compile
from larosa_compile import registry
from larosa_compile.decoding import ROOM, Spread, compare
from larosa_compile.errors import OptionError
from larosa_compile.evaluation import next_token_losses, perplexity
from larosa_compile.explanation import explain
from larosa_compile.loading import check_positions
from larosa_compile.machine import Bandwidth, device_name
from larosa_compile.recipe import Recipe

SPARSITIES = (0.25, 0.4, 0.5, 0.6, 0.75)
"""Nominal sparsities of a curve; the recipe's own is measured as well."""

PROMPT, TOKENS, ROUNDS = 128, 24, 4
"""Tokens of the prompt, tokens timed in a turn, and turns of each variant."""


@dataclass(frozen=True)
class Perplexities:
    """dense: of the uncompiled model; sparse: by nominal sparsity; protocol: how and on what, in one sentence."""

    dense: float
    sparse: dict[float, float]
    protocol: str


@dataclass(frozen=True)
class Speed:
    """One variant: seconds per decoded token, and the linear weight bytes that it reads for one.

    sparsity: nominal; None is the dense model under plain `torch.compile`.
    """

    sparsity: float | None
    seconds: Spread
    bytes: int


@dataclass(frozen=True)
class Speeds:
    """bandwidth: 10⁹ bytes per second of a plain sum, sampled between the turns."""

    variants: tuple[Speed, ...]
    bandwidth: Spread
    protocol: str

    def bound_s(self, variant: Speed) -> float:
        """The seconds that reading the variant's weights takes at the median bandwidth: no token can take less."""
        return variant.bytes / (self.bandwidth.median * 1e9)


def sparsities_around(recipe: Recipe) -> list[float]:
    """The sparsities of a curve, the recipe's own among them."""
    return sorted({*SPARSITIES, recipe.sparsity} - {0.0})


def perplexities(
    model: PreTrainedModel, recipe: Recipe, windows: Sequence[Tensor], done: Callable[[], None] = lambda: None
) -> Perplexities:
    """Perplexity dense and at several sparsities, every token sparse.

    windows: token ids `[1, tokens]` of one length. The rewritten graphs run with the definitions of the sparse ops:
    that is the function that is compiled, without compiling it once for each sparsity. `done` is called after each
    of `1 + len(sparsities_around(recipe))` evaluations.

    Raises:
        OptionError: there is no window, or they differ in length.
    """
    if not windows or len({window.shape for window in windows}) > 1:
        raise OptionError("perplexity needs windows of token ids, all of one length")
    dense = perplexity(next_token_losses(model, windows))
    done()
    sparse = {}
    for sparsity in sparsities_around(recipe):
        options: Any = {"recipe": recipe.with_sparsity(sparsity), "lowering": "eager", "self_check": False}
        sparse[sparsity] = perplexity(
            next_token_losses(torch.compile(model, backend="larosa", options=options), windows)
        )
        registry.drop_graphs()
        done()
    count, length = len(windows), windows[0].shape[1]
    return Perplexities(
        dense,
        sparse,
        f"{count} windows of {length} tokens, {count * (length - 1):,} tokens predicted; every token sparse; the "
        f"rewritten graph with the ops' definitions; {_conditions(model)}",
    )


def speeds(model: PreTrainedModel, recipe: Recipe, done: Callable[[], None] = lambda: None) -> Speeds:
    """Time per token of one greedy sequence: plain `torch.compile`, and the backend at several sparsities, in turns.

    `done` is called `speed_steps(recipe)` times on the way.

    Raises:
        OptionError: the model has no room for the prompt and the tokens.
    """
    check_positions(model, PROMPT + ROOM, f"a prompt of {PROMPT} tokens and {ROOM} behind it")
    recipes = [recipe.with_sparsity(sparsity) for sparsity in sparsities_around(recipe)]
    graphs = [explain(model, recipe=one).graphs for one in recipes]
    registry.drop_graphs()
    variants: dict[str, Any] = {"dense": torch.compile(model)}
    for one in recipes:
        options: Any = {"recipe": one}
        variants[f"{one.sparsity:g}"] = torch.compile(model, backend="larosa", options=options)
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.randint(vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(model.device)
    bandwidth = Bandwidth(model.device)
    found = compare(model, variants, prompt, TOKENS, ROUNDS, done=done, between=bandwidth.sample)
    registry.drop_graphs()
    sparse = (
        Speed(one.sparsity, found[f"{one.sparsity:g}"][1], sum(graph.sparse_bytes for graph in reports))
        for one, reports in zip(recipes, graphs, strict=True)
    )
    dense = Speed(None, found["dense"][1], sum(graph.dense_bytes for graph in graphs[0]))
    return Speeds(
        (dense, *sparse),
        bandwidth.taken(),
        f"one sequence, greedy, static cache, context {PROMPT}; {ROUNDS} rounds of {TOKENS} tokens, variants in turns; "
        f"bandwidth: sums of a buffer in between; {_conditions(model)}",
    )


def speed_steps(recipe: Recipe) -> int:
    """How often `speeds` says that a step is done."""
    return (1 + len(sparsities_around(recipe))) * (1 + ROUNDS)


def _conditions(model: PreTrainedModel) -> str:
    dtype = str(model.dtype).removeprefix("torch.")
    return (
        f"{dtype}, {device_name(model.device)}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"larosa_compile {larosa_compile.__version__}, {datetime.date.today().isoformat()}"
    )
