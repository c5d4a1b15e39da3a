"""Every command of `larosa` on a tiny model: what it prints, and that it is what the functions behind it say."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import larosa_compile
from larosa_compile import site_search
from larosa_compile.caches import CACHE
from larosa_compile.calibration import token_batches
from larosa_compile.cli.app import app
from larosa_compile.config import Config
from larosa_compile.evaluation import next_token_losses, perplexity
from larosa_compile.recipe import Recipe
from tests.support.saved import CHAT_TEMPLATE, save_tiny_model, some_text
from tests.support.simulation import simulated

TORCH_COMPILE = torch.compile


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing goes through Inductor: what it makes of the graphs is the business of other tests."""
    from_options = Config.from_options
    monkeypatch.setattr(Config, "from_options", lambda options=None: replace(from_options(options), lowering="eager"))
    monkeypatch.setattr(torch, "compile", lambda model, **kw: TORCH_COMPILE(model, **({"backend": "eager"} | kw)))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its tokenizer, a text and a recipe."""
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny"))
    (folder / "text.txt").write_text(some_text(600))
    recipe = folder / "tiny.larosa.safetensors"
    ran("calibrate", folder, "--text", folder / "text.txt", "--tokens", 128, "--context", 32, "-o", recipe)
    torch._dynamo.reset()
    return folder


def ran(*arguments: object) -> str:
    """What a command printed to standard output; it must have ended well and said nothing bad."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    assert "larosa:" not in result.stderr
    return result.stdout


def ran_json(*arguments: object) -> Any:
    return json.loads(ran(*arguments, "--json"))


