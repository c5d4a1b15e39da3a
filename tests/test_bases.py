"""Where bases change, and at what cost: the plan is the cheaper one, and what it says is free is gone when folded."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from larosa_compile.passes.bases import BasisChange, Place
from tests.support.blocks import HIDDEN, VOCAB, Block, Branch, D, Function, Model, Norm, random_ids, rms, small_block
from tests.support.stages import Stages, by_layer, check_graph, online_bytes, rotated_streams
from tests.support.structures import adapters, online

MATRIX = 4 * D * D
"""Bytes of one rotation in single precision."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def places(stages: Stages) -> dict[Place, int]:
    return {place: sum(change.place is place for change in stages.plan.changes) for place in Place}


class Layout(Block):
    def __init__(self, combine: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__(lambda: Branch(HIDDEN), lambda: Branch(HIDDEN - 4))
        self.combine = combine
        self.post_1, self.post_2 = Norm(), Norm()

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(self, x)


def pre(m: Any, x: Tensor) -> Tensor:
    x = x + m.attn(m.norm_1(x))
    return x + m.mlp(m.norm_2(x))


def sandwich(m: Any, x: Tensor) -> Tensor:
    x = x + m.post_1(m.attn(m.norm_1(x)))
    return x + m.post_2(m.mlp(m.norm_2(x)))


def half_sandwich(m: Any, x: Tensor) -> Tensor:
    x = x + m.attn(m.norm_1(x))
    return x + m.post_2(m.mlp(m.norm_2(x)))


def unscaled_sandwich(m: Any, x: Tensor) -> Tensor:
    x = x + rms(m.attn(m.norm_1(x)))
    return x + rms(m.mlp(m.norm_2(x)))


def one_group(m: Any, x: Tensor) -> Tensor:
    y = m.norm_1(x)
    return x + m.attn(y) + m.mlp(y)


@pytest.mark.parametrize(
    ("layout", "rotations"),
    [(pre, lambda n: n + 1), (sandwich, lambda n: 2 * n), (half_sandwich, lambda n: 2 * n), (one_group, lambda n: n)],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_cheaper_assignment_is_chosen(
    layout: Callable[[Any, Tensor], Tensor], rotations: Callable[[int], int], layers: int
) -> None:
    """Adapters at the boundaries of layers, or a rotation for each group of readers, whichever are fewer."""
    model = Model(lambda: Layout(layout), layers)
    cheaper = Stages(model, by_layer(), random_ids())
    with rotated_streams():
        rotated = Stages(model, by_layer(), random_ids())
    groups = {(site.reader.source, site.basis) for site in cheaper.plan.sites if site.reader}
    assert online_bytes(cheaper.plan) == MATRIX * rotations(layers)
    assert online_bytes(cheaper.plan) <= min(MATRIX * len(groups), counted(rotated))


def counted(stages: Stages) -> int:
    return MATRIX * places(stages)[Place.ONLINE]


@pytest.mark.parametrize("norm", ["layer norm", "root mean square", "none"])
def test_norms_cost_no_rotation(norm: str) -> None:
    """Neither their statistics nor their scales and shifts: what stands before a folded linear is gone with it."""
    spelled: dict[str, Callable[..., Tensor]] = {
        "layer norm": lambda x, scale, shift: F.layer_norm(x, (D,), scale, shift),
        "root mean square": lambda x, scale, shift: rms(x) * scale,
        "none": lambda x, scale, shift: x,
    }
    model = Model(lambda: small_block(lambda: Norm(spelled[norm])), 2, norm=lambda: Norm(spelled[norm]))
    stages = check_graph(model, random_ids())
    assert online(stages) == adapters(2)
    # each of two layers: two writers, of which the last ends in the model's basis, and two groups of readers
    assert places(stages)[Place.WEIGHT] == 3
    assert places(stages)[Place.NOWHERE] >= 4


def test_a_norm_without_scale_between_writer_and_stream_is_folded_too() -> None:
    """A length stays what it is when the writer's weight is rotated."""
    stages = check_graph(Model(lambda: Layout(unscaled_sandwich), 2), random_ids())
    assert online(stages) == adapters(2)


@pytest.mark.parametrize(
    ("rows", "width", "place"),
    [(D, D, Place.PARAMETER), (D + 1, D, Place.ONLINE), (VOCAB, D, Place.ONLINE)],
)
def test_tables_are_rotated_where_that_reads_less(rows: int, width: int, place: Place) -> None:
    stages = check_graph(Model(small_block, embed=lambda: nn.Embedding(rows, width)), torch.randint(0, rows, (2, 5)))
    (entering,) = [
        change for change in stages.plan.changes if change.start is None and change.place is not Place.WEIGHT
    ]
    assert entering.place is place
    assert entering.bytes == (MATRIX if place is Place.ONLINE else 0)


SUMS: dict[str, tuple[Callable[[Any, Tensor], Tensor], list[Place]]] = {
    "of two tables": (lambda m, ids: m.words(ids) + m.words(ids + 1), [Place.ONLINE]),
    "of a table and a parameter": (lambda m, ids: m.words(ids) + m.places[:, : ids.shape[1]], [Place.ONLINE]),
    "of parts of parameters": (lambda m, ids: m.places[:, :5] + m.places[:, 2:7], [Place.ONLINE]),
    "a parameter": (lambda m, ids: m.places[:, :5].expand(2, -1, -1), [Place.PARAMETER]),
    "tokens": (
        lambda m, ids: torch.cat([m.places[:, :2].expand(2, -1, -1), m.words(ids)], 1),
        [Place.PARAMETER, Place.ONLINE],
    ),
}


@pytest.mark.parametrize("name", SUMS)
def test_what_enters_is_rotated_once(name: str) -> None:
    """A sum of what can only be rotated online is rotated as a sum; parameters are rotated as the stream meets them."""
    function, expected = SUMS[name]
    parts = {"words": nn.Embedding(VOCAB + 1, D), "places": nn.Parameter(torch.randn(1, 9, D))}
    stages = check_graph(Model(small_block, embed=lambda: Function(function, **parts)), random_ids())
    entering = [change for change in stages.plan.changes if change.start is None]
    assert sorted((c.place for c in entering if c.place is not Place.WEIGHT), key=str) == sorted(expected, key=str)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_matrix_in_the_stream_s_precision(dtype: torch.dtype) -> None:
    stages = Stages(Model(small_block).to(dtype), by_layer(), random_ids())
    assert {change.bytes for change in stages.plan.changes} == {0, D * D * dtype.itemsize}
    source = stages.plan.changes[0].source
    free = [BasisChange(source, None, "s0l0", (), place).bytes for place in Place if place is not Place.ONLINE]
    assert not any(free)


def test_nothing_is_rotated_where_nothing_is_chosen() -> None:
    stages = Stages(Model(small_block), {}, random_ids())
    assert not stages.plan.changes
    assert set(stages.plan.bases.values()) == {None}
