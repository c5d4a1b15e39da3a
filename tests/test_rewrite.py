"""Plan, rotate, fold and sparsify: after every stage the graph computes what the method says, and nothing more."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from larosa_compile.kernels import ops
from larosa_compile.kernels.support import refusal_reason
from larosa_compile.passes.bases import BasisChange, Place
from larosa_compile.passes.graph import Refusal, aten, is_call
from larosa_compile.passes.pipeline import rewrite
from larosa_compile.passes.plan import kept_features
from larosa_compile.passes.rotate import rotate_node
from tests.support.decoder import (
    FEATURES,
    LAYER,
    READERS,
    Choice,
    Decoder,
    Layer,
    LayerNorm,
    RMSNorm,
    choices_for,
    error,
    ids,
)
from tests.support.graphs import capture_graph
from tests.support.stages import Stages, changes, check_stages, evaluate


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def one_for_all(layer: int) -> str:
    return "all"


def own(layer: int) -> None:
    return None


def chain(*bases: str | None) -> set[tuple[str | None, str | None]]:
    return set(itertools.pairwise(bases))


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
@pytest.mark.parametrize(
    ("layers", "basis", "expected"),
    [
        (1, None, chain(None, "l0", None)),
        (3, None, chain(None, "l0", "l1", "l2", None)),
        (3, lambda layer: f"b{layer // 2}", chain(None, "b0", "b1", None)),
        (2, one_for_all, chain(None, "all", None)),
        (2, own, set()),
    ],
)
def test_online_rotations_are_the_changes_of_basis(
    layers: int, basis: Any, expected: set[Any], norm: Callable[[], nn.Module]
) -> None:
    """L layers with a basis each cost L + 1 matrices: one in, one between neighbours, one out."""
    choices = choices_for(layers, 0.5, basis) if basis else choices_for(layers, 0.5)
    assert changes(check_stages(Decoder(layers, norm=norm), choices, ids(2, 5))) == expected


@pytest.mark.parametrize(
    ("options", "sparsity", "shape"),
    [
        ({"returns_hidden": True}, 0.4, (5,)),
        ({"returns_hidden": True, "norm": LayerNorm}, 0.9, (2, 5)),
        ({"parallel": True}, 0.9, (2, 5)),
        ({"norm": nn.Identity}, 0.4, (2, 5)),
        ({"parallel": True, "norm": LayerNorm}, 0.0, (5,)),
        ({"positions": 30}, 0.9, (2, 5)),
        ({"vocab": 8, "positions": 10}, 0.4, (5,)),
        ({"tied": True}, 0.0, (2, 5)),
    ],
    ids=str,
)
def test_decoders(options: dict[str, Any], sparsity: float, shape: tuple[int, ...]) -> None:
    check_stages(Decoder(2, **options), choices_for(2, sparsity), ids(*shape))


@pytest.mark.parametrize(
    ("rotated", "parallel", "norm"),
    [
        (("q",), False, RMSNorm),
        (("q",), True, LayerNorm),
        (("q", "k", "v"), False, nn.Identity),
        (("gate", "up"), False, LayerNorm),
        (("gate", "up"), True, RMSNorm),
        (("q", "gate"), True, nn.Identity),
        (("q", "gate"), False, LayerNorm),
    ],
)
def test_only_some_readers_are_rotated(rotated: tuple[str, ...], parallel: bool, norm: Callable[[], nn.Module]) -> None:
    """Linears of one activation may want different bases; each gets its own."""
    check_stages(Decoder(2, parallel=parallel, norm=norm), choices_for(2, 0.5, rotated=rotated), ids(5))


@pytest.mark.parametrize(
    ("choice", "norm"),
    [
        (Choice(0.5, "other"), RMSNorm),
        (Choice(0.5, "other"), nn.Identity),
        (Choice(0.25, "l0"), LayerNorm),
        (Choice(0.5), LayerNorm),
        (Choice(0.0, "l0"), nn.Identity),
        (None, RMSNorm),
        (None, LayerNorm),
    ],
    ids=str,
)
def test_one_of_a_group_is_chosen_otherwise(choice: Choice | None, norm: Callable[[], nn.Module]) -> None:
    path = "layers.0.k.weight"
    choices = {**choices_for(1, 0.5), path: choice}
    stages = check_stages(Decoder(1, norm=norm), {p: c for p, c in choices.items() if c is not None}, ids(2, 5))
    refused = Refusal(path, "the recipe has no such site")
    assert (refused in stages.plan.refusals) == (choice is None)


def test_any_number_of_tokens() -> None:
    stages = check_stages(Decoder(1, positions=30), choices_for(1, 0.5), ids(2, 5), later=ids(3, 9))
    assert any(is_call(node, aten.sym_size.int) for node in stages.editor.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    stages = check_stages(Decoder(2, returns_hidden=True).to(dtype), choices_for(2), ids(2, 5))
    assert {tensor.dtype for tensor in stages.editor.folded.values()} == {dtype}


class Stack(nn.Module):
    """Layers on a hidden state that is an input of the graph, after a learnt first token."""

    def __init__(self, distinct: int, depth: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(1, 1, FEATURES))
        self.layers = nn.ModuleList(Layer() for _ in range(distinct))
        self.depth = depth

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1)
        for index in range(self.depth):
            x = self.layers[index % len(self.layers)](x)
        return (x[:, -1],)


@pytest.mark.parametrize(("distinct", "depth"), [(2, 2), (1, 2), (2, 4)], ids=["plain", "shared", "alternating"])
def test_inputs_and_parameters_may_enter_a_stream_and_weights_be_shared(distinct: int, depth: int) -> None:
    check_stages(Stack(distinct, depth), choices_for(distinct, 0.5), torch.randn(2, 4, FEATURES))


class LowRank(nn.Module):
    """Linear on linear, nothing between; the first linear starts the stream and is read at once."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.a = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, 8, bias=False)
        self.b, self.c = nn.Linear(8, FEATURES), nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = self.enter(x)
        x = x + self.b(self.a(x))
        return (x + torch.relu(self.c(x)),)


