"""`torch.ops.larosa`: the ops the compiler sees. Eager runs the reference; `lowering` is for Inductor.

    larosa::sparsify(Tensor x, int k) -> Tensor                        x [rows, features]
    larosa::keep_above(Tensor x, float threshold, bool relative) -> Tensor  x [..., features]
    larosa::sparse_linear(Tensor x, Tensor weight_t, int? k) -> Tensor  x [rows, in], weight_t [in, out]
    larosa::sparse_linear_packed(Tensor x, Tensor packed, int? k, int columns, str form) -> Tensor
        the same over a weight [in, columns] in one of `formats.KNOWN`
    larosa::attend(Tensor query, Tensor key, Tensor values, Tensor? mask, float scale) -> Tensor
        query [batch * heads, width], key and values [batch, groups, length, ·], mask [·, ·, 1, length]

Inference only: no op has a backward. Results are contiguous and never alias an input. `k == features`
keeps everything, i.e. the dense result. `k = None` selects nothing either: it is for an x that holds zeros already, as
`keep_above` leaves them, and weights of entries that are zero are not read. Weights are taken to be finite: whether a
dropped 0 meets an infinite weight (and makes NaN) is left open.
"""

import torch
from torch import Tensor

from larosa_compile.kernels import half, reference
from larosa_compile.kernels.formats import format_of

# A Library object rather than `custom_op`: no Python autograd wrapper stands in the eager call. It must stay
# referenced, because its registrations die with it.
_library = torch.library.Library("larosa", "DEF")
_library.define("sparsify(Tensor x, int k) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define("keep_above(Tensor x, float threshold, bool relative) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define("sparse_linear(Tensor x, Tensor weight_t, int? k) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    "sparse_linear_packed(Tensor x, Tensor packed, int? k, int columns, str form) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "attend(Tensor query, Tensor key, Tensor values, Tensor? mask, float scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _sparsify(x: Tensor, k: int) -> Tensor:
    reference.check_k(k, x.shape[1])
    if k == x.shape[1]:
        return x.clone(memory_format=torch.contiguous_format)
    return reference.sparsify(x, k).contiguous()


def _keep_above(x: Tensor, threshold: float, relative: bool) -> Tensor:
    return reference.keep_above(x, threshold, relative).contiguous()


def _sparse_linear(x: Tensor, weight_t: Tensor, k: int | None) -> Tensor:
    return half.product(x, weight_t) if k == x.shape[1] else reference.sparse_linear(x, weight_t, k)


def _sparse_linear_packed(x: Tensor, packed: Tensor, k: int | None, columns: int, form: str) -> Tensor:
    return reference.sparse_linear_packed(x, packed, k, columns, form)


def _sparsify_fake(x: Tensor, k: int) -> Tensor:
    torch._check(x.dim() == 2, lambda: f"x must be [rows, features], got {tuple(x.shape)}")
    torch._check(1 <= k, lambda: f"k must be at least 1, got {k}")
    torch._check(k <= x.shape[1], lambda: f"k must be at most features = {x.shape[1]}, got {k}")
    return x.new_empty(x.shape)


def _keep_above_fake(x: Tensor, threshold: float, relative: bool) -> Tensor:
    torch._check(x.dim() >= 1, lambda: "x must be [..., features], got a number")
    return x.new_empty(x.shape)


def _check_kept(k: int | None, features: int | torch.SymInt) -> None:
    if k is not None:
        torch._check(1 <= k, lambda: f"k must be at least 1, got {k}")
        torch._check(k <= features, lambda: f"k must be at most in = {features}, got {k}")


def _sparse_linear_fake(x: Tensor, weight_t: Tensor, k: int | None) -> Tensor:
    torch._check(x.dim() == 2, lambda: f"x must be [rows, in], got {tuple(x.shape)}")
    torch._check(weight_t.dim() == 2, lambda: f"weight_t must be [in, out], got {tuple(weight_t.shape)}")
    torch._check(x.dtype == weight_t.dtype, lambda: f"x is {x.dtype} but weight_t is {weight_t.dtype}")
    # also what ties a dynamic x.shape[1] to the weight's static size
    torch._check(
        x.shape[1] == weight_t.shape[0],
        lambda: f"x has {x.shape[1]} features but weight_t has {weight_t.shape[0]} rows",
    )
    _check_kept(k, weight_t.shape[0])
    return x.new_empty(x.shape[0], weight_t.shape[1])


def _sparse_linear_packed_fake(x: Tensor, packed: Tensor, k: int | None, columns: int, form: str) -> Tensor:
    torch._check(x.dim() == 2, lambda: f"x must be [rows, in], got {tuple(x.shape)}")
    torch._check(packed.dtype == torch.uint8, lambda: f"packed must be uint8, got {packed.dtype}")
    # what ties a dynamic x.shape[1] to the weight's static size
    features = format_of(form).features(packed.shape[0])
    torch._check(x.shape[1] == features, lambda: f"x has {x.shape[1]} features but packed holds {features}")
    width = format_of(form).line_bytes(columns)
    torch._check(
        packed.shape[1] == width, lambda: f"{columns} columns take {width} bytes, packed has {packed.shape[1]}"
    )
    _check_kept(k, features)
    return x.new_empty(x.shape[0], columns)


def _attend_fake(query: Tensor, key: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    torch._check(query.dim() == 2, lambda: f"query must be [batch * heads, width], got {tuple(query.shape)}")
    torch._check(
        key.dim() == values.dim() == 4 and key.shape[:3] == values.shape[:3] and key.shape[3] == query.shape[1],
        lambda: (
            f"key and values must be [batch, groups, length, width], got {tuple(key.shape)} and {tuple(values.shape)}"
            f" for queries of width {query.shape[1]}"
        ),
    )
    torch._check(mask is None or mask.dim() == 4, lambda: "mask must be [batch, heads, 1, length]")
    torch._check(
        query.dtype == key.dtype == values.dtype,
        lambda: f"query is {query.dtype} but key and values are {key.dtype} and {values.dtype}",
    )
    return query.new_empty(query.shape[0], values.shape[3])


_library.impl("sparsify", _sparsify, "CompositeExplicitAutograd")
_library.impl("keep_above", _keep_above, "CompositeExplicitAutograd")
_library.impl("sparse_linear", _sparse_linear, "CompositeExplicitAutograd")
_library.impl("sparse_linear_packed", _sparse_linear_packed, "CompositeExplicitAutograd")
_library.impl("attend", reference.attend, "CompositeExplicitAutograd")
torch.library.register_fake("larosa::sparsify", _sparsify_fake, lib=_library)
torch.library.register_fake("larosa::keep_above", _keep_above_fake, lib=_library)
torch.library.register_fake("larosa::sparse_linear", _sparse_linear_fake, lib=_library)
torch.library.register_fake("larosa::sparse_linear_packed", _sparse_linear_packed_fake, lib=_library)
torch.library.register_fake("larosa::attend", _attend_fake, lib=_library)

sparsify = torch.ops.larosa.sparsify.default
keep_above = torch.ops.larosa.keep_above.default
sparse_linear = torch.ops.larosa.sparse_linear.default
sparse_linear_packed = torch.ops.larosa.sparse_linear_packed.default
attend = torch.ops.larosa.attend.default
