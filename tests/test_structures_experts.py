"""Mixtures of experts: every way to write the products, with the router and what surrounds it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.blocks import HIDDEN, Block, D, Mlp, Model, Norm, Normed, random_ids, rms
from tests.support.models import tiny_model, token_ids
from tests.support.stages import Stages, capture_graphs, check_captured, check_graph
from tests.support.structures import adapters, check_decoder, online, rotated, sites

EXPERTS, CHOSEN = 4, 2


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def grouped_mm(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    import transformers.integrations.moe  # noqa: F401, registers the op

    product: Tensor = torch.ops.transformers.grouped_mm_fallback(x, weights, ends)
    return product


class Experts(nn.Module):
    """Two products per expert, spelled by `product(self, rows, ids, name)`; `up` and `down` are stacks of weights."""

    def __init__(self, transposed: bool = False, biased: bool = False) -> None:
        super().__init__()
        shapes = {"up": (D, 2 * HIDDEN), "down": (HIDDEN, D)}
        for name, (features, out) in shapes.items():
            shape = (out, features) if transposed else (features, out)
            setattr(self, name, nn.Parameter(torch.randn(EXPERTS, *shape) / 4))
            setattr(self, f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, out)) if biased else None)

    def product(self, name: str, x: Tensor, ids: Tensor) -> Tensor:
        """[rows, in] times the weight that each row chose."""
        raise NotImplementedError

    def linear(self, name: str, x: Tensor, ids: Tensor) -> Tensor:
        y, bias = self.product(name, x, ids), getattr(self, f"{name}_bias")
        return y if bias is None else y + bias[ids]

    def inner(self, x: Tensor, ids: Tensor) -> Tensor:
        gate, up = self.linear("up", x, ids).chunk(2, -1)
        return self.linear("down", F.silu(gate) * up, ids)

    def forward(self, x: Tensor, scores: Tensor, ids: Tensor) -> Tensor:
        """x [rows, features], scores and ids [rows, chosen]."""
        y = self.inner(x.repeat_interleave(CHOSEN, 0), ids.reshape(-1))
        return (y * scores.reshape(-1, 1)).unflatten(0, (-1, CHOSEN)).sum(1)


class WeightOnTheRight(Experts):
    def product(self, name: str, x: Tensor, ids: Tensor) -> Tensor:
        return torch.bmm(x[:, None], getattr(self, name)[ids])[:, 0]


class WeightOnTheLeft(Experts):
    def __init__(self, **more: bool) -> None:
        super().__init__(transposed=True, **more)

    def product(self, name: str, x: Tensor, ids: Tensor) -> Tensor:
        return torch.bmm(getattr(self, name)[ids], x[..., None]).squeeze(-1)


class TransposedAfterTheChoice(WeightOnTheLeft):
    def product(self, name: str, x: Tensor, ids: Tensor) -> Tensor:
        return torch.bmm(x[:, None], getattr(self, name).index_select(0, ids).mT).squeeze(1)


class Sorted(Experts):
    """Rows sorted by expert, one product over groups of rows."""

    def product(self, name: str, x: Tensor, ids: Tensor) -> Tensor:
        counts = F.one_hot(ids, EXPERTS).sum(0)
        return grouped_mm(x, getattr(self, name), counts.cumsum(0).to(torch.int32))

    def forward(self, x: Tensor, scores: Tensor, ids: Tensor) -> Tensor:
        ids, order = ids.reshape(-1).sort(stable=True)
        y = self.inner(x[order // CHOSEN], ids) * scores.reshape(-1)[order, None]
        return torch.zeros_like(x).index_add(0, order // CHOSEN, y)


class EveryExpert(Experts):
    """All experts on all rows, weighed by a score that is zero for those that were not chosen."""

    def product(self, name: str, x: Tensor, ids: Tensor) -> Tensor:
        return torch.bmm(x, getattr(self, name))

    def linear(self, name: str, x: Tensor, ids: Tensor) -> Tensor:
        y, bias = self.product(name, x, ids), getattr(self, f"{name}_bias")
        return y if bias is None else y + bias[:, None]

    def forward(self, x: Tensor, scores: Tensor, ids: Tensor) -> Tensor:
        weights = torch.zeros(len(x), EXPERTS).scatter(1, ids, scores)
        y = self.inner(x.expand(EXPERTS, -1, -1), ids)
        return (y * weights.T[..., None]).sum(0)


class OneByOne(nn.Module):
    """Experts as modules, each on every row."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Mlp() for _ in range(EXPERTS))

    def forward(self, x: Tensor, scores: Tensor, ids: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            weight = (scores * (ids == number)).sum(-1, keepdim=True)
            y = y + expert(x) * weight
        return y


class Routed(nn.Module):
    """Router, experts, and perhaps an expert that every row meets."""

    def __init__(self, experts: Callable[[], nn.Module], shared: bool = False) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(D, EXPERTS), experts()
        self.shared, self.gate = Mlp(HIDDEN - 8) if shared else None, nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        scores, ids = self.router(rows).softmax(-1).topk(CHOSEN)
        y = self.experts(rows, scores / scores.sum(-1, keepdim=True), ids).view_as(x)
        if self.shared is not None:
            y = y + torch.sigmoid(self.gate(x)) * self.shared(x)
        return y


FORMS = [WeightOnTheRight, WeightOnTheLeft, TransposedAfterTheChoice, Sorted, EveryExpert]


def check_routed(experts: Callable[[], nn.Module], layers: int = 1, norm: Callable[[], nn.Module] = Norm) -> Stages:
    model = Model(lambda: Block(mlp=lambda: Routed(experts), norm=norm), layers, norm=norm)
    return check_decoder(model, heads=("head", *(f"layers.{layer}.mlp.gate" for layer in range(layers))))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_stacked_experts(form: Callable[[], nn.Module]) -> None:
    """They read the rotated stream, their products write in the next basis: two layers, to have one."""
    stages = check_routed(form, layers=2)
    assert rotated(stages) == {"q", "k", "v", "router", "up"}
    assert {sites(stages)[f"layers.{layer}.mlp.experts.down"] for layer in range(2)} == {False}
    stacked = [site for site in stages.plan.sites if site.group.stacked]
    assert [linear.experts for site in stacked for linear in site.linears] == [EXPERTS] * 4


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_biased_experts(form: Any) -> None:
    stages = check_routed(lambda: form(biased=True))
    assert rotated(stages) == {"q", "k", "v", "router", "up"}


def test_experts_that_are_linears() -> None:
    stages = check_routed(OneByOne)
    (group,) = [site.group for site in stages.plan.sites if any("experts.0.gate" in x.path for x in site.linears)]
    assert len(group.linears) == 2 * EXPERTS + 1


def test_a_shared_expert() -> None:
    stages = check_decoder(Model(lambda: Block(mlp=lambda: Routed(WeightOnTheLeft, shared=True))))
    assert rotated(stages) == {"q", "k", "v", "router", "up", "gate"}


@pytest.mark.parametrize("form", [WeightOnTheRight, Sorted], ids=lambda form: form.__name__)
def test_a_shift_keeps_stacked_experts_in_their_own_basis(form: Callable[[], nn.Module]) -> None:
    """It would become a bias for each expert, which a batched product has no place for."""
    shifted: Normed = lambda x, scale, shift: rms(x) * scale + shift  # noqa: E731
    stages = check_graph(Model(lambda: Block(mlp=lambda: Routed(form), norm=lambda: Norm(shifted))), random_ids())
    assert rotated(stages) == {"q", "k", "v", "router"}
    assert not sites(stages)["layers.0.mlp.experts.up"]


@pytest.mark.parametrize(
    ("family", "implementation"),
    [("mixtral", "batched_mm"), ("mixtral", "grouped_mm"), ("qwen2_moe", "grouped_mm")],
)
def test_experts_of_transformers(family: str, implementation: str) -> None:
    stages = check_graph(routed_model(family, implementation), token_ids(2, 5), use_cache=False)
    assert online(stages) == adapters()
    paths = {path.rpartition(".")[2]: basis for path, basis in sites(stages).items()}
    assert paths["gate_up_proj"] and not paths["down_proj"]


def test_experts_behind_a_graph_break() -> None:
    """A loop over the experts that were met depends on data: each graph around it is exact by itself."""
    graphs = capture_graphs(routed_model("mixtral", "eager"), token_ids(1, 3), use_cache=False)
    assert len(graphs) > 1
    for captured in graphs:
        check_captured(captured)


def routed_model(family: str, implementation: str) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "moe_intermediate_size": 24}
    model = tiny_model(family, num_local_experts=EXPERTS, num_experts=EXPERTS, num_experts_per_tok=CHOSEN, **sizes)
    model.set_experts_implementation(implementation)
    return model
