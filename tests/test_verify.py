"""The rules between passes: a graph that breaks one is a defect that names pass and node."""

import pytest
import torch

from larosa_compile.kernels import ops
from larosa_compile.passes.graph import GraphInvariantError, aten, is_call
from larosa_compile.passes.verify import verify
from tests.support.decoder import Decoder, choices_for, ids
from tests.support.stages import Stages


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_verify_rejects_a_broken_graph() -> None:
    def finished() -> Stages:
        stages = Stages(Decoder(1), choices_for(1, 0.5), ids(2, 5))
        stages.run(ids(2, 5))
        verify(stages.editor, stages.plan, "sparsify", stages.inputs)
        return stages

    def rejects(stages: Stages, rule: str) -> None:
        with pytest.raises(GraphInvariantError, match=rule):
            verify(stages.editor, stages.plan, "sparsify", stages.inputs)

    stages = finished()
    sparse = next(node for node in stages.editor.graph.nodes if is_call(node, ops.sparse_linear))
    with stages.editor.graph.inserting_before(sparse):
        dense = stages.editor.call("dense", aten.mm.default, *sparse.args[:2])
    sparse.replace_all_uses_with(dense)
    rejects(stages, "pass 'sparsify' at node 'dense': a folded weight is still read by a dense product")

    stages = finished()
    next(iter(stages.editor.created & {*stages.editor.graph.nodes})).meta.clear()
    rejects(stages, "carries no fake value")

    stages = finished()
    stages.editor.folded.popitem()
    rejects(stages, "an added input has no folded tensor")

    stages = finished()
    del stages.inputs[0]
    rejects(stages, "the original inputs must stay first and in order")


def test_verify_rejects_a_site_whose_product_is_still_there() -> None:
    stages = Stages(Decoder(1), choices_for(1), ids(2, 5))
    verify(stages.editor, stages.plan, "rotate", stages.inputs)
    with pytest.raises(GraphInvariantError, match="a planned site was not replaced"):
        verify(stages.editor, stages.plan, "fold", stages.inputs)
