"""`benchmarks.rounding`: each way of rounding against what it is by definition."""

import json
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import larosa_compile
from benchmarks import rounding
from benchmarks.rounding import ROUNDINGS, Moments
from larosa_compile import registry
from larosa_compile.kernels.formats import KNOWN, WeightFormat, pack, unpack
from tests.support.models import tiny_model, token_ids

LEARNT = [token_ids(2, 48, seed) for seed in range(3)]


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    registry.drop_graphs()
    yield
    registry.drop_graphs()


def correlated(features: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight, and second moments of features that move together and lose energy from the first to the last."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(features, features, generator=generator) / features**0.5 + torch.eye(features)
    rows = torch.randn(4 * features, features, generator=generator) * torch.logspace(1, -1, features) @ mixed
    return torch.randn(features, columns, generator=generator), rows.T @ rows / len(rows)


def output_error(found: Tensor, weight: Tensor, moments: Tensor) -> float:
    """Mean square over rows with these second moments, summed over columns."""
    error = (found - weight).double()
    return float((error * (moments.double() @ error)).sum())


@pytest.mark.parametrize("form", KNOWN.values(), ids=KNOWN)
@pytest.mark.parametrize("features", [5, 200, 333])
def test_features_that_move_apart_have_nothing_to_compensate(features: int, form: WeightFormat) -> None:
    """The same groups, scales and codes as the package's then."""
    weight, moments = correlated(features, 7, seed=features)
    found = rounding.compensated(weight, form, moments.diag().diag())
    assert torch.equal(found, unpack(pack(weight, form), features, 7, form))


@pytest.mark.parametrize("form", KNOWN.values(), ids=KNOWN)
def test_each_way_is_better_at_what_it_is_made_for(form: WeightFormat) -> None:
    weight, moments = correlated(300, 40, seed=1)
    errors = {
        name: output_error(rounded(weight, form, moments), weight, moments) for name, rounded in ROUNDINGS.items()
    }
    assert errors["compensated"] < 0.9 * errors["nearest"]
    # of features that do not move together, energies are all there is to know
    apart = moments.diag().diag()
    errors = {name: output_error(made(weight, form, apart), weight, apart) for name, made in ROUNDINGS.items()}
    assert errors["least-squares"] <= errors["nearest"] * (1 if form.bits == 8 else 0.98)


@pytest.mark.parametrize("name", ROUNDINGS)
def test_a_column_of_a_group_has_no_more_values_than_codes(name: str) -> None:
    form = KNOWN["int4"]
    weight, moments = correlated(200, 9, seed=2)
    found = ROUNDINGS[name](weight, form, moments)
    group = slice(form.fine, form.fine + form.group)
    assert all(len(column.unique()) <= 16 for column in found[group].T)
    assert all(len(column.unique()) > 16 for column in weight[group].T)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=2)


def test_moments_are_those_of_what_the_model_reads(model: PreTrainedModel) -> None:
    recipe = larosa_compile.calibrate(model, LEARNT, 0.5, rotation="none", progress=False)
    found = Moments(model, recipe, LEARNT)
    path = next(path for path in recipe.sites if path.endswith("down_proj.weight"))
    rows: list[Tensor] = []
    module = model.get_submodule(path.removesuffix(".weight"))
    handle = module.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].flatten(0, -2)))
    with torch.no_grad():
        for ids in LEARNT:
            model(ids)
    handle.remove()
    x = torch.cat(rows)
    expected = x.T @ x
    torch.testing.assert_close(found.of(path), expected / expected.diag().mean(), rtol=1e-4, atol=1e-4)


def test_every_rounding_is_measured(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rounding.FORMATS, "int4", WeightFormat("int4", 4, 64))  # a small model has no other features
    recipe = larosa_compile.calibrate(model, LEARNT, 0.5, progress=False)
    held_out = [token_ids(1, 16, seed) for seed in (5, 6)]
    records = list(rounding.measured(model, recipe, LEARNT, held_out, ["int4"], [0.0, 0.5]))
    assert [(record["rounding"], record["sparsity"]) for record in records] == [
        (name, sparsity) for name in ("exact", *ROUNDINGS) for sparsity in (0.0, 0.5)
    ]
    assert records[0]["over_exact"] == records[1]["over_exact"] == 0
    assert all(math.isfinite(record["ppl"]) for record in records)
    assert len({record["ppl"] for record in records}) == len(records)
    assert rounding.table([{"model": "tiny"} | record for record in records]).row_count == len(records)
    assert json.loads(json.dumps(records)) == records


def test_one_window_has_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        rounding.parsed(["--windows", "1"])
    assert "--windows must be at least 2" in capsys.readouterr().err
