"""Errors that options and arguments of functions can cause: what was given, what is allowed, what to do."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import larosa_compile
from larosa_compile.allocation import Coefficients
from larosa_compile.cli.app import described
from larosa_compile.config import OPTIONS, Config
from larosa_compile.errors import LarosaError
from larosa_compile.recipe import Recipe
from tests.support.models import tiny_model, token_ids

TO_DO = re.compile(r"\b(?:give|pass|use|call|leave|install|load|run|ask|did you mean|calibrate)\b")
"""What a message has to have behind what is wrong: something to do."""

BATCHES = [token_ids(1, 4)]


def options(**given: Any) -> Callable[[], object]:
    return lambda: Config.from_options(given)


def calibrate(batches: Any = BATCHES, **arguments: Any) -> Callable[[], object]:
    return lambda: larosa_compile.calibrate(
        **({"model": tiny_model("llama", num_hidden_layers=1), "batches": batches} | arguments)
    )


CASES: list[tuple[Callable[[], object], str, str]] = [
    # what is called, what was given, what is allowed
    (lambda: Config.from_options([("recipe", "r")]), "list", "must be a mapping"),  # type: ignore[arg-type]
    (options(sparsty=0.5), "'sparsty'", "expected one of 'calibration_tokens', 'dump', 'lowering', 'method', "),
    (options(rotation="none"), "'rotation'", "'release_originals', 'self_check', 'sparsity'"),
    (options(recipe=3), "3", "must be a Recipe, the path of a recipe file, or None"),
    (options(recipe=""), "''", "must be a Recipe, the path of a recipe file, or None"),
    (options(recipe="no"), "no recipe at no", "a file that Recipe.save wrote"),
    (options(dump=1), "1", "must be the path of a folder, or None"),
    (options(lowering="triton"), "'triton'", "must be one of 'inductor', 'eager'"),
    (options(self_check=1), "1", "must be True or False"),
    (options(prompts="exact"), "'exact'", "must be one of 'sparse', 'dense'"),
    (options(release_originals="yes"), "'yes'", "must be True or False"),
    (options(sparsity=1), "1", "must lie in [0, 1)"),
    (options(sparsity="half"), "'half'", "must lie in [0, 1)"),
    (options(sparsity=True), "True", "must lie in [0, 1)"),
    (options(sparsity=float("nan")), "nan", "must lie in [0, 1)"),
    (options(weights="int3"), "'int3'", "must be one of 'model', 'int8', 'int4'"),
    (options(method="wanda"), "'wanda'", "must be one of 'larosa', 'teal', 'cats', 'dense'"),
    (options(calibration_tokens=-1), "-1", "a whole number, at least 0"),
    (options(calibration_tokens=8192.0), "8192.0", "a whole number, at least 0"),
    (options(calibration_tokens=None), "None", "a whole number, at least 0"),
    (calibrate(model="smollm2"), "str", "a torch.nn.Module"),
    (calibrate(model=nn.Linear(2, 2).to("meta").eval()), "'meta'", "the CPU or an accelerator"),
    (calibrate(model=nn.Linear(2, 2)), "training mode", "model.eval()"),
    (calibrate(3), "int", "texts or token ids"),
    (calibrate([]), "no token", "at least one"),
    (calibrate([torch.rand(2, 4)]), "torch.float32 (2, 4)", "an integer tensor [batch, tokens]"),
    (calibrate(["a", token_ids(1, 4)]), "str", "an integer tensor [batch, tokens]"),
    (calibrate("a text"), "no tokenizer", "token ids"),
    (calibrate("a text", tokenizer="its name"), "str", "callable"),
    (calibrate(sparsity=1.0), "1.0", "must lie in [0, 1)"),
    (calibrate(sparsity="half"), "'half'", "must lie in [0, 1)"),
    (calibrate(context=0), "0", "a whole number, at least 1"),
    (calibrate(context=10.5), "10.5", "a whole number, at least 1"),
    (calibrate(rotation="row"), "'row'", "'auto', 'layer', 'model', 'none' or a number of layers from 1 up"),
    (calibrate(rotation=0), "0", "'auto', 'layer', 'model', 'none' or a number of layers from 1 up"),
    (calibrate(method="wanda"), "'wanda'", "must be one of 'larosa', 'teal', 'cats'"),
    (calibrate(selection="random"), "'random'", "must be 'top-k', 'threshold', 'relative' or None"),
    (calibrate(method="cats", selection="top-k"), "'top-k'", "selection for method 'cats' must be 'gate' or None"),
    (calibrate(method="teal", rotation="layer"), "'layer'", "must be 'none' or None"),
    (calibrate(method="cats", search=BATCHES), "held-out text", "must be None"),
    (calibrate(coefficients=0.8), "0.8", "an allocation.Coefficients or None"),
    (lambda: Coefficients(readers=-1), "'readers'", "at least 0, got -1"),
    (lambda: Coefficients(heads=float("inf")), "'heads'", "at least 0, got inf"),
    (calibrate(search=[]), "got none", "held-out token ids or texts"),
    (calibrate(search=3), "int", "texts or token ids"),
    (calibrate(allocate="greedy"), "'greedy'", "must be one of 'paper', 'search'"),
    (calibrate(allocate="search"), "got none", "held-out token ids or texts"),
    (calibrate(resume="state.json"), "'state.json' with 'paper'", "None, or the path of a file with allocate='search'"),
    (calibrate(allocate="search", search=BATCHES, resume=3), "3", "None, or the path of a file"),
    (lambda: larosa_compile.explain(nn.Linear(2, 2), sparsity=2), "2", "must lie in [0, 1)"),
    (lambda: larosa_compile.explain(nn.Linear(2, 2)), "no dummy_inputs", "example_inputs"),
    (lambda: Recipe.load("no"), "no recipe at no", "a file that Recipe.save wrote"),
    (lambda: Recipe(0.5, {}, {}, {}, {}).with_weights("fp8"), "'fp8'", "must be one of 'model', 'int8', 'int4'"),
    (lambda: Recipe(0.5, {}, {}, {}, {}).with_sparsity(2), "2.0", "must lie in [0, 1)"),
    (lambda: larosa_compile.recipe_of(nn.Linear(2, 2)), "has no recipe", "larosa_compile.calibrate(model, batches)"),
]


@pytest.mark.parametrize(("call", "given", "allowed"), CASES, ids=range(len(CASES)))
def test_an_error_says_what_was_given_what_is_allowed_and_what_to_do(
    call: Callable[[], object], given: str, allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", None)  # before anything is traced
    with pytest.raises(LarosaError) as caught:
        call()
    line = described(caught.value)
    assert line == str(caught.value) and "\n" not in line
    assert given in line and allowed in line
    assert TO_DO.search(line), line


def test_every_option_and_argument_is_in_this_table() -> None:
    source = inspect.getsource(inspect.getmodule(options))  # type: ignore[arg-type]
    for name in OPTIONS:
        assert f"options({name}=" in source, name
    for name in set(inspect.signature(larosa_compile.calibrate).parameters) - {"batches", "progress"}:
        assert re.search(rf"calibrate\(.*{name}=", source), name
