"""What a sparse product must be, for any kernel on any device, and rows that selection could get wrong."""

import torch
from torch import Tensor

from larosa_compile.kernels import reference


def assert_is_product(y: Tensor, x: Tensor, weight_t: Tensor, k: int | None) -> None:
    """`y` is the product of the kept entries, all for None, within one rounding of `y` and those of a float32 sum."""
    kept, weight = (x if k is None else reference.sparsify(x, k)).double(), weight_t.double()
    expected = kept @ weight
    out, acc = torch.finfo(y.dtype), torch.finfo(torch.float32)
    terms = int((kept != 0).sum(dim=-1).max())
    bound = (out.eps + terms * acc.eps) * (kept.abs() @ weight.abs())
    # among subnormals a rounding has an absolute size
    bound += out.smallest_normal * out.eps + terms * acc.smallest_normal * acc.eps
    finite = expected.isfinite()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y[~finite].nan_to_num(), expected[~finite].to(y.dtype).nan_to_num())
    assert ((y.double() - expected).abs() <= bound)[finite].all()


def special_rows(features: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows [1, features] that selection could get wrong."""
    random = torch.randn(1, features)
    with_nan, with_inf = random.clone(), random.clone()
    with_nan[0, 5], with_inf[0, 3] = float("nan"), -float("inf")
    subnormal = torch.randint(-9, 10, (1, features)) * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    rows = {
        "random": random,
        "ties": torch.randint(-3, 4, (1, features)),
        "all equal": torch.full((1, features), -0.5),
        "zeros": torch.zeros(1, features),
        "mostly zeros": random * (torch.arange(features) % 17 == 0),
        "subnormals": subnormal,
        "nan": with_nan,
        "infinity": with_inf,
    }
    return {name: row.to(dtype) for name, row in rows.items()}