def loaded(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_calibrate_writes_the_recipe_that_calibrate_makes(folder: Path) -> None:
    model, tokenizer = loaded(folder)
    windows = list(token_batches((folder / "text.txt").read_text(), tokenizer, 32))[:4]
    expected = larosa_compile.calibrate(model, windows, 0.5, progress=False)
    found = Recipe.load(folder / "tiny.larosa.safetensors")
    assert found.digest == expected.digest
    assert found.calibration["tokens"] == 128


@pytest.mark.parametrize(("rotation", "bases"), [("none", 0), ("model", 1), ("1", 1)])
def test_calibrate_with_options(folder: Path, tmp_path: Path, rotation: str, bases: int) -> None:
    texts = ("--text", folder / "text.txt", "--text", folder / "text.txt")
    target = tmp_path / "r.safetensors"
    said = ran("calibrate", folder, *texts, "--rotation", rotation, "--sparsity", 0.25, "--tokens", 600, "-o", target)
    assert "calibrated on 1024 tokens in" in said and str(target) in said
    found = Recipe.load(target)
    assert (found.sparsity, len(found.rotations)) == (0.25, bases)
    assert list(tmp_path.iterdir()) == [target]


def test_a_text_that_is_too_short_is_used_whole_and_said(folder: Path, tmp_path: Path) -> None:
    arguments = ["calibrate", folder, "--text", folder / "text.txt", "--context", 200, "-o", tmp_path / "r"]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0
    assert result.stderr == "the text has fewer than 24576 tokens: calibrated on all 600\n"


def test_calibrate_searches(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_search, "ROUNDS", 1)
    text, state, target = folder / "text.txt", tmp_path / "state.json", tmp_path / "r.safetensors"
    search = ("--allocate", "search", "--search-text", text, "--resume", state)
    ran("calibrate", folder, "--text", text, "--tokens", 128, "--context", 32, *search, "-o", target)
    assert json.loads(state.read_text())["round"] == 1
    said = Recipe.load(target).calibration["allocation"]
    assert (said["method"], said["tokens"]) == ("search", 128) and said["after"] <= said["before"]
    assert "allocation  method search" in ran("inspect", target)


@pytest.mark.parametrize("spec", ["{}", "{}:train", "{}:train:text", "{}::text"])
def test_calibrate_on_a_dataset(folder: Path, tmp_path: Path, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"text": some_text(40, seed), "label": "x"} for seed in range(4)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    target, data = tmp_path / "r.safetensors", spec.format(tmp_path / "data")
    ran("calibrate", folder, "--dataset", data, "--tokens", 96, "--context", 32, "-o", target)
    tokens = Recipe.load(target).calibration["tokens"]
    assert tokens == 96


def test_inspect(folder: Path) -> None:
    file = folder / "tiny.larosa.safetensors"
    recipe, found, said = Recipe.load(file), ran_json("inspect", file), ran("inspect", file)
    assert (found["digest"], found["sparsity"]) == (recipe.digest, recipe.sparsity)
    assert found["file_bytes"] == file.stat().st_size
    assert found["calibration"] == recipe.calibration
    assert found["bases"] == {key: len(q) for key, q in recipe.rotations.items()}
    assert sum(kind["sites"] for kind in found["kinds"].values()) == found["sites"] == len(recipe.sites)
    assert found["kinds"]["reader"]["sparsity"] == [0.4, 0.4]
    for part in (recipe.digest, "nominal sparsity 0.5", "reader", "writer", "text_digest", torch.__version__):
        assert part in said


def test_weights_in_a_recipe_and_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    target, text = tmp_path / "r.safetensors", folder / "text.txt"
    ran("calibrate", folder, "--text", text, "--tokens", 96, "--context", 32, "--weights", "int4", "-o", target)
    assert ran_json("inspect", target)["weights"] == "int4" and "weights     int4" in ran("inspect", target)
    arguments = ("eval", folder, "-r", target, "--text", text, "--context", 24, "--windows", 1, "--sparsity", 0)
    found, plain = ran_json(*arguments), ran_json(*arguments, "--weights", "model")
    assert (found["weights"], plain["weights"]) == ("int4", "model")
    assert plain["gap"] == pytest.approx(0, abs=0.01) and abs(found["gap"]) > 0.05


def test_explain(folder: Path) -> None:
    recipe = folder / "tiny.larosa.safetensors"
    model, _ = loaded(folder)
    report = larosa_compile.explain(model, recipe=Recipe.load(recipe).with_sparsity(0.4))
    (graph,) = ran_json("explain", folder, "-r", recipe, "--sparsity", 0.4)["graphs"]
    assert graph["bytes_skipped_share"] == report.graphs[0].bytes_skipped_share
    assert [site["kept"] for site in graph["sites"]] == [site.kept for site in report.graphs[0].sites]
    (packed,) = ran_json("explain", folder, "-r", recipe, "--weights", "int8")["graphs"]
    assert {site["weights"] for site in packed["sites"]} == {"int8"} and packed["sparse_bytes"] < graph["sparse_bytes"]
    said = ran("explain", folder)
    assert "the plan at nominal sparsity 0.5" in said and report.graphs[0].sites[0].paths[0].rpartition(".")[0] in said


def test_eval_is_the_perplexity_of_the_definition(folder: Path) -> None:
    recipe = folder / "tiny.larosa.safetensors"
    arguments = ("eval", folder, "--recipe", recipe, "--text", folder / "text.txt", "--context", 48, "--windows", 3)
    found = ran_json(*arguments)
    model, tokenizer = loaded(folder)
    windows = list(token_batches((folder / "text.txt").read_text(), tokenizer, 48))[:3]
    dense = perplexity(next_token_losses(model, windows))
    with simulated(model, Recipe.load(recipe)):
        sparse = perplexity(next_token_losses(model, windows))
    assert found["perplexity"] == pytest.approx({"dense": dense, "sparse": sparse}, rel=1e-4)
    assert found["gap"] == found["perplexity"]["sparse"] - found["perplexity"]["dense"]
    assert (found["tokens"], found["windows"], found["context"]) == (3 * 47, 3, 48)
    said = ran(*arguments)
    assert f"{dense:.3f}" in said and "141 tokens predicted: 3 windows of 48 tokens without overlap" in said


def test_generate_compiles_once_for_prompts_of_all_lengths(folder: Path) -> None:
    """At most one compile over 200 tokens and three prompts, and the words of a loop over the compiled forward."""
    recipe, prompts = folder / "tiny.larosa.safetensors", [some_text(words, words) for words in (5, 17, 2)]
    counters.clear()
    given = [word for prompt in prompts for word in ("--prompt", prompt)]
    found = ran_json("generate", folder, "--recipe", recipe, *given, "--max-new-tokens", 67)
    assert counters["stats"]["unique_graphs"] == found["compiled_graphs"] == 1
    assert found["compile_s"] > 0 and 0.2 < found["bytes_skipped_share"] < 0.5
    for prompt, continuation in zip(prompts, found["continuations"], strict=True):
        assert continuation["prompt"] == prompt
        assert (continuation["prompt_tokens"], continuation["new_tokens"]) == (len(prompt.split()), 67)
        assert len(continuation["text"].split()) == 67
        assert continuation["tokens_per_s"] == pytest.approx(66 / continuation["decode_s"])

    model, tokenizer = loaded(folder)
    fast = torch.compile(model, backend="larosa", options={"recipe": Recipe.load(recipe)})
    ids = torch.tensor([tokenizer(prompts[0])["input_ids"]])
    with torch.no_grad():
        first = model(input_ids=ids, use_cache=True)
        cache, token, tokens = first[CACHE], first.logits[:, -1:].argmax(-1), []
        for _ in range(12):
            tokens.append(int(token))
            token = fast(input_ids=token, **{CACHE: cache}, use_cache=True).logits[:, -1:].argmax(-1)
    assert found["continuations"][0]["text"].split()[:12] == tokenizer.decode(tokens).split()


@pytest.mark.parametrize("chat", [True, False])
def test_generate_streams_and_tells_speed_apart(tmp_path: Path, chat: bool) -> None:
    folder = save_tiny_model(tmp_path / "chat", chat=True)
    prompt, arguments = "w7 w8", ["--chat"] if chat else ["--no-chat"]
    result = CliRunner().invoke(app, ["generate", str(folder), "--dense", "-p", prompt, "-n", "9", *arguments])
    assert result.exit_code == 0, result.stderr
    model, tokenizer = loaded(folder)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    ids = torch.tensor([tokenizer(f"w3 {prompt} w4" if chat else prompt)["input_ids"]])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
    assert result.stdout.split() == tokenizer.decode(expected[0, ids.shape[1] :]).split()
    assert f"[{ids.shape[1]} tokens of prompt, 9 new; first after " in result.stderr
    assert "tokens/s]" in result.stderr and "not compiled" in result.stderr


@pytest.mark.parametrize(("dtype", "expected"), [("auto", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16")])
def test_dtype_and_device(folder: Path, dtype: str, expected: str) -> None:
    found = ran_json("generate", folder, "--dense", "-p", "w3", "-n", 1, "--dtype", dtype, "--device", "cpu")
    assert (found["dtype"], found["device"], found["recipe"], found["compile_s"]) == (expected, "cpu", None, None)
    assert found["continuations"][0]["tokens_per_s"] is None


def test_bench(folder: Path) -> None:
    arguments = (
        "bench",
        folder,
        "-r",
        folder / "tiny.larosa.safetensors",
        "--context",
        6,
        "--tokens",
        2,
        "--rounds",
        2,
    )
    found = ran_json(*arguments)
    assert set(found["variants"]) == {"torch.compile", "larosa"}
    for row in found["variants"].values():
        assert row["fastest_ms"] <= row["ms_per_token"] <= row["slowest_ms"]
        assert row["tokens_per_s"] == pytest.approx(1e3 / row["ms_per_token"])
        assert row["tokens"] == 4
    dense, larosa = found["variants"]["torch.compile"], found["variants"]["larosa"]
    assert found["speedup"] == pytest.approx(dense["ms_per_token"] / larosa["ms_per_token"])
    torch._dynamo.reset()
    said = ran(*arguments, "--sparsity", 0.25)
    assert "larosa, sparsity 0.25" in said and "2 rounds of 2 tokens, in turns" in said and "x as fast; cpu" in said


def test_the_script_answers_at_once_and_without_torch(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("larosa")
    start = time.perf_counter()
    run = subprocess.run([script, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 10  # alone 0.2 s; what it must not import takes longer than a second
    for command in ("calibrate", "inspect", "generate", "bench", "explain", "eval"):
        assert command in run.stdout
    code = "import sys, larosa_compile.cli.app; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


def test_version_and_completion() -> None:
    assert ran("--version") == f"larosa {larosa_compile.__version__}\n"
    environment = os.environ | {"_LAROSA_COMPLETE": "complete_bash", "COMP_WORDS": "larosa ca", "COMP_CWORD": "1"}
    script = Path(sys.executable).with_name("larosa")
    run = subprocess.run([script], env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["calibrate"]
