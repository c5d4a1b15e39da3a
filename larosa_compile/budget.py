"""Bytes shared out between sites so that the last one saves as much everywhere."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Offer:
    """What a site could keep.

    savings: [features] float64, what the entry of rank 1, 2, … saves per byte, never rising. feature_bytes: what each
    costs. least, most: bounds on how many are kept.
    """

    savings: Tensor
    feature_bytes: int
    least: int
    most: int


def spend(offers: Mapping[str, Offer], budget: int) -> dict[str, int]:
    """How many features each site keeps, for the largest sum of savings that `budget` bytes buy.

    What is left is less than a feature costs anywhere that could still have one. Where even the least is more than the
    budget, the least is what is returned.
    """

    def kept_at(price: float) -> dict[str, int]:
        return {
            name: min(max(int((offer.savings > price).sum()), offer.least), offer.most)
            for name, offer in offers.items()
        }

    def cost(kept: Mapping[str, int]) -> int:
        return sum(offers[name].feature_bytes * count for name, count in kept.items())

    tiny = torch.finfo(torch.float64).tiny
    low, high = (torch.tensor(end, dtype=torch.float64).log() for end in (tiny, _highest(offers) + tiny))
    for _ in range(80):
        price = (low + high) / 2
        low, high = (price, high) if cost(kept_at(float(price.exp()))) > budget else (low, price)
    kept = kept_at(float(high.exp()))
    left = budget - cost(kept)
    while True:
        open_to = [name for name, offer in offers.items() if kept[name] < offer.most and offer.feature_bytes <= left]
        if not open_to:
            return kept
        best = max(open_to, key=lambda name: float(offers[name].savings[kept[name]]))
        kept[best] += 1
        left -= offers[best].feature_bytes


def _highest(offers: Mapping[str, Offer]) -> float:
    return max((float(offer.savings[0]) for offer in offers.values()), default=1.0)
