"""Linear sites: every spelling of `x @ W + b` is found, and linears of one activation are one group."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from larosa_compile.capture import Captured
from larosa_compile.passes.canonical import canonicalise
from larosa_compile.passes.linears import Linear, chain_to_origin, find_linears, group_by_activation
from larosa_compile.passes.rewriting import GraphEditor
from tests.support.graphs import capture_graph

IN, OUT, ROWS = 24, 16, 5  # Inductor turns one-row products of at most 16 x 16 into sums


class Model(nn.Module):
    """Parameters for every spelling; `function(self, x)` is what it computes."""

    def __init__(self, function: Callable[["Model", Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.q, self.k = nn.Linear(IN, OUT), nn.Linear(IN, OUT, bias=False)
        self.v, self.part = nn.Linear(IN, 4), nn.Linear(IN // 2, OUT)
        self.stored = nn.Parameter(torch.randn(IN, OUT))
        self.bias = nn.Parameter(torch.randn(OUT))
        self.row_bias = nn.Parameter(torch.randn(ROWS, OUT))
        self.one_bias = nn.Parameter(torch.randn(1))
        self.experts = nn.Parameter(torch.randn(2, IN, OUT))
        self.wide = nn.Parameter(torch.randn(IN, 32))
        self.uneven = nn.Parameter(torch.randn(2, 20, IN))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def captured(function: Callable[[Model, Tensor], Tensor], *shape: int) -> tuple[Model, Captured]:
    model = Model(function)
    return model, capture_graph(model, torch.randn(*(shape or (ROWS, IN))))


def check(linear: Linear, model: Model, weight: Tensor, bias: Tensor | None) -> None:
    """Facts agree with the graph's fake values, expressions with the real parameters."""
    parameters = dict(model.named_parameters())
    assert torch.equal(linear.weight.evaluate(parameters), weight)
    assert (linear.in_features, linear.out_features) == weight.shape
    assert (linear.bias is None) == (bias is None)
    assert linear.bias is None or torch.equal(linear.bias.evaluate(parameters).reshape(-1), bias)
    assert linear.activation.meta["val"].shape[-1] == linear.in_features
    assert linear.product.meta["val"].shape[-1] == linear.out_features
    assert linear.weight_bytes == weight.numel() * linear.product.meta["val"].dtype.itemsize


