"""Rewritten copies of a captured graph: Inductor takes apart the one it compiles, the self-check needs a whole one."""

from collections.abc import Mapping
from dataclasses import dataclass

from larosa_compile.capture import Captured
from larosa_compile.passes.pipeline import Observer, Rewritten, pack, rewrite
from larosa_compile.passes.plan import SiteChoice
from larosa_compile.recipe import Recipe
from larosa_compile.recipe_checks import OWN_DTYPE
from larosa_compile.weights import FoldedWeights


@dataclass(frozen=True)
class Copy:
    """A copy of a captured graph, and how it was rewritten."""

    captured: Captured
    rewritten: Rewritten

    def weights(self, recipe: Recipe, release: bool = False) -> FoldedWeights:
        """Its folded weights, to be made; `release` as there."""
        return FoldedWeights(list(self.rewritten.folded.values()), self.captured, recipe, release)


def exact_copy(
    captured: Captured,
    choices: Mapping[str, SiteChoice],
    weights: str,
    observe: Observer = lambda stage, graph: None,
    dense_prompts: bool = False,
) -> Copy:
    """What is checked: as the graph for a format of weights, but not packed.

    choices: parameter path -> what the recipe says of that site. weights: a recipe's. dense_prompts: see `make_plan`.
    """
    own = captured.copy()
    # in fewer bits, a vocabulary matrix is no table to look embeddings up in
    return Copy(own, rewrite(own.graph, choices, own.fake_mode, observe, weights == OWN_DTYPE, dense_prompts))


def read_copy(
    captured: Captured,
    choices: Mapping[str, SiteChoice],
    weights: str,
    observe: Observer = lambda stage, graph: None,
    dense_prompts: bool = False,
) -> Copy:
    """What is compiled: packed, where a recipe asks for fewer bits. Arguments are those of `exact_copy`."""
    exact = exact_copy(captured, choices, weights, observe, dense_prompts)
    if weights == OWN_DTYPE:
        return exact
    own = exact.captured
    return Copy(own, pack(own.graph, exact.rewritten, weights, own.fake_mode, observe))
