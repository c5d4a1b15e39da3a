"""Weights in fewer bits: rounding, layout, sizes."""

import itertools

import pytest
import torch
from torch import Tensor

from larosa_compile.kernels import formats
from larosa_compile.kernels.formats import FORMATS, KNOWN, WeightFormat, pack, pack_columns, unpack

EACH = pytest.mark.parametrize("form", KNOWN.values(), ids=lambda form: form.name)
SIZES = [(1, 1), (64, 128), (65, 64), (100, 130), (200, 5000)]


def groups(features: int, form: WeightFormat) -> list[tuple[slice, int, int]]:
    """Features that share scales, with their smallest and largest code, written down from the formats' description."""
    fine = min(features, form.fine)
    usual = (-127, 127) if form.bits == 8 else (-8, 7)
    finer = (-136, 119) if form.bits == 4 else (-32896, 32639)
    leading = [(start, min(start + form.group // 2, fine), *finer) for start in range(0, fine, form.group // 2)]
    rest = [(start, min(start + form.group, features), *usual) for start in range(fine, features, form.group)]
    return [(slice(start, end), low, high) for start, end, low, high in leading + rest]


@EACH
@pytest.mark.parametrize("size", SIZES)
def test_every_code_is_the_nearest(form: WeightFormat, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(size) * torch.rand(size[1])
    found = unpack(pack(weight, form), *size, form)
    for features, smallest, largest in groups(size[0], form):
        part, back = weight[features], found[features]
        extreme = part.gather(0, part.abs().argmax(0, keepdim=True))
        step = extreme / smallest
        # what lies as far out as the extreme, but on the side with fewer codes, is rounded to the last one
        missed = (part / step - largest).clamp_min(0.5)
        # and the scale is a bfloat16
        assert bool(((back - part).abs() <= step.abs() * (missed - 2**-8 * smallest)).all())


@EACH
@pytest.mark.parametrize("size", SIZES)
def test_what_a_format_can_say_it_says_exactly(form: WeightFormat, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.empty(size)
    for features, smallest, largest in groups(size[0], form):
        codes = torch.randint(smallest, largest + 1, weight[features].shape).float()
        codes[0] = smallest  # the extreme, so that the scale is the one below
        weight[features] = codes * torch.rand(size[1]).bfloat16().float().clamp_min(2**-9)
    assert torch.equal(unpack(pack(weight, form), *size, form), weight)


@EACH
def test_zero_stays_zero(form: WeightFormat) -> None:
    assert not unpack(pack(torch.zeros(70, 9), form), 70, 9, form).any()


@EACH
@pytest.mark.parametrize("size", SIZES)
def test_sizes(form: WeightFormat, size: tuple[int, int]) -> None:
    features, columns = size
    packed = pack(torch.ones(size), form)
    assert packed.shape == form.shape(features, columns)
    assert form.features(len(packed)) == features
    assert form.bytes_read(features, features, columns) == packed.numel()
    assert form.bytes_read(1, features, columns) == (1 + (form.fine > 0) + form.scale_lines) * packed.shape[1]


def test_features_follow_from_lines() -> None:
    for form, features in itertools.product(KNOWN.values(), range(1, 400)):
        assert form.features(form.shape(features, 8)[0]) == features


@EACH
def test_a_dropped_feature_is_lines_not_read(form: WeightFormat) -> None:
    """The layout that the kernels rely on: scales, then a line per feature, or two, group by group."""
    features, columns = 150, 40
    packed = pack(torch.randn(features, columns), form)
    before = unpack(packed, features, columns, form)
    line, owner = 0, dict[int, int]()
    for part, *_ in groups(features, form):
        line += form.scale_lines
        for feature in range(part.start, part.stop):
            for _ in range(2 if feature < form.fine else 1):
                owner[line] = feature
                line += 1
    assert line == len(packed)
    for line, feature in owner.items():
        changed = packed.clone()
        changed[line] ^= 0x11
        differs = (unpack(changed, features, columns, form) != before).any(1)
        assert differs.nonzero().flatten().tolist() == [feature]


def test_wrong_names_and_shapes() -> None:
    with pytest.raises(ValueError, match="one of 'int8', 'int4', 'int8_unsorted', got 'int3'"):
        formats.format_of("int3")
    form = FORMATS["int8"]
    with pytest.raises(ValueError, match=r"64 x 64 in int8 is uint8 \[.*\], got torch\.int8"):
        unpack(pack(torch.ones(64, 64), form).view(torch.int8), 64, 64, form)
    with pytest.raises(ValueError, match=r"got torch\.uint8 \[3, 64\]"):
        unpack(torch.zeros(3, 64, dtype=torch.uint8), 64, 64, form)


@pytest.mark.parametrize("form", KNOWN.values(), ids=lambda form: form.name)
def test_a_weight_is_packed_a_few_columns_at_a_time(form: WeightFormat) -> None:
    weight, asked = torch.randn(70, 9000), []

    def some(columns: slice) -> Tensor:
        asked.append(columns.stop - columns.start)
        return weight[:, columns]

    found = pack_columns(some, 70, 9000, form, weight.device)
    assert torch.equal(found, pack(weight, form)) and max(asked) < 5000 and sum(asked) == 9000
