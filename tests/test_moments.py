"""Second moments and the rotations made of them, against direct float64 computations."""

import pytest
import torch
from torch import Tensor

from larosa_compile.allocation import Coefficients, allocate
from larosa_compile.moments import Moments, observe
from larosa_compile.passes.analysis import analyse
from tests.support.decoder import FEATURES, Decoder, ids
from tests.support.graphs import capture_graph

EPS = torch.finfo(torch.float64).eps


def activations(rows: int, features: int = FEATURES, seed: int = 0) -> Tensor:
    """Correlated features of different variance."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator) * torch.logspace(-2, 1, features)
    return torch.randn(rows, features, generator=generator) @ mixing


def moments_of(*batches: Tensor) -> Moments:
    moments = Moments()
    for batch in batches:
        moments.add("b", "reader", batch)
    return moments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(30, FEATURES), (5, 6, FEATURES), (1, 2, 15, FEATURES)])
def test_moments_are_sums_in_float64(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = activations(30).to(dtype)
    expected = torch.einsum("ni,nj->ij", x.double(), x.double())
    found = moments_of(x.reshape(shape)).sums["b"]
    assert found.dtype == torch.float64
    assert (found - expected).norm() <= len(x) * EPS * expected.norm()


def test_batches_in_any_cut_are_one_batch() -> None:
    x = activations(60)
    whole = moments_of(x).sums["b"]
    for cuts in ([20, 20, 20], [1, 59], [7] * 8 + [4]):
        streamed = moments_of(*x.split(cuts)).sums["b"]
        assert (streamed - whole).norm() <= len(x) * EPS * whole.norm()


def test_one_matrix_a_basis_is_all_that_is_kept() -> None:
    moments = moments_of(activations(50), activations(7))
    moments.add("other", "reader", activations(9, 5))
    assert moments.tokens == 66 and not any(isinstance(value, Tensor) for value in vars(moments).values())
    assert {basis: tuple(total.shape) for basis, total in moments.sums.items()} == {
        "b": (FEATURES, FEATURES),
        "other": (5, 5),
    }
    assert all(total.untyped_storage().nbytes() == total.nbytes for total in moments.sums.values())


@pytest.mark.parametrize("rows", [1, 4, 200])
def test_rotations_are_orthogonal_and_diagonalise_with_descending_eigenvalues(rows: int) -> None:
    moments = moments_of(activations(rows))
    rotations, spectra = moments.principal_components()
    q = rotations["b"]
    assert q.dtype == torch.float32
    eps = torch.finfo(torch.float32).eps
    wide, total = q.double(), moments.sums["b"]
    assert (wide.T @ wide - torch.eye(FEATURES)).abs().max() <= 4 * eps
    rotated = wide.T @ total @ wide
    eigenvalues = rotated.diagonal()
    bound = FEATURES * eps * total.norm()
    assert (rotated - eigenvalues.diag()).abs().max() <= bound
    assert (eigenvalues.diff() <= bound).all()
    # the first r features hold as much as any r directions can: the sum of the largest eigenvalues
    largest = torch.linalg.eigvalsh(total).flip(0).cumsum(0)
    assert (eigenvalues.cumsum(0) - largest).abs().max() <= FEATURES * bound
    # the spectrum says the same as shares of the whole
    assert (spectra["b"].double().cumsum(0) - largest / total.trace()).abs().max() <= FEATURES * eps
    assert (spectra["b"].diff() <= 0).all()


def test_signs_are_fixed() -> None:
    x = activations(80)
    q = moments_of(x).principal_components()[0]["b"]
    assert (q.gather(0, q.abs().argmax(0, keepdim=True)) > 0).all()
    assert torch.equal(q, moments_of(x).principal_components()[0]["b"])
    assert torch.equal(q, moments_of(-x).principal_components()[0]["b"])


def test_readers_that_share_a_basis_add_up_and_a_head_sees_the_scale() -> None:
    torch.manual_seed(0)
    model, tokens = Decoder(layers=2, vocab=4 * FEATURES), ids(3, 7)
    captured = capture_graph(model, tokens)
    facts = analyse(captured.graph)
    sites = allocate(facts, 0.5, Coefficients(), "layer")
    moments = Moments()
    observe(facts, sites, moments.add)

    expected: dict[str, Tensor] = {}

    def seen(basis: str, scale: Tensor | float, output: Tensor) -> None:
        x = (output / scale).detach().double().flatten(0, -2)
        expected[basis] = expected.get(basis, torch.zeros(FEATURES, FEATURES, dtype=torch.float64)) + x.T @ x

    for index, layer in enumerate(model.layers):
        for norm in (layer.norm_1, layer.norm_2):
            basis = f"layers.{index}.q"
            norm.register_forward_hook(lambda norm, _, output, basis=basis: seen(basis, norm.weight, output))
    model.norm.register_forward_hook(lambda norm, _, output: seen("head", 1.0, output))
    with torch.no_grad():
        (dense,) = model(tokens)
        # every call of the observed graph adds; it computes what it did before
        values = [captured.tensors.get(node, tokens) for node in captured.graph.graph.nodes if node.op == "placeholder"]
        (observed,) = captured.graph.module(*values)
    assert torch.allclose(observed, dense, rtol=0, atol=16 * torch.finfo(torch.float32).eps * float(dense.abs().max()))
    assert moments.sums.keys() == expected.keys()
    assert moments.tokens == tokens.numel(), "two readers share a basis, and each sees every token"
    for basis, total in expected.items():
        assert (moments.sums[basis] - total).norm() <= 16 * torch.finfo(torch.float32).eps * total.norm()
