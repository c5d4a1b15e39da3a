"""What the passes cost: time linear in layers, measured in calls, which no other load on the machine changes."""

import cProfile
import pstats

import pytest
import torch

from larosa_compile.passes.pipeline import rewrite
from tests.support.decoder import Decoder, choices_for, ids
from tests.support.graphs import capture_graph


def calls(layers: int, parallel: bool) -> int:
    """Function calls that the rewriting of a decoder takes."""
    torch.manual_seed(0)
    captured = capture_graph(Decoder(layers, parallel=parallel), ids(1, 5))
    with cProfile.Profile() as profile:
        rewrite(captured.graph, choices_for(layers, 0.5), captured.fake_mode)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


@pytest.mark.parametrize("parallel", [False, True])
def test_time_grows_linearly_with_layers(parallel: bool) -> None:
    calls(4, parallel)  # fills caches of fake tensors
    few, some, many = (calls(layers, parallel) for layers in (4, 8, 16))
    assert many - some < 2.2 * (some - few)
