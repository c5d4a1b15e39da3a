"""Models that arrive quantised: folded from the values that their weights stand for, or refused with a reason."""

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

import larosa_compile
from larosa_compile.allocation import Coefficients
from larosa_compile.errors import ModelError, StaleWeightsError
from larosa_compile.passes.quantised import dequantised, is_quantised, stored_in
from larosa_compile.recipe import Recipe
from tests.support.models import relative_error, tiny_model, token_ids


def small() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=2)


class Codes(Tensor):
    """A weight as int8 codes and a scale per row; an operation meets what they stand for."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> "Codes":
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)  # type: ignore[attr-defined]

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> "Codes":
        return cls(inner["codes"], inner["scale"])

    def __repr__(self) -> str:
        return "Codes()"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].codes, args[0].scale)
        plain = tree_map(lambda item: values_of(item) if isinstance(item, Codes) else item, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


class Readable(Codes):
    """The same, and it says what its codes stand for."""

    def dequantize(self) -> Tensor:  # type: ignore[override]
        return values_of(self)


def values_of(weight: Codes) -> Tensor:
    return weight.codes.to(weight.scale.dtype) * weight.scale


def quantise(model: nn.Module, kind: type[Codes] = Readable) -> nn.Module:
    """Every matrix of a model, the embedding's as well, as codes."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 2:
                scale = parameter.detach().abs().amax(1, keepdim=True) / 127
                codes = kind((parameter.detach() / scale).round().to(torch.int8), scale)
                setattr(module, name, nn.Parameter(codes, requires_grad=False))
    return model


def plain_copy(model: nn.Module) -> nn.Module:
    """A model of the values that the weights of a quantised one stand for."""
    made = small()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            made.get_parameter(path).copy_(dequantised(parameter))
    return made


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model() -> nn.Module:
    return quantise(small())


def calibrated(model: nn.Module, **arguments: Any) -> Recipe:
    return larosa_compile.calibrate(model, [token_ids(4, 32)], 0.5, progress=False, **arguments)


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def compiled(model: nn.Module, recipe: Recipe, **options: Any) -> Any:
    return torch.compile(model, backend="larosa", options={"recipe": recipe} | options)


def test_a_quantised_tensor_and_what_it_is_made_of() -> None:
    scale, codes = torch.ones(3, 1), torch.ones(3, 2, dtype=torch.int8)
    weight = Readable(codes, scale)
    assert is_quantised(weight) and not is_quantised(scale) and not is_quantised(nn.Parameter(scale))
    assert torch.equal(dequantised(weight), torch.ones(3, 2)) and dequantised(scale) is scale
    assert stored_in(weight) == [codes, scale] and stored_in(scale) == [scale]


@pytest.mark.parametrize(
    "options",
    [{"lowering": "eager"}, {"lowering": "eager", "weights": "int8"}, {"lowering": "eager", "self_check": False}, {}],
    ids=["exact", "packed", "unchecked", "inductor"],
)
def test_it_is_compiled_as_what_its_weights_stand_for(model: nn.Module, options: dict[str, Any]) -> None:
    plain, ids = plain_copy(model), token_ids(1, 1)
    # the head is no site, and the embedding never is: both are read as plain copies
    recipe = calibrated(model, coefficients=Coefficients(heads=0))
    found = logits(compiled(model, recipe, **options), ids)
    torch._dynamo.reset()
    assert torch.equal(found, logits(compiled(plain, recipe, **options), ids))


def test_a_recipe_of_it_is_that_of_its_values(model: nn.Module) -> None:
    found, expected = calibrated(model), calibrated(plain_copy(model))
    assert found.sites == expected.sites
    assert all(torch.equal(found.rotations[basis], expected.rotations[basis]) for basis in expected.rotations)


def test_without_a_recipe_it_is_dense_and_then_learnt(model: nn.Module) -> None:
    ids = token_ids(1, 16)
    exact = logits(model, ids)
    fast = torch.compile(model, backend="larosa", options={"calibration_tokens": 32, "lowering": "eager"})
    assert all(relative_error(logits(fast, ids), exact) < 1e-5 for _ in range(2))
    learnt = logits(fast, ids)
    torch._dynamo.reset()
    recipe = larosa_compile.recipe_of(fast)
    assert torch.equal(learnt, logits(compiled(plain_copy(model), recipe, lowering="eager"), ids))


def test_the_report_says_what_the_weights_were(model: nn.Module) -> None:
    count = sum(map(is_quantised, model.parameters()))
    report, package = str(larosa_compile.explain(model)), Readable.__module__.partition(".")[0]
    assert count > 10 and f"{count} weights arrived as Readable ({package}), read at their dequantised values" in report


def test_codes_that_are_written_to_are_noticed(model: nn.Module) -> None:
    fast, ids = compiled(model, calibrated(model), lowering="eager"), token_ids(1, 3)
    logits(fast, ids)
    model.get_parameter("model.layers.1.mlp.up_proj.weight").codes.zero_()  # type: ignore[attr-defined]
    with pytest.raises(StaleWeightsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        logits(fast, ids)


def test_a_class_that_does_not_say_what_it_stands_for_is_refused() -> None:
    model = quantise(small(), Codes)
    with pytest.raises(ModelError, match=r"is a Codes, .*dequantize\(\) are allowed; load the model unquantised"):
        calibrated(model)


class CodedLinear(nn.Module):
    """A linear as other quantisers write it: codes and scales in buffers, put together when they are needed."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.codes.to(x.dtype) * self.scale).T


def test_codes_in_buffers_stay_as_they_are_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = small()
    layer = model.model.layers[1].mlp
    layer.up_proj = CodedLinear(layer.up_proj)
    recipe, ids = calibrated(model).with_sparsity(0.0), token_ids(1, 5)
    with caplog.at_level(logging.WARNING, "larosa_compile"):
        fast = compiled(model, recipe, lowering="eager")
        assert relative_error(logits(fast, ids), logits(model, ids)) < 1e-5
    (report,) = larosa_compile.explain(fast).graphs
    (refusal,) = [refusal for refusal in report.refusals if refusal.site == "model.layers.1.mlp.up_proj.codes"]
    assert "int8 codes that only its module can read" in refusal.reason and "unquantised" in refusal.reason
    assert refusal.reason in caplog.text


def torchao_weights(name: str) -> Callable[[nn.Module], None]:
    """`quantize_` with a configuration of torchao."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao comes with the extra `peers`")
    config = {
        "int8": lambda: quantization.Int8WeightOnlyConfig(),
        "int4": lambda: quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4),
        "float8": lambda: quantization.Float8WeightOnlyConfig(),
    }[name]()
    return lambda model: quantization.quantize_(model, config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["int8", "int4", "float8"])
def test_weights_of_torchao(name: str) -> None:
    quantise_weights = torchao_weights(name)
    model = small()
    quantise_weights(model)
    plain, ids, recipe = plain_copy(model), token_ids(1, 1), calibrated(model)
    assert relative_error(logits(plain, ids), logits(model, ids)) < 1e-5
    found = logits(compiled(copy.deepcopy(model), recipe, lowering="eager"), ids)
    torch._dynamo.reset()
    assert torch.equal(found, logits(compiled(plain, recipe, lowering="eager"), ids))
    assert "(torchao), read at their dequantised values" in str(larosa_compile.explain(model))
