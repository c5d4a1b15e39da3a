"""What the numbers and tensors of a recipe must be like; anything else is a RecipeError that says so."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from larosa_compile.errors import RecipeError
from larosa_compile.kernels.formats import FORMATS

ORTHOGONALITY_TOLERANCE = 1e-4
"""Largest |QᵀQ - I| accepted; a float32 rounding of an exact Q stays two orders of magnitude below."""

OWN_DTYPE = "model"
WEIGHTS = (OWN_DTYPE, *FORMATS)
"""What a recipe may say of the format of weights."""


LAROSA, DENSE = "larosa", "dense"
METHODS = (LAROSA, "teal", "cats", DENSE)
"""What the sites of a recipe may be derived by; a dense one has none."""


def check_method(method: object) -> None:
    if method not in METHODS:
        raise RecipeError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}; give one of them")


def check_weights(weights: object) -> None:
    if weights not in WEIGHTS:
        raise RecipeError(f"weights must be one of {', '.join(map(repr, WEIGHTS))}, got {weights!r}; give one of them")


def checked_number(what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RecipeError(f"{what} must be a finite number, got {value!r}")
    return float(value)


def checked_sparsity(value: object) -> float:
    sparsity = checked_number("sparsity", value)
    if not 0 <= sparsity < 1:
        raise RecipeError(f"sparsity must lie in [0, 1), got {sparsity}; give a share such as 0.5")
    return sparsity


def checked_rotation(key: str, q: Tensor) -> Tensor:
    """Return Q `[d, d]` on the CPU and contiguous (eigensolvers return it column-major), or raise."""
    if not isinstance(q, Tensor) or q.dtype != torch.float32:
        given = q.dtype if isinstance(q, Tensor) else type(q).__name__
        raise RecipeError(f"rotation {key!r} must be a float32 tensor, got {given}")
    if q.ndim != 2 or q.shape[0] != q.shape[1] or not q.numel():
        raise RecipeError(f"rotation {key!r} must be square, got shape {list(q.shape)}")
    q = q.detach().cpu().contiguous()
    if not torch.isfinite(q).all():
        raise RecipeError(f"rotation {key!r} must be finite, got NaN or infinity; calibrate again")
    wide = q.double()
    defect = float((wide.T @ wide).sub_(torch.eye(len(q), dtype=torch.float64)).abs().max())
    if defect > ORTHOGONALITY_TOLERANCE:
        raise RecipeError(
            f"rotation {key!r} must be orthogonal, got max |QᵀQ - I| = {defect:.2e} where "
            f"{ORTHOGONALITY_TOLERANCE:.0e} is allowed; calibrate again"
        )
    return q


def checked_spectrum(key: str, spectrum: Tensor, rotations: Mapping[str, Tensor]) -> Tensor:
    """Return a spectrum `[d]` float32 of shares, or raise."""
    features = len(rotations[key]) if key in rotations else None
    if not isinstance(spectrum, Tensor) or spectrum.dtype != torch.float32 or spectrum.shape != (features,):
        raise RecipeError(f"spectrum {key!r} must be a float32 vector, a number for each of {features} features")
    if not ((spectrum >= 0) & (spectrum <= 1)).all():
        raise RecipeError(f"spectrum {key!r} must hold shares from 0 to 1; calibrate again")
    return spectrum.detach().cpu().contiguous()
