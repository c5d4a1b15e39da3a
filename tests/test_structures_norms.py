"""Norms in every spelling: each as the norms of a decoder, through every pass, exact, with the stream rotated."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from larosa_compile.passes.norms import FeatureAffine
from tests.support.blocks import D, Model, Norm, Normed, random_ids, rms, small_block
from tests.support.stages import Stages, check_graph
from tests.support.structures import check_decoder, online, rotated


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def centred(x: Tensor, eps: float = 1e-5) -> Tensor:
    """By hand, as in old code."""
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + eps)


def by_moments(x: Tensor) -> Tensor:
    mean, square = x.mean(-1, keepdim=True), x.pow(2).mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt(square - mean.square() + 1e-5)


def without_keepdim(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, correction=0)
    return (x - mean[..., None]) / (variance[..., None] + 1e-5).sqrt()


SCALED: dict[str, Normed] = {
    "root mean square": lambda x, g, b: rms(x) * g,
    "scale first": lambda x, g, b: g * rms(x),
    "one plus scale": lambda x, g, b: rms(x) * (1 + g),
    "in single precision": lambda x, g, b: g * rms(x.float()).to(x.dtype),
    "all in single precision": lambda x, g, b: (rms(x.float()) * (1.0 + g.float())).type_as(x),
    "epsilon outside the root": lambda x, g, b: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-3) * g,
    "sum of products": lambda x, g, b: x / torch.sqrt(torch.mul(x, x).sum(-1, keepdim=True) / D + 1e-5) * g,
    "functional": lambda x, g, b: F.rms_norm(x, (D,), g, 1e-5),
    "scale twice": lambda x, g, b: rms(x) * g * b,
    "and shift": lambda x, g, b: rms(x) * g + b,
    "layer norm": lambda x, g, b: F.layer_norm(x, (D,), g, b),
    "layer norm without shift": lambda x, g, b: F.layer_norm(x, (D,), g),
    "layer norm in single precision": lambda x, g, b: F.layer_norm(x.float(), (D,), g.float(), b.float()).to(x.dtype),
    "by hand": lambda x, g, b: g * centred(x) + b,
    "by moments": lambda x, g, b: by_moments(x) * g + b,
    "without keepdim": lambda x, g, b: without_keepdim(x) * g + b,
    "unbiased variance": lambda x, g, b: (x - x.mean(-1, True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt() * g + b,
    "standard deviation": lambda x, g, b: g * (x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + 1e-3) + b,
    "in groups of one": lambda x, g, b: F.layer_norm(x[..., None, :], (D,), g, b).squeeze(-2),
}

UNSCALED: dict[str, Normed] = {
    "no norm": lambda x, g, b: x,
    "root mean square": lambda x, g, b: rms(x),
    "layer norm": lambda x, g, b: F.layer_norm(x, (D,)),
    "functional": lambda x, g, b: F.rms_norm(x, (D,)),
    "times a number": lambda x, g, b: rms(x) * D**0.5,
}

NO_READER: dict[str, Normed] = {
    "saturating": lambda x, g, b: torch.tanh(0.5 * x) * g + b,
    "in halves": lambda x, g, b: rms(x.unflatten(-1, (2, -1))).flatten(-2) * g,
    "gated by itself": lambda x, g, b: rms(x) * torch.sigmoid(x) * g,
}


OTHER_STATISTICS: dict[str, Normed] = {
    "by the largest": lambda x, g, b: x / x.abs().amax(-1, keepdim=True) * g,
    "over tokens": lambda x, g, b: F.layer_norm(x, x.shape[1:]) * g,
    "by whole numbers": lambda x, g, b: x / (1 + x.sum(-1, keepdim=True, dtype=torch.int64).abs()) * g + b,
}


def decoder(normed: Normed) -> Model:
    return Model(lambda: small_block(lambda: Norm(normed)), norm=lambda: Norm(normed))


def affines(stages: Stages) -> list[FeatureAffine | None]:
    return [reader.affine for reader in stages.facts.readers]


@pytest.mark.parametrize("name", SCALED)
def test_norms_with_a_scale(name: str) -> None:
    stages = check_decoder(decoder(SCALED[name]))
    found = [affine for affine in affines(stages) if affine is not None]
    assert len(found) == len(affines(stages))
    shifted = name in {"and shift", "layer norm", "layer norm in single precision", "in groups of one"}
    shifted |= name in {"by hand", "by moments", "without keepdim", "unbiased variance", "standard deviation"}
    assert {affine.shifts for affine in found} == {shifted}


@pytest.mark.parametrize("name", UNSCALED)
def test_norms_without_parameters(name: str) -> None:
    stages = check_decoder(decoder(UNSCALED[name]))
    assert set(affines(stages)) == {None}


@pytest.mark.parametrize("name", NO_READER)
def test_what_is_no_norm_hides_the_stream(name: str) -> None:
    """What is behind it is a site of its own, in its own basis."""
    stages = check_graph(decoder(NO_READER[name]), random_ids())
    assert not rotated(stages)
    assert not online(stages)


@pytest.mark.parametrize("name", OTHER_STATISTICS)
def test_statistics_that_see_the_basis(name: str) -> None:
    """They are taken in the model's own, as are the rows that a readers' group then rotates for itself."""
    stages = check_graph(decoder(OTHER_STATISTICS[name]), random_ids())
    assert rotated(stages) == {"up"}
    assert len(online(stages)) == 2


@pytest.mark.parametrize("kept", [True, False], ids=["norm in float32", "norm in bfloat16"])
@pytest.mark.parametrize("name", ["all in single precision", "layer norm in single precision", "unbiased variance"])
def test_half_precision(name: str, kept: bool) -> None:
    """A norm may keep its parameters in single precision."""
    model = decoder(lambda x, g, b: SCALED[name](x, g, b).to(x.dtype)).to(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, Norm) and kept:
            module.float()
    # Top-K is not continuous: rounding to eight bits decides between entries
    stages = check_decoder(model, sparsity=0.0)
    assert {tensor.dtype for tensor in stages.editor.folded.values()} <= {torch.bfloat16, torch.float32}
