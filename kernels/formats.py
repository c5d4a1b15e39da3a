"""Formats of weights in fewer bits: what a code means, how codes and scales lie in memory, rounding to nearest.

A weight [features, columns] is approximated by `scale[group, column] · code[feature, column]`, where a group is a run
of features. It is stored in lines of bytes, one per feature, so that a dropped feature is a line not read; in front of
each group's lines stand its scales, in bfloat16, so that all of a weight is one tensor, read from front to back:

    [scales of group 0] [feature 0] … [feature group − 1] [scales of group 1] [feature group] …

A format may give its first features two lines each, `radix · high + low`, so twice the bits: of a rotated activation,
whose features are sorted by energy, they carry most.

Lines are padded to whole blocks of 64 bytes. In a block of 8-bit codes, byte c holds column c, in two's complement. A
block of 4-bit codes is 16 little-endian words of 32 bits; word w holds `code + 8` of column `16 n + w` in its bits
`4 n` to `4 n + 3`: a shift and a mask of all words give 16 columns in order, whatever the width of the vectors.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PACKED_DTYPE = torch.uint8
BLOCK_BYTES = 64
_WORDS = BLOCK_BYTES // 4
_SLICE = 4096
"""Columns that are rounded at a time: what is not rounded yet stays small. Whole blocks of every format."""


@dataclass(frozen=True)
class WeightFormat:
    """bits: of a code, 8 or 4. group: lines that share a scale. fine: features, from the first on, with two lines."""

    name: str
    bits: int
    group: int
    fine: int = 0

    @property
    def radix(self) -> int:
        """What the high line of a fine feature counts in units of the low one."""
        return 1 << self.bits

    @property
    def block(self) -> int:
        """Columns of a block."""
        return 8 * BLOCK_BYTES // self.bits

    @property
    def scale_lines(self) -> int:
        """Lines that the scales of one group take."""
        return 16 // self.bits

    def line_bytes(self, columns: int) -> int:
        """Bytes of a line."""
        return -(-columns // self.block) * BLOCK_BYTES

    def shape(self, features: int, columns: int) -> tuple[int, int]:
        """[lines, bytes] of a packed weight [features, columns]."""
        lines = features + min(features, self.fine)
        return lines + self.scale_lines * -(-lines // self.group), self.line_bytes(columns)

    def features(self, lines: int) -> int:
        """Features of a weight that takes so many lines, scales included."""
        lines -= self.scale_lines * -(-lines // (self.group + self.scale_lines))
        return max(lines - self.fine, lines // 2) if self.fine else lines

    def bytes_read(self, kept: int, features: int, columns: int) -> int:
        """Bytes that a product reads with `kept` of the features, the fine ones among them, some in every group."""
        lines, width = self.shape(features, columns)
        groups = (lines - features - min(features, self.fine)) // self.scale_lines
        return (kept + min(kept, self.fine) + self.scale_lines * min(kept, groups)) * width


FORMATS = {made.name: made for made in (WeightFormat("int8", 8, 64, 32), WeightFormat("int4", 4, 64, 128))}
"""What weights may be asked for in."""

UNSORTED = WeightFormat("int8_unsorted", 8, 64)
"""What they are in where no feature is known to carry more than another."""

KNOWN = FORMATS | {UNSORTED.name: UNSORTED}


def format_of(name: str) -> WeightFormat:
    """The format of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in KNOWN:
        raise ValueError(f"a weight format must be one of {', '.join(map(repr, KNOWN))}, got {name!r}")
    return KNOWN[name]


def pack(weight: Tensor, form: WeightFormat) -> Tensor:
    """A weight rounded to a format, each code to the nearest.

    Args:
        weight: [features, columns], floating.

    Returns:
        uint8, `form.shape(features, columns)`, on the same device.
    """
    features, columns = weight.shape
    return pack_columns(lambda chosen: weight[:, chosen], features, columns, form, weight.device)


def pack_columns(
    weight: Callable[[slice], Tensor], features: int, columns: int, form: WeightFormat, device: torch.device
) -> Tensor:
    """`pack` of a weight that need not be there as a whole: `weight` makes some of its columns, [features, chosen]."""
    packed = torch.zeros(form.shape(features, columns), dtype=PACKED_DTYPE, device=device)
    for start in range(0, columns, _SLICE):
        chosen = weight(slice(start, min(start + _SLICE, columns)))
        for group, scales, lines in _stored(packed, features, form):
            part = chosen[group.features].float()
            scale = nearest_scale(part, group.range)
            codes = nearest_codes(part, scale, group.range)
            encoded = _encode(_halves(codes, form.radix) if group.is_fine else codes, form)
            first = start * form.bits // 8
            lines[:, first : first + encoded.shape[1]] = encoded
            scales[start : start + len(scale)] = scale
    return packed


