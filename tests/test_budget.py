"""Sharing out bytes: compared with trying everything."""

import itertools

import pytest
import torch

from larosa_compile.budget import Offer, spend


def offers(seed: int) -> dict[str, Offer]:
    """Three small sites, two of which cost as much a feature as the third's two."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, each in (("a", 1), ("b", 1), ("c", 2)):
        savings = torch.rand(6, generator=generator, dtype=torch.float64).sort(descending=True).values
        made[name] = Offer(savings, each, 1, 5)
    return made


def saved(given: dict[str, Offer], kept: dict[str, int]) -> float:
    return sum(float(offer.savings[: kept[name]].sum()) * offer.feature_bytes for name, offer in given.items())


def cost(given: dict[str, Offer], kept: dict[str, int]) -> int:
    return sum(offer.feature_bytes * kept[name] for name, offer in given.items())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", range(4, 21))
def test_nothing_else_within_the_budget_saves_more_than_a_feature_more(seed: int, budget: int) -> None:
    given = offers(seed)
    kept = spend(given, budget)
    assert cost(given, kept) <= budget
    assert all(offer.least <= kept[name] <= offer.most for name, offer in given.items())
    choices = [dict(zip(given, counts, strict=True)) for counts in itertools.product(range(1, 6), repeat=3)]
    best = max(saved(given, other) for other in choices if cost(given, other) <= budget)
    # whole features cannot always be split so that nothing is left: what a byte saves at most is the difference
    assert saved(given, kept) >= best - max(float(offer.savings[0]) for offer in given.values())


@pytest.mark.parametrize("budget", [7, 12, 17])
def test_what_is_left_buys_no_further_feature(budget: int) -> None:
    given = offers(0)
    kept = spend(given, budget)
    left = budget - cost(given, kept)
    assert not [name for name, offer in given.items() if kept[name] < offer.most and offer.feature_bytes <= left]


def test_bounds_come_before_the_budget_and_before_savings() -> None:
    given = offers(1)
    assert spend(given, 0) == dict.fromkeys(given, 1)
    assert spend(given, 1000) == dict.fromkeys(given, 5)
    assert spend({}, 10) == {}


def test_what_saves_nothing_is_bought_last() -> None:
    nothing, something = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    assert spend({"n": Offer(nothing, 1, 1, 4), "s": Offer(something, 1, 1, 4)}, 6) == {"n": 2, "s": 4}
