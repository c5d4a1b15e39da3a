"""Weights in fewer bits: rounding, layout, sizes."""

import itertools

import pytest
import torch

from larosa_compile.kernels import formats
from larosa_compile.kernels.formats import FORMATS, WeightFormat, pack, unpack

EACH = pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
SIZES = [(1, 1), (64, 128), (65, 64), (100, 130), (200, 5000)]


@EACH
@pytest.mark.parametrize("size", SIZES)
def test_every_code_is_the_nearest(form: WeightFormat, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(size) * torch.rand(size[1])
    found = unpack(pack(weight, form), *size, form)
    group = form.group or size[0]
    smallest, largest = form.range
    for begin in range(0, size[0], group):
        part, back = weight[begin : begin + group], found[begin : begin + group]
        extreme = part.gather(0, part.abs().argmax(0, keepdim=True))
        step = extreme / smallest
        # what lies as far out as the extreme, but on the side with a code less, is rounded to the last one
        missed = (part / step - largest).clamp_min(0.5)
        # and the scale is a bfloat16
        assert bool(((back - part).abs() <= step.abs() * (missed - 2**-8 * smallest)).all())


@EACH
@pytest.mark.parametrize("size", SIZES)
def test_what_a_format_can_say_it_says_exactly(form: WeightFormat, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    group = form.group or size[0]
    codes = torch.randint(form.range[0], form.range[1] + 1, size).float()
    codes[::group] = form.range[0]  # each group's extreme, so that its scale is the one below
    scales = torch.rand(-(-size[0] // group), size[1]).bfloat16().float().clamp_min(2**-9)
    weight = codes * scales.repeat_interleave(group, 0)[: size[0]]
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
    assert form.bytes_read(1, features, columns) == (1 + form.scale_lines) * packed.shape[1]


def test_features_follow_from_lines() -> None:
    for form, features in itertools.product(FORMATS.values(), range(1, 400)):
        assert form.features(form.shape(features, 8)[0]) == features


@EACH
def test_a_dropped_feature_is_a_line_not_read(form: WeightFormat) -> None:
    """The layout that the kernels rely on: scales, then a line per feature, group by group."""
    features, columns = 150, 40
    packed = pack(torch.randn(features, columns), form)
    before = unpack(packed, features, columns, form)
    group = form.group or features
    for feature in (0, 63, 64, 149):
        changed = packed.clone()
        changed[feature + form.scale_lines * (feature // group + 1)] ^= 0x11
        differs = (unpack(changed, features, columns, form) != before).any(1)
        assert differs.nonzero().flatten().tolist() == [feature]


def test_wrong_names_and_shapes() -> None:
    with pytest.raises(ValueError, match="one of 'int8', 'int4', got 'int3'"):
        formats.format_of("int3")
    form = FORMATS["int8"]
    with pytest.raises(ValueError, match=r"64 x 64 in int8 is uint8 \[.*\], got torch\.int8"):
        unpack(pack(torch.ones(64, 64), form).view(torch.int8), 64, 64, form)
    with pytest.raises(ValueError, match=r"got torch\.uint8 \[3, 64\]"):
        unpack(torch.zeros(3, 64, dtype=torch.uint8), 64, 64, form)