def unpack(packed: Tensor, features: int, columns: int, form: WeightFormat) -> Tensor:
    """What a packed weight stands for, float32 [features, columns]: `scale · code`, which float32 holds exactly.

    Raises:
        ValueError: `packed` is not uint8 in the shape that these sizes have.
    """
    expected = form.shape(features, columns)
    if packed.dtype != PACKED_DTYPE or packed.shape != expected:
        raise ValueError(
            f"a weight of {features} x {columns} in {form.name} is uint8 {list(expected)}, "
            f"got {packed.dtype} {list(packed.shape)}"
        )
    weight = torch.empty(features, columns, device=packed.device)
    for group, scales, lines in _stored(packed, features, form):
        codes = _decode(lines, form)
        if group.is_fine:
            codes = form.radix * codes[::2] + codes[1::2]
        weight[group.features] = (scales.float() * codes)[:, :columns]
    return weight


@dataclass(frozen=True)
class Group:
    """Features that share scales, whether they have two lines each, and the smallest and the largest of their codes."""

    features: slice
    is_fine: bool
    range: tuple[int, int]


def groups(features: int, form: WeightFormat) -> Iterator[Group]:
    """The groups of a weight of so many features, from the first feature on."""
    # one code more below zero than above where codes are few: the extreme value takes it, whatever its sign
    low, high = -form.radix // 2, form.radix // 2 - 1
    usual = (low, high) if form.bits == 4 else (-127, 127)
    both = (form.radix * low + low, form.radix * high + high)
    fine, first = min(features, form.fine), 0
    while first < features:
        is_fine = first < fine
        last = min(first + form.group // 2, fine) if is_fine else min(first + form.group, features)
        yield Group(slice(first, last), is_fine, both if is_fine else usual)
        first = last


def _stored(packed: Tensor, features: int, form: WeightFormat) -> Iterator[tuple[Group, Tensor, Tensor]]:
    """Each group with views of its scales, bfloat16 [padded columns], and of its lines."""
    top = 0
    for group in groups(features, form):
        count = (group.features.stop - group.features.start) * (1 + group.is_fine)
        scales, lines, _ = packed[top:].split([form.scale_lines, count, len(packed) - top - form.scale_lines - count])
        yield group, scales.view(-1).view(torch.bfloat16), lines
        top += form.scale_lines + count


def nearest_scale(part: Tensor, span: tuple[int, int]) -> Tensor:
    """The scale of each column of a group [features, columns], as bfloat16 holds it: the extreme is a code."""
    high, low = part.amax(0), part.amin(0)  # an argmax of magnitudes takes several times as long
    extreme = torch.where(high >= -low, high, low)
    smallest, largest = span
    scale = extreme.abs() / largest if smallest == -largest else extreme / smallest
    return scale.bfloat16().float()


def nearest_codes(part: Tensor, scale: Tensor, span: tuple[int, int]) -> Tensor:
    """The nearest codes, as whole numbers of the dtype of `part` [..., columns], to its entries over `scale`."""
    return (part / torch.where(scale == 0, 1.0, scale)).round_().clamp_(*span)


def _halves(codes: Tensor, radix: int) -> Tensor:
    """`radix · high + low` as two lines, high before low."""
    high = ((codes + radix // 2) / radix).floor_()
    return torch.stack([high, codes - radix * high], 1).flatten(0, 1)


def _encode(codes: Tensor, form: WeightFormat) -> Tensor:
    """Codes [lines, columns] as uint8 [lines, bytes], columns padded to whole blocks."""
    codes = torch.nn.functional.pad(codes.to(torch.int8), (0, -codes.shape[1] % form.block))
    if form.bits == 8:
        return codes.view(PACKED_DTYPE)
    nibbles = (codes + 8).to(torch.int32).view(len(codes), -1, 8, _WORDS)
    shifts = 4 * torch.arange(8, dtype=torch.int32, device=codes.device).view(8, 1)
    # a sum rather than an or: its terms share no bit
    return (nibbles << shifts).sum(2, dtype=torch.int32).view(len(codes), -1).view(PACKED_DTYPE)


def _decode(lines: Tensor, form: WeightFormat) -> Tensor:
    """The inverse of `_encode`, in float32."""
    if form.bits == 8:
        return lines.contiguous().view(torch.int8).float()
    words = lines.contiguous().view(torch.int32).view(len(lines), -1, 1, _WORDS)
    shifts = 4 * torch.arange(8, dtype=torch.int32, device=lines.device).view(8, 1)
    return ((words >> shifts) & 15).sub_(8).view(len(lines), -1).float()
