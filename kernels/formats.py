"""Formats of weights in fewer bits: what a code means, how codes and scales lie in memory, rounding to nearest.

A weight [features, columns] is approximated by `scale[group, column] · code[feature, column]`, where a group is a run
of features. It is stored in lines of bytes, one per feature, so that a dropped feature is a line not read; in front of
each group's lines stand its scales, in bfloat16, so that all of a weight is one tensor, read from front to back:

    [scales of group 0] [feature 0] … [feature group − 1] [scales of group 1] [feature group] …

Lines are padded to whole blocks of 64 bytes. In a block of 8-bit codes, byte c holds column c, in two's complement. A
block of 4-bit codes is 16 little-endian words of 32 bits; word w holds `code + 8` of column `16 n + w` in its bits
`4 n` to `4 n + 3`: a shift and a mask of all words give 16 columns in order, whatever the width of the vectors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PACKED_DTYPE = torch.uint8
BLOCK_BYTES = 64
_WORDS = BLOCK_BYTES // 4
_SLICE = 4096
"""Columns that are rounded at a time: what is in float32 meanwhile stays small."""


@dataclass(frozen=True)
class WeightFormat:
    """bits: of a code, 8 or 4. group: features that share a scale, 0 for all of them."""

    name: str
    bits: int
    group: int

    @property
    def range(self) -> tuple[int, int]:
        """The smallest and the largest code. Of 4 bits one more is used than is symmetric: it is one in sixteen."""
        largest = 2 ** (self.bits - 1) - 1
        return (-largest if self.bits == 8 else -largest - 1), largest

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

    def groups(self, features: int) -> int:
        """Groups of a weight; the last one may be smaller."""
        return -(-features // self.group) if self.group else 1

    def features(self, lines: int) -> int:
        """Features of a weight that takes so many lines."""
        whole = self.group + self.scale_lines
        groups = -(-lines // whole) if self.group else 1
        return lines - groups * self.scale_lines

    def shape(self, features: int, columns: int) -> tuple[int, int]:
        """[lines, bytes] of a packed weight [features, columns]."""
        return features + self.scale_lines * self.groups(features), self.line_bytes(columns)

    def bytes_read(self, kept: int, features: int, columns: int) -> int:
        """Bytes that a product with `kept` of the features reads, where they are met in every group."""
        return (kept + self.scale_lines * min(kept, self.groups(features))) * self.line_bytes(columns)


FORMATS = {made.name: made for made in (WeightFormat("int8", 8, 0), WeightFormat("int4", 4, 64))}


def format_of(name: str) -> WeightFormat:
    """The format of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in FORMATS:
        raise ValueError(f"a weight format must be one of {', '.join(map(repr, FORMATS))}, got {name!r}")
    return FORMATS[name]


def pack(weight: Tensor, form: WeightFormat) -> Tensor:
    """A weight rounded to a format, each code to the nearest.

    Args:
        weight: [features, columns], floating.

    Returns:
        uint8, `form.shape(features, columns)`, on the same device.
    """
    features, columns = weight.shape
    packed = torch.zeros(form.shape(features, columns), dtype=torch.uint8, device=weight.device)
    for scales, lines, begin in _groups(packed, features, form):
        for start in range(0, columns, _SLICE):
            group = weight[begin : begin + len(lines), start : start + _SLICE].float()
            scale = _scale(group, form)
            codes = (group / torch.where(scale == 0, 1.0, scale)).round_()
            encoded = _encode(codes.clamp_(*form.range).to(torch.int8), form)
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
    if packed.dtype != torch.uint8 or packed.shape != expected:
        raise ValueError(
            f"a weight of {features} x {columns} in {form.name} is uint8 {list(expected)}, "
            f"got {packed.dtype} {list(packed.shape)}"
        )
    weight = torch.empty(features, columns, device=packed.device)
    for scales, codes, begin in _groups(packed, features, form):
        weight[begin : begin + len(codes)] = (scales.float() * _decode(codes, form))[:, :columns]
    return weight


def _groups(packed: Tensor, features: int, form: WeightFormat) -> list[tuple[Tensor, Tensor, int]]:
    """Views of each group: its scales, bfloat16 [padded columns], its lines of codes, and its first feature."""
    size, ahead = form.group or features, form.scale_lines
    found = []
    for begin in range(0, features, size):
        top = begin + ahead * (begin // size)
        codes = packed[top + ahead : top + ahead + min(size, features - begin)]
        found.append((packed[top : top + ahead].view(-1).view(torch.bfloat16), codes, begin))
    return found


def _scale(group: Tensor, form: WeightFormat) -> Tensor:
    """The scale of each column, as bfloat16 holds it. Where one more code exists below zero, the extreme takes it."""
    extreme = group.gather(0, group.abs().argmax(0, keepdim=True))[0]
    smallest, largest = form.range
    scale = extreme.abs() / largest if smallest == -largest else extreme / smallest
    return scale.bfloat16().float()


def _encode(codes: Tensor, form: WeightFormat) -> Tensor:
    """Codes, int8 [lines, columns], as uint8 [lines, bytes], columns padded to whole blocks."""
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % form.block))
    if form.bits == 8:
        return codes.view(torch.uint8)
    nibbles = (codes + 8).to(torch.int32).view(len(codes), -1, 8, _WORDS)
    shifts = 4 * torch.arange(8, dtype=torch.int32, device=codes.device).view(8, 1)
    # a sum rather than an or: its terms share no bit
    return (nibbles << shifts).sum(2, dtype=torch.int32).view(len(codes), -1).view(torch.uint8)


def _decode(lines: Tensor, form: WeightFormat) -> Tensor:
    """The inverse of `_encode`, in float32."""
    if form.bits == 8:
        return lines.contiguous().view(torch.int8).float()
    words = lines.contiguous().view(torch.int32).view(len(lines), -1, 1, _WORDS)
    shifts = 4 * torch.arange(8, dtype=torch.int32, device=lines.device).view(8, 1)
    return ((words >> shifts) & 15).sub_(8).view(len(lines), -1).float()
