"""The folds are identities of linear algebra: a folded linear on rotated features is the linear, rotated."""

import pytest
import torch
from torch import Tensor

from larosa_compile.passes import products
from larosa_compile.passes.algebra import change_of_basis, fold_bias, fold_weight, matrix

IN, OUT, ROWS = 12, 7, 5
IN_SLICES, OUT_SLICES = 1300, 1100
"""More than are folded at a time."""


def orthogonal(features: int) -> Tensor:
    return torch.linalg.qr(torch.randn(features, features, dtype=torch.float64)).Q


def close(actual: Tensor, exact: Tensor) -> bool:
    assert actual.dtype == exact.dtype == torch.float64
    return bool((actual - exact).norm() <= 16 * torch.finfo(torch.float64).eps * exact.norm())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("leading", [None, (), (1,), (1, 1)])
def test_a_folded_linear_maps_one_basis_to_the_other(
    scaled: bool, shifted: bool, read: bool, written: bool, leading: tuple[int, ...] | None
) -> None:
    """leading: of scale and bias; None is no bias."""
    x, weight = torch.randn(ROWS, IN), torch.randn(IN, OUT)
    bias = None if leading is None else torch.randn(*leading, OUT)
    scale = torch.rand(*(leading or ()), IN) + 0.5 if scaled else None
    shift = torch.randn(IN) if shifted else None
    start, end = orthogonal(IN) if read else None, orthogonal(OUT) if written else None
    normed = x.double() * (1.0 if scale is None else scale.double().reshape(-1))
    y = (normed + (0.0 if shift is None else shift.double())) @ weight.double()
    y = y + (0.0 if bias is None else bias.double().reshape(-1))
    rotated = x.double() if start is None else x.double() @ start
    found = rotated @ fold_weight(weight, scale, start, end) + fold_bias(weight, bias, shift, end)
    assert close(found, y if end is None else y @ end)


def test_nothing_to_fold_is_a_cast() -> None:
    weight, bias = torch.randn(IN, OUT, dtype=torch.bfloat16), torch.randn(OUT, dtype=torch.bfloat16)
    assert torch.equal(fold_weight(weight), weight.double())
    assert torch.equal(fold_bias(weight, bias), bias.double())
    assert torch.equal(fold_bias(weight, write=orthogonal(OUT)), torch.zeros(OUT, dtype=torch.float64))


def test_folds_leave_their_operands_alone() -> None:
    weight, scale = torch.randn(IN, OUT, dtype=torch.float64), torch.rand(IN, dtype=torch.float64)
    copies = weight.clone(), scale.clone()
    fold_weight(weight, scale, orthogonal(IN), orthogonal(OUT)).zero_()
    assert torch.equal(weight, copies[0])
    assert torch.equal(scale, copies[1])


def test_reading_and_writing_are_inverse() -> None:
    weight, q = torch.randn(IN, OUT), orthogonal(OUT)
    assert close(fold_weight(fold_weight(weight, write=q), write=q.T), weight.double())
    q = orthogonal(IN)
    assert close(fold_weight(fold_weight(weight, read=q), read=q.T), weight.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_changes_of_basis_are_orthogonal_and_compose(dtype: torch.dtype) -> None:
    a, b, c = (orthogonal(IN).to(dtype) for _ in range(3))
    eps = torch.finfo(dtype).eps
    identity = torch.eye(IN, dtype=torch.float64)
    for start, end in [(a, b), (None, a), (a, None), (a, a)]:
        change = change_of_basis(start, end)
        assert change.dtype == torch.float64
        assert (change @ change.T - identity).norm() <= 32 * eps
    assert (change_of_basis(a, b) @ change_of_basis(b, c) - change_of_basis(a, c)).norm() <= 32 * eps
    assert (change_of_basis(None, b) @ change_of_basis(b, None) - identity).norm() <= 32 * eps
    assert (change_of_basis(a, a) - identity).norm() <= 32 * eps


def test_a_change_of_basis_takes_features_along() -> None:
    a, b, x = orthogonal(IN), orthogonal(IN), torch.randn(ROWS, IN, dtype=torch.float64)
    assert close((x @ a) @ change_of_basis(a, b), x @ b)


def test_the_model_s_own_basis_has_no_matrix() -> None:
    q = orthogonal(IN).float()
    assert matrix({"q": q}, None) is None
    found = matrix({"q": q}, "q")
    assert found is not None
    assert torch.equal(found, q)
    with pytest.raises(KeyError, match="other"):
        matrix({"q": q}, "other")


@pytest.mark.parametrize("sides", ["read", "write", "read, write", ""])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_weight_is_rounded_once(dtype: torch.dtype, sides: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In slices, in float32, it is next to the exact result; a product in 16 bits would not be."""
    monkeypatch.setattr(products, "_multiplies_bfloat16", lambda: False)
    found, exact = folded_and_exact(dtype, sides, torch.rand(IN_SLICES) + 0.5)
    assert found.dtype == dtype
    assert (found.double() - exact).norm() <= 1.001 * rounding(exact, dtype)


@pytest.mark.parametrize("sides", ["read", "write"])
def test_a_bfloat16_weight_is_as_exact_as_the_energy_of_its_features_asks(
    sides: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Multiplied in bfloat16, leading features are rounded once, the others err √2 times as much."""
    monkeypatch.setattr(products, "_multiplies_bfloat16", lambda: True)
    found, exact = folded_and_exact(torch.bfloat16, sides, torch.rand(IN_SLICES) + 0.5 if sides == "read" else None)
    if sides == "write":
        found, exact = found.T, exact.T
    leading = -(-len(exact) // products.ONE_IN)
    first, others = (
        (found[part].double() - exact[part]).norm() / rounding(exact[part], torch.bfloat16)
        for part in (slice(0, leading), slice(leading, None))
    )
    assert first <= 1.001 and 1.3 < others < 1.5


def folded_and_exact(dtype: torch.dtype, sides: str, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(IN_SLICES, OUT_SLICES).to(dtype)
    start = orthogonal(IN_SLICES) if "read" in sides else None
    end = orthogonal(OUT_SLICES) if "write" in sides else None
    exact = fold_weight(weight, scale, start, end)
    return fold_weight(weight, scale, start, end, out=torch.empty(weight.shape, dtype=dtype)), exact


def rounding(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (exact - exact.to(dtype).double()).norm()
