"""Which sites a recipe has, how much each drops, and which share a basis."""

from typing import Any

import pytest
import torch

from larosa_compile.allocation import MAX_ADAPTER_SHARE, Coefficients, allocate
from larosa_compile.errors import OptionError
from larosa_compile.passes.analysis import GraphFacts, analyse
from larosa_compile.recipe import MAX_SPARSITY
from tests.support.decoder import FEATURES, LAYER, READERS, Decoder, ids
from tests.support.graphs import capture_graph

LAYERS = 4
COEFFICIENTS = Coefficients(readers=0.5, writers=1.5, others=0.75, heads=0)


@pytest.fixture(scope="module")
def facts() -> GraphFacts:
    torch.manual_seed(0)
    return analyse(capture_graph(Decoder(layers=LAYERS), ids(1, 6)).graph)


class WithInnerLinear(torch.nn.Module):
    """A decoder whose MLPs have one linear more, which neither reads nor writes the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder(layers=2)
        for layer in self.decoder.layers:
            hidden = layer.down.in_features
            layer.down = torch.nn.Sequential(torch.nn.Linear(hidden, hidden), torch.nn.ReLU(), layer.down)

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.decoder(tokens)


@pytest.mark.parametrize("rotation", ["layer", "model", 3, "none"])
def test_the_sites_are_the_linears_of_the_layers(facts: GraphFacts, rotation: Any) -> None:
    sites = allocate(facts, 0.5, COEFFICIENTS, rotation)
    # the head is the one linear without a site, as its coefficient says
    assert set(sites) == {f"layers.{layer}.{name}.weight" for layer in range(LAYERS) for name in LAYER}
    assert {linear.path for linear in facts.linears} - set(sites) == {"head.weight"}


@pytest.mark.parametrize("sparsity", [0.0, 0.4, 0.9])
def test_what_a_site_drops_depends_on_what_it_does(facts: GraphFacts, sparsity: float) -> None:
    for path, site in allocate(facts, sparsity, COEFFICIENTS, "layer").items():
        reads = path.split(".")[2] in READERS
        assert site.kind == ("reader" if reads else "writer")
        assert site.coefficient == (COEFFICIENTS.readers if reads else COEFFICIENTS.writers)
        assert site.sparsity == min(site.coefficient * sparsity, MAX_SPARSITY)
        assert (site.basis is not None) == reads


def test_a_linear_that_neither_reads_nor_writes_is_other() -> None:
    inner = analyse(capture_graph(WithInnerLinear(), ids(1, 6)).graph)
    sites = allocate(inner, 0.4, COEFFICIENTS, "layer")
    for layer in range(2):
        path = f"decoder.layers.{layer}.down"
        site = sites[f"{path}.0.weight"]
        assert (site.kind, site.coefficient, site.basis) == ("other", 0.75, None)
        assert site.sparsity == pytest.approx(0.3)
        assert sites[f"{path}.2.weight"].kind == "writer"


def test_default_coefficients_keep_the_nominal_sparsity_on_average() -> None:
    default = Coefficients()
    assert (default.readers + default.writers) / 2 == default.others == 1
    assert default.by_kind == {"reader": 0.8, "writer": 1.2, "other": 1, "head": 0.8}


@pytest.mark.parametrize(("vocab", "rotated"), [(4 * FEATURES, True), (4 * FEATURES - 1, False)])
@pytest.mark.parametrize("rotation", ["layer", "model", "none"])
def test_a_head_has_a_basis_of_its_own_where_it_is_wide(vocab: int, rotated: bool, rotation: Any) -> None:
    found = analyse(capture_graph(Decoder(layers=2, vocab=vocab), ids(1, 6)).graph)
    head = allocate(found, 0.5, Coefficients(heads=0.6), rotation)["head.weight"]
    assert (head.kind, head.coefficient, head.sparsity) == ("head", 0.6, 0.3)
    assert head.basis == ("head" if rotated and rotation != "none" else None)


def test_without_a_stream_nothing_is_a_head() -> None:
    lone = analyse(capture_graph(torch.nn.Linear(4, 64), torch.randn(2, 4)).graph)
    assert allocate(lone, 0.5, Coefficients(), "layer") == {}


@pytest.mark.parametrize(
    ("rotation", "owners"),
    [
        ("layer", [0, 1, 2, 3]),
        (1, [0, 1, 2, 3]),
        (2, [0, 0, 2, 2]),
        (3, [0, 0, 0, 3]),
        (LAYERS, [0, 0, 0, 0]),
        (100, [0, 0, 0, 0]),
        ("model", [0, 0, 0, 0]),
        ("none", [None] * LAYERS),
    ],
)
def test_bases_are_shared_by_runs_of_layers(facts: GraphFacts, rotation: Any, owners: list[int | None]) -> None:
    sites = allocate(facts, 0.5, COEFFICIENTS, rotation)
    for layer, owner in enumerate(owners):
        expected = None if owner is None else f"layers.{owner}.q"
        assert {sites[f"layers.{layer}.{name}.weight"].basis for name in READERS} == {expected}


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_auto_has_as_many_bases_as_adapters_may_cost(sparsity: float) -> None:
    found = analyse(capture_graph(Decoder(layers=12), ids(1, 6)).graph)
    sites = allocate(found, sparsity, COEFFICIENTS, "auto")
    bases = [sites[f"layers.{layer}.q.weight"].basis for layer in range(12)]
    (together, *others) = (bases.count(basis) for basis in dict.fromkeys(bases))
    assert all(count == together for count in others[:-1]) and 1 < together < 12
    kept = sum(
        (1 - sites[linear.path].sparsity) * linear.weight_bytes for linear in found.linears if linear.path in sites
    )
    adapter, layer = 4 * FEATURES**2, kept / 12
    assert adapter / (together * layer) <= MAX_ADAPTER_SHARE < adapter / ((together - 1) * layer)


@pytest.mark.parametrize("rotation", ["layers", "", 0, -1, 1.5, True, None])
def test_a_wrong_rotation_is_refused_with_what_is_allowed(facts: GraphFacts, rotation: Any) -> None:
    says = f"'auto', 'layer', 'model', 'none' or a number of layers from 1 up, got {rotation!r}"
    with pytest.raises(OptionError, match=says):
        allocate(facts, 0.5, COEFFICIENTS, rotation)
