"""The meaning of every op, in plain torch: selection by magnitude, Top-K or above a threshold, the linear behind it,
and attention of one query.

Selection compares magnitude *bits*: for IEEE-style floats with the sign cleared, integer order is magnitude
order, ties and subnormals are exact, and NaN sorts above infinity. A NaN is therefore always kept: it propagates.
"""

import torch
from torch import Tensor

from larosa_compile.kernels import half
from larosa_compile.kernels.formats import format_of, unpack

# floating dtype -> (integer dtype of the same width, mask that clears the sign)
MAGNITUDE_VIEWS: dict[torch.dtype, tuple[torch.dtype, int]] = {
    torch.bfloat16: (torch.int16, 0x7FFF),
    torch.float16: (torch.int16, 0x7FFF),
    torch.float32: (torch.int32, 0x7FFF_FFFF),
}


def check_k(k: int, features: int) -> None:
    """Raise ValueError unless `k` entries can be kept out of `features`."""
    if not 1 <= k <= features:
        raise ValueError(f"k must lie in [1, features] = [1, {features}], got {k}")


def magnitude_bits(x: Tensor) -> Tensor:
    """Integer whose order is the order of |x|.

    Args:
        x: any shape; bfloat16, float16 or float32.

    Returns:
        int16 (16-bit dtypes) or int32, shaped like `x`, never negative.

    Raises:
        TypeError: for any other dtype.
    """
    if x.dtype not in MAGNITUDE_VIEWS:
        allowed = ", ".join(str(dtype) for dtype in MAGNITUDE_VIEWS)
        raise TypeError(f"x must be one of {allowed}, got {x.dtype}")
    integer, mask = MAGNITUDE_VIEWS[x.dtype]
    return x.view(integer) & mask


def keep_mask(x: Tensor, k: int) -> Tensor:
    """Which entries of each row are kept: magnitude at least that of the k-th largest, so ties are all kept.

    Args:
        x: [..., features]; bfloat16, float16 or float32.
        k: how many entries a row keeps at least.

    Returns:
        bool, shaped like `x`; at least `k` true entries per row, and every NaN.

    Raises:
        ValueError: `k` outside [1, features].
        TypeError: unsupported dtype.
    """
    check_k(k, x.shape[-1])
    bits = magnitude_bits(x)
    kth_largest = bits.topk(k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    return bits >= kth_largest


def sparsify(x: Tensor, k: int) -> Tensor:
    """`x` with everything outside `keep_mask(x, k)` set to zero; same shape and dtype, same errors."""
    return torch.where(keep_mask(x, k), x, 0)


def keep_above(x: Tensor, threshold: float, relative: bool) -> Tensor:
    """`x` with every entry of magnitude below a threshold set to zero; NaN is never below, and stays.

    Args:
        x: [..., features], floating.
        threshold: at least 0; compared in float32.
        relative: whether it is meant in units of the row's root mean square, which makes it invariant to scale.

    Returns:
        shaped like `x`, in its dtype.
    """
    wide = x.float()
    lowest = threshold * wide.square().mean(-1, keepdim=True).sqrt() if relative else threshold
    return torch.where(wide.abs() < lowest, 0, x)


def sparse_linear(x: Tensor, weight_t: Tensor, k: int | None) -> Tensor:
    """`sparsify(x, k) @ weight_t`; for `k = None`, `x @ weight_t` over the entries of x that are not zero.

    Args:
        x: [rows, in].
        weight_t: [in, out] in the dtype of `x`; transposed, so that a dropped input is a row never read.
        k: entries kept per row, 1 <= k <= in, or None.

    Returns:
        [rows, out] in the dtype of `x`.

    Raises:
        ValueError: `k` outside [1, in].
        TypeError: unsupported dtype.
    """
    return half.product(_kept(x, k), weight_t)


def sparse_linear_packed(x: Tensor, packed: Tensor, k: int | None, columns: int, form: str) -> Tensor:
    """`sparsify(x, k)`, or x, times the weight that `packed` holds, multiplied in float32 and rounded once.

    Args:
        x: [rows, in].
        packed: the weight [in, columns] in the format named `form`.
        k: entries kept per row, 1 <= k <= in, or None: nothing is selected.

    Returns:
        [rows, columns] in the dtype of `x`.

    Raises:
        ValueError: `k` outside [1, in], no such format, or `packed` has another shape or dtype.
        TypeError: unsupported dtype of `x`.
    """
    weight = unpack(packed, x.shape[1], columns, format_of(form))
    return (_kept(x, k).float() @ weight).to(x.dtype)


def attend(query: Tensor, key: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`softmax(q kᵀ · scale + mask) v` of one query per head, in float32 and rounded once.

    Heads of a group, which follow each other, share its keys. A query that no key may be seen from gives 0.

    Args:
        query: [batch · heads, width].
        key: [batch, groups, length, width]; groups divides heads.
        values: [batch, groups, length, value width].
        mask: [1 or batch, 1 or heads, 1, length], added to the scores; −inf hides a key.

    Returns:
        [batch · heads, value width] in the dtype of `query`.
    """
    batch, groups, _, width = key.shape
    scores = query.float().view(batch, groups, -1, width) @ key.float().mT * scale
    if mask is not None:
        hidden = mask.float().expand(-1, query.shape[0] // batch, -1, -1)
        scores = scores + hidden.reshape(mask.shape[0], groups, -1, mask.shape[3])
    weights = (scores - scores.amax(-1, keepdim=True).clamp_min(torch.finfo().min)).exp()
    # the largest score weighs 1, so only a row that sees nothing sums to less
    attended = weights @ values.float() / weights.sum(-1, keepdim=True).clamp_min(1)
    return attended.reshape(query.shape[0], -1).to(query.dtype)


def _kept(x: Tensor, k: int | None) -> Tensor:
    return x if k is None else sparsify(x, k)