@pytest.mark.parametrize("basis", [None, "q"])
@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_a_site_may_read_the_product_of_another(basis: str | None, shape: tuple[int, ...]) -> None:
    names = {"enter": None, "a": basis, "b": None, "c": basis}
    choices = {f"{name}.weight": Choice(0.5, named) for name, named in names.items()}
    check_stages(LowRank(), choices, torch.randn(*shape, FEATURES))


@pytest.mark.parametrize(("vocab", "online"), [(FEATURES, False), (FEATURES + 1, True)])
@pytest.mark.parametrize("tied", [False, True])
def test_a_table_is_folded_only_where_it_is_smaller_than_the_rotation(vocab: int, online: bool, tied: bool) -> None:
    stages = check_stages(Decoder(1, vocab=vocab, tied=tied), choices_for(1), ids(2, 5))
    assert changes(stages) == ({(None, "l0"), ("l0", None)} if online else {("l0", None)})
    shapes = [tensor.shape for tensor in stages.editor.folded.values()]
    assert ((vocab, FEATURES) in shapes) == (not online)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_stays_dense_and_reads_the_model_s_own_basis(tied: bool) -> None:
    head = "embedding.weight" if tied else "head.weight"
    stages = check_stages(Decoder(1, tied=tied), choices_for(1), ids(2, 5))
    assert [refusal.site for refusal in stages.plan.refusals] == [head]
    assert "feeds no residual stream" in stages.plan.refusals[0].reason