@pytest.mark.parametrize("shape", [(IN,), (ROWS, IN), (1, IN), (2, 3, IN), (2, 3, 4, IN)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_linear_modules_of_every_rank(shape: tuple[int, ...], biased: bool) -> None:
    name = "q" if biased else "k"
    model, graph = captured(lambda m, x: (m.q if biased else m.k)(x).relu(), *shape)
    (linear,), refusals = find_linears(graph.graph)
    module = getattr(model, name)
    check(linear, model, module.weight.T, module.bias)
    assert linear.path == f"{name}.weight"
    assert not refusals


SPELLINGS: dict[str, tuple[Callable[[Model, Tensor], Tensor], bool]] = {
    "matmul": (lambda m, x: x @ m.stored, False),
    "matmul and add": (lambda m, x: x @ m.stored + m.bias, False),
    "addmm": (lambda m, x: torch.addmm(m.bias, x, m.stored), True),
    "addmm of a row": (lambda m, x: torch.addmm(m.bias[None], x, m.stored), True),
    "functional": (lambda m, x: F.linear(x, m.stored.T, m.bias), True),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_weights_stored_input_major(name: str) -> None:
    function, biased = SPELLINGS[name]
    model, graph = captured(function)
    (linear,), refusals = find_linears(graph.graph)
    check(linear, model, model.stored, model.bias if biased else None)
    assert not refusals


@pytest.mark.parametrize("name", ["q", "k"])
def test_a_weight_cast_by_autocast_is_found(name: str) -> None:
    def function(m: Model, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return getattr(m, name)(x).float()

    model, graph = captured(function, 2, 3, IN)
    (linear,), refusals = find_linears(graph.graph)
    module = getattr(model, name)
    bias = None if module.bias is None else module.bias.bfloat16()
    check(linear, model, module.weight.T.bfloat16(), bias)
    assert linear.weight_bytes == 2 * module.weight.numel()
    assert not refusals


REFUSED: dict[str, tuple[Callable[[Model, Tensor], Tensor], str, str]] = {
    "baddbmm": (
        lambda m, x: torch.baddbmm(m.row_bias.expand(2, ROWS, OUT), x.expand(2, ROWS, IN), m.experts),
        "experts",
        "a batched product with a term added to it stays dense",
    ),
    "groups of columns": (
        lambda m, x: torch._grouped_mm(x.bfloat16(), m.wide.bfloat16(), offs=torch.tensor([16, 32], dtype=torch.int32)),
        "wide",
        "this form of a batched product is not supported; it stays dense",
    ),
    "groups of rows, unaligned": (
        lambda m, x: torch._grouped_mm(
            x.bfloat16(), m.uneven.bfloat16().mT, offs=torch.tensor([2, ROWS], dtype=torch.int32)
        ),
        "uneven",
        "a folded weight would not have the strides that its product asks for",
    ),
    "alpha": (
        lambda m, x: torch.addmm(m.bias, x, m.stored, alpha=2),
        "stored",
        "addmm with alpha or beta other than 1 is not supported; it stays dense",
    ),
    "beta": (
        lambda m, x: torch.addmm(m.bias, x, m.stored, beta=0.5),
        "stored",
        "addmm with alpha or beta other than 1 is not supported; it stays dense",
    ),
    "computed bias": (lambda m, x: torch.addmm(x[:, :OUT], x, m.stored), "stored", "its bias is computed"),
    "bias of one number": (lambda m, x: torch.addmm(m.one_bias, x, m.stored), "stored", "its bias is computed"),
    "bias per row": (lambda m, x: torch.addmm(m.row_bias, x, m.stored), "stored", "its bias is computed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_site_and_the_reason(name: str) -> None:
    function, site, reason = REFUSED[name]
    _, graph = captured(function)
    linears, refusals = find_linears(graph.graph)
    assert not linears
    (refusal,) = refusals
    assert refusal.site == site
    assert refusal.reason.startswith(reason)


STACKED: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "every expert": lambda m, x: torch.bmm(x.expand(2, ROWS, IN), m.experts),
    "a stack in another layout": lambda m, x: torch.bmm(x.expand(2, ROWS, IN), m.experts.mT.contiguous().mT),
    "a choice": lambda m, x: torch.bmm(x[:, None], m.experts[(x[:, 0] > 0).long()]),
    "a selection": lambda m, x: torch.bmm(x[:, None], m.experts.index_select(0, (x[:, 0] > 0).long())),
    "rows of each expert": lambda m, x: torch._grouped_mm(
        x.bfloat16(), m.experts.bfloat16(), offs=torch.tensor([2, ROWS], dtype=torch.int32)
    ),
}


@pytest.mark.parametrize("name", STACKED)
def test_stacks_of_weights(name: str) -> None:
    """One linear with as many weights as the stack has, of which a row reads one."""
    model, graph = captured(STACKED[name])
    (linear,), refusals = find_linears(graph.graph)
    assert not refusals
    assert (linear.stacked, linear.experts, linear.bias) == (True, 2, None)
    assert (linear.in_features, linear.out_features) == (IN, OUT)
    assert (linear.selection is not None) == ("selection" in name or "choice" in name)
    weight = linear.weight.evaluate(dict(model.named_parameters()))
    assert torch.equal(weight, model.experts.to(weight.dtype))
    itemsize = linear.product.meta["val"].dtype.itemsize
    assert linear.weight_bytes == 2 * IN * OUT * itemsize
    (group,) = group_by_activation([linear])
    assert group.stacked and group.features == IN


def test_one_row_reads_one_weight_of_a_stack() -> None:
    _, graph = captured(lambda m, x: torch.bmm(x[:, None], m.experts[(x[:, 0] > 0).long()]), 1, IN)
    (linear,), _ = find_linears(graph.graph)
    assert linear.weight_bytes == IN * OUT * 4


def test_stacks_and_single_weights_are_groups_of_their_own() -> None:
    def function(m: Model, x: Tensor) -> Tensor:
        y = x.tanh().expand(2, ROWS, IN)
        return together(m.q(y), torch.bmm(y, m.experts), torch.bmm(y, m.experts * 2))

    assert groups(function, ROWS, IN) == {frozenset({"q"}), frozenset({"experts"})}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("equation", ["ri,io->ro", "ri,io->or", "ri,ihd->rhd", "ir,io->ro"])
def test_a_linear_written_as_einsum_reads_one_weight(equation: str, dynamic: bool) -> None:
    """It is traced to a batch of one."""

    def function(m: Model, x: Tensor) -> Tensor:
        weight = m.stored.unflatten(1, (4, 4)) if "h" in equation else m.stored
        return torch.einsum(equation, (x.T if equation.startswith("ir") else x).relu(), weight)

    captured = capture_graph(Model(function), torch.randn(ROWS, IN), dynamic=dynamic or None)
    ((linear,), refusals) = find_linears(canonicalise(GraphEditor(captured.graph, captured.fake_mode)))
    assert not refusals
    assert (linear.stacked, linear.in_features, linear.out_features) == (False, IN, OUT)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x @ x.T,
        lambda m, x: m.stored.T @ x.T,
        lambda m, x: x * m.v.bias[0],
        lambda m, x: x[0, 0] * (m.stored @ m.q.weight),
        lambda m, x: x[0, 0] * torch.bmm(m.experts, m.experts.mT),
        lambda m, x: torch.bmm(m.experts.mT, x.T.expand(2, -1, -1)),
    ],
)
def test_what_multiplies_no_parameter_from_the_right_is_no_site(function: Callable[[Model, Tensor], Tensor]) -> None:
    _, graph = captured(function)
    assert find_linears(graph.graph) == ([], [])


def groups(function: Callable[[Model, Tensor], Tensor], *shape: int, dynamic: bool = False) -> set[frozenset[str]]:
    graph = capture_graph(Model(function), torch.randn(shape), dynamic=dynamic or None)
    found = group_by_activation(find_linears(graph.graph)[0])
    for group in found:
        assert group.features == group.activation.meta["val"].shape[-1]
        assert group.name == group.linears[0].path
        assert group.activation is group.linears[0].activation
        assert len({chain_to_origin(linear.activation)[0] for linear in group.linears}) == 1
    return {frozenset(linear.path.split(".")[0] for linear in group.linears) for group in found}


def together(*outputs: Tensor) -> Tensor:
    return torch.cat([output.flatten() for output in outputs])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shape", [(ROWS, IN), (2, 3, IN)])
@pytest.mark.parametrize("activation", [lambda x: x, torch.tanh, lambda x: x * x.sum(-1, keepdim=True)])
def test_linears_that_read_one_activation_are_a_group(
    activation: Callable[[Tensor], Tensor], shape: tuple[int, ...], dynamic: bool
) -> None:
    def function(m: Model, x: Tensor) -> Tensor:
        y = activation(x)
        return together(m.q(y), m.k(y), m.v(y))

    assert groups(function, *shape, dynamic=dynamic) == {frozenset({"q", "k", "v"})}


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x[:, :1],
        lambda x: x[:, 1:],
        lambda x: x[:, -1],
        lambda x: 2 * x,
        lambda x: x.relu(),
        lambda x: x.transpose(0, 1),
        lambda x: x.flip(0),
    ],
)
def test_other_rows_or_values_are_another_group(other: Callable[[Tensor], Tensor]) -> None:
    def function(m: Model, x: Tensor) -> Tensor:
        y = x.tanh()
        return together(m.q(y), m.k(other(y)))

    assert groups(function, 2, 3, IN) == {frozenset({"q"}), frozenset({"k"})}


def test_a_slice_of_the_features_is_another_activation() -> None:
    found = groups(lambda m, x: together(m.q(x.tanh()), m.part(x.tanh()[..., : IN // 2])), 2, 3, IN)
    assert found == {frozenset({"q"}), frozenset({"part"})}


def test_equal_spellings_of_a_row_selection_are_a_group() -> None:
    assert groups(lambda m, x: together(m.q(x[:, -1:]), m.k(x[:, -1:])), 2, 3, IN) == {frozenset({"q", "k"})}


def test_shared_weights_are_sites_of_their_own() -> None:
    graph = capture_graph(Model(lambda m, x: m.k(x) + m.k(x.relu())), torch.randn(ROWS, IN))
    found = group_by_activation(find_linears(graph.graph)[0])
    assert [group.name for group in found] == ["k.weight", "k.weight"]
