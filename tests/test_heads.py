"""Heads as sites: rotated behind the scale of their norm, sharing their weight with the embedding they are tied to."""

import pytest

from tests.support.decoder import FEATURES, Choice, Decoder, choices_for, ids
from tests.support.stages import changes, check_stages


@pytest.mark.parametrize("basis", ["h", None])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("positions", [0, 30])
def test_a_sparse_head_rotates_what_it_reads_and_shares_its_weight(
    basis: str | None, tied: bool, positions: int
) -> None:
    """A tied vocabulary matrix is there once: rows are looked up where the head's weight is stored."""
    head, vocab = "embedding.weight" if tied else "head.weight", 70
    choices = {**choices_for(2, 0.5), head: Choice(0.4, basis, "head")}
    stages = check_stages(Decoder(2, vocab=vocab, tied=tied, positions=positions), choices, ids(2, 5))
    # a sum of embeddings is rotated once unless one of them is in a basis already
    entering = {(basis if tied else None, "l0")} | ({(None, "l0")} if positions else set())
    leaving = {("l1", None)} | ({(None, basis)} if basis else set())
    assert changes(stages) == entering | {("l0", "l1")} | leaving
    assert not stages.plan.refusals
    graph, shapes = stages.captured.graph, [tensor.shape for tensor in stages.editor.folded.values()]
    assert shapes.count((FEATURES, vocab)) == 1
    assert (vocab, FEATURES) not in shapes
    (table,) = (node for node, path in graph.paths.items() if path == "embedding.weight")
    assert bool(table.users) == (not tied)


def test_hidden_states_of_a_model_with_a_sparse_head_leave_in_its_own_basis() -> None:
    choices = {**choices_for(2, 0.5), "embedding.weight": Choice(0.4, "h", "head")}
    check_stages(Decoder(2, vocab=70, tied=True, returns_hidden=True), choices, ids(2, 5))
