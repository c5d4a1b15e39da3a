"""Bytes by kind and by layer add up to the report's, whatever the model."""

import pytest

from larosa_compile.tally import OUTSIDE, ROTATIONS, by_kind, by_layer, layer_of, local_name
from tests.support.reports import tiny_report


@pytest.mark.parametrize(
    ("paths", "layer", "name"),
    [
        (("model.layers.3.mlp.gate.weight", "model.layers.3.mlp.up.weight"), "model.layers.3", "mlp.gate + up"),
        (("h.11.attn.c.weight",), "h.11", "attn.c"),
        (("blocks.2.experts.7.w.weight",), "blocks.2", "experts.7.w"),
        (("head.weight",), OUTSIDE, "head"),
    ],
)
def test_names(paths: tuple[str, ...], layer: str, name: str) -> None:
    assert layer_of(paths[0]) == layer
    assert local_name(paths) == name


@pytest.mark.parametrize("architecture", ["llama", "olmo2"])
def test_tallies_add_up_to_the_report(architecture: str) -> None:
    report = tiny_report(architecture)
    for tallies in (by_kind(report), by_layer(report)):
        assert sum(tally.dense for tally in tallies) == report.dense_bytes
        assert sum(tally.sparse for tally in tallies) == report.sparse_bytes
        assert sum(tally.rotations for tally in tallies) == sum(item.bytes for item in report.online)
    names = [tally.name for tally in by_layer(report)]
    assert [layer_of(f"{name}.x") for name in names[:3]] == names[:3] and len(names) == 4
    assert names[-1] == OUTSIDE
    kinds = by_kind(report)
    assert len({tally.name for tally in kinds}) == len(kinds)
    assert (ROTATIONS in {tally.name for tally in kinds}) == bool(report.online)