def test_products_after_the_rewrite() -> None:
    """q/k/v are one product and so are gate/up; every product but the head's is sparse, rotations keep all."""
    stages = check_stages(Decoder(2), choices_for(2, 0.5), ids(2, 5))
    nodes = list(stages.editor.graph.nodes)
    kept = sorted(node.args[2] for node in nodes if is_call(node, ops.sparse_linear))
    rotations, half = [FEATURES] * 3, FEATURES // 2
    assert kept == sorted([*rotations, *[half] * 6, *[12] * 2])
    assert sum(is_call(node, aten.mm.default, aten.addmm.default) for node in nodes) == 1
    sites = {tuple(linear.path.split(".")[2] for linear in site.group.linears) for site in stages.plan.sites}
    assert sites == {("q", "k", "v"), ("o",), ("gate", "up"), ("down",)}


def test_the_pipeline_is_these_passes_in_order() -> None:
    model, x, choices = Decoder(2), ids(2, 5), choices_for(2, 0.5)
    stages = Stages(model, choices, x)
    expected = stages.run(x)["sparsify"]
    captured, seen = capture_graph(model, x), []
    done = rewrite(
        captured.graph, choices, captured.fake_mode, lambda stage, graph: seen.append((stage, len(graph.nodes)))
    )
    assert [stage for stage, _ in seen] == [
        "input",
        "analyse",
        "plan",
        "rotate",
        "fold",
        "sparsify",
        "decode",
    ]
    assert {(r.change.start, r.change.end) for r in done.online} == changes(stages)
    found = evaluate(captured, captured.graph.graph, done.folded, stages.rotations, (x,))
    assert error(found, [tensor.double() for tensor in expected]) == 0
    assert [t.key for t in done.folded.values()] == [t.key for t in stages.editor.folded.values()]


def test_stages_leave_the_graph_alone_without_choices() -> None:
    captured = capture_graph(Decoder(1), ids(2, 5))
    before = str(captured.graph.graph)
    done = rewrite(captured.graph, {}, captured.fake_mode)
    assert str(captured.graph.graph) == before
    assert not done.folded and not done.online
    assert {refusal.reason for refusal in done.plan.refusals if refusal.site != "head.weight"} == {
        "the recipe has no such site"
    }


def test_refusals_carry_the_reason() -> None:
    def reasons(model: nn.Module, choices: dict[str, Choice]) -> dict[str, str]:
        plan = Stages(model, choices, ids(2, 5)).plan
        return {refusal.site: refusal.reason for refusal in plan.refusals}

    rotated_o = choices_for(1, rotated=(*READERS, "o"))
    assert reasons(Decoder(1), rotated_o)["layers.0.o.weight"] == (
        "the recipe rotates its input to basis 'l0', but in this graph it reads no residual stream"
    )
    found = reasons(Decoder(1).double(), choices_for(1))
    expected = refusal_reason(torch.device("cpu"), torch.float64)
    assert expected is not None and "float64" in expected
    assert {found[f"layers.0.{name}.weight"] for name in LAYER} == {expected}


@pytest.mark.parametrize("features", [1, 7, 64, 4096])
def test_kept_features(features: int) -> None:
    assert kept_features(0.0, features) == features
    kept = [kept_features(step / 100, features) for step in range(100)]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] >= 1
    assert all(abs(k - (1 - step / 100) * features) <= 0.5 or k == 1 for step, k in enumerate(kept))


def test_a_rotation_there_and_back_changes_nothing() -> None:
    x = ids(2, 5)
    stages = Stages(Decoder(1), choices_for(1), x)
    before = stages.evaluate((x,))
    node = next(node for node in stages.editor.graph.nodes if is_call(node, aten.embedding.default))
    users = list(node.users)
    there = rotate_node(stages.editor, BasisChange(node, None, "l0", (), Place.ONLINE))
    back = rotate_node(stages.editor, BasisChange(there.result, "l0", None, (), Place.ONLINE))
    for user in users:
        user.replace_input_with(node, back.result)
    assert error(stages.evaluate((x,)), [tensor.double() for tensor in before]) <= 8 * torch.finfo(torch.float32).eps
