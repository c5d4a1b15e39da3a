"""Errors that a command line or an option can cause: one line with what was given, what is allowed, what to do."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import typer
from typer.testing import CliRunner

import larosa_compile
from larosa_compile import recipe_file
from larosa_compile.cli import app as command_line
from larosa_compile.cli.app import app, described
from larosa_compile.errors import LarosaError
from larosa_compile.loading import in_one_line, load_model
from larosa_compile.recipe import Recipe
from tests.support.models import tiny_model, token_ids
from tests.support.saved import save_tiny_model, save_tiny_tokenizer, some_text

HUB = "a name on the Hugging Face hub, a folder that save_pretrained wrote, or a .gguf file"
"""What is allowed as MODEL."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What command lines can be wrong with: a model, a text, recipes good and bad, broken models."""
    folder = tmp_path_factory.mktemp("wrong")
    save_tiny_model(folder / "model")
    texts = {"text.txt": some_text(80), "empty.txt": " \n", "word.txt": "w3", "broken.gguf": "GGUF?"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "latin.txt").write_bytes("naïve".encode("latin-1"))
    other = tiny_model("llama", num_hidden_layers=1, intermediate_size=96)
    larosa_compile.calibrate(other, [token_ids(1, 16)], progress=False).save(folder / "other.safetensors")
    torch._dynamo.reset()
    whole = (folder / "other.safetensors").read_bytes()
    (folder / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    for name in ("bare", "unknown", "unweighted", "toneless"):
        (folder / name).mkdir()
    (folder / "unknown" / "config.json").write_text('{"model_type": "abacus"}')
    config = (folder / "model" / "config.json").read_text()
    (folder / "unweighted" / "config.json").write_text(config)
    save_tiny_tokenizer(folder / "unweighted")
    (folder / "toneless" / "config.json").write_text(config)
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text('{"a": "w3 w4", "b": "w5"}\n')
    return folder


def failing(folder: Path, arguments: str) -> tuple[int, str]:
    """Exit code and the one line of a command line, in which `{}` is the folder."""
    result = CliRunner().invoke(app, [word.replace("{}", str(folder)) for word in arguments.split()])
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("larosa: ") and "Traceback" not in line
    return result.exit_code, line


CALIBRATE = "calibrate {}/model -o {}/r.safetensors"
TEXT = "--text {}/text.txt"
RECIPE = "-r {}/other.safetensors"

USAGE = [
    # command line, what was given, what is allowed
    ("fold", "'fold'", "the commands are calibrate, inspect, generate, bench, explain, eval"),
    ("--fast", "--fast", "the commands are"),
    ("calibrate", "Missing argument", "'MODEL'"),
    ("calibrate m --text {}/text.txt", "Missing option", "'--output'"),
    ("calibrate m -o", "'-o'", "requires an argument"),
    ("calibrate m -o {}", "{} is a folder", "a file in a folder that exists"),
    ("calibrate m -o {}/no/r", "{}/no/r is in {}/no, which is no folder", "a file in a folder that exists"),
    (CALIBRATE, "got neither", "--text / --dataset"),
    (f"{CALIBRATE} {TEXT} --dataset d", "got both", "--text / --dataset"),
    (f"{CALIBRATE} --text {{}}/no.txt", "{}/no.txt is no file", "one that exists"),
    (f"{CALIBRATE} {TEXT} --sparsity 1", "got 1", "[0, 1)"),
    (f"{CALIBRATE} {TEXT} --sparsity -0.1", "got -0.1", "[0, 1)"),
    (f"{CALIBRATE} {TEXT} --sparsity nan", "got nan", "[0, 1)"),
    (f"{CALIBRATE} {TEXT} --sparsity half", "half", "number"),
    (f"{CALIBRATE} {TEXT} --rotation both", "got 'both'", "layer, model, none or a number of layers from 1 up"),
    (f"{CALIBRATE} {TEXT} --rotation 0", "got '0'", "layer, model, none or a number of layers from 1 up"),
    (f"{CALIBRATE} {TEXT} --method wanda", "wanda", "'larosa', 'teal', 'cats'"),
    (f"{CALIBRATE} {TEXT} --selection random", "random", "'top-k', 'threshold', 'relative', 'gate'"),
    (f"{CALIBRATE} {TEXT} --tokens 0", "0", "1"),
    (f"{CALIBRATE} {TEXT} --tokens=many", "many", "integer"),
    (f"{CALIBRATE} {TEXT} --context 1", "1", "2"),
    (f"{CALIBRATE} {TEXT} --allocate greedy", "greedy", "'paper', 'search'"),
    (f"{CALIBRATE} {TEXT} --allocate search", "got none", "give --search-text"),
    (f"{CALIBRATE} {TEXT} --search-text {{}}/no.txt", "{}/no.txt is no file", "one that exists"),
    (f"{CALIBRATE} {TEXT} --resume {{}}/state", "got paper", "it is of --allocate search"),
    ("inspect", "Missing argument", "'RECIPE'"),
    ("inspect a b", "(b)", "unexpected extra argument"),
    ("generate m -p x", "got none", "give its file, or --dense"),
    ("generate m --dense", "Missing option", "'--prompt'"),
    (f"generate m -p x {RECIPE} -n 0", "0", "1"),
    (f"bench m {RECIPE} --tokens 500", "500", "127"),
    ("explain m --html r.html", "got none", "give its file with --recipe"),
    (f"explain m {RECIPE} --html {{}}", "{} is a folder", "a file in a folder that exists"),
    (f"explain m {RECIPE} {TEXT}", "it is measured for a page", "give its file with --html"),
    (f"explain m {RECIPE} --text {{}}/no.txt", "{}/no.txt is no file", "one that exists"),
    (f"explain m {RECIPE} --context 1", "1", "2"),
    (f"explain m {RECIPE} --windows 0", "0", "1"),
    (f"eval m {RECIPE}", "Missing option", "'--text'"),
    (f"eval m {RECIPE} {TEXT} --windows 0", "0", "1"),
    (f"eval m {RECIPE} {TEXT} --context 1", "1", "2"),
    (f"eval m {RECIPE} --text {{}}/no.txt", "{}/no.txt is no file", "one that exists"),
    (f"bench m {RECIPE} --context 0", "0", "1"),
    (f"bench m {RECIPE} --rounds 0", "0", "1"),
]

COMMANDS = {
    "calibrate": f"{CALIBRATE} {TEXT}",
    "generate": f"generate {{}}/model -p w3 {RECIPE}",
    "bench": f"bench {{}}/model {RECIPE}",
    "explain": f"explain {{}}/model {RECIPE}",
    "eval": f"eval {{}}/model {RECIPE} {TEXT}",
}
"""A line of each command that loads a model, with nothing wrong but the recipe."""

USAGE += [(f"{line} --dtype int4", "int4", "'auto', 'bfloat16', 'float16', 'float32'") for line in COMMANDS.values()]
USAGE += [(f"{line} --weights int3", "int3", "'model', 'int8', 'int4'") for line in COMMANDS.values()]
USAGE += [(f"{line} --sparsity 1.5", "got 1.5", "[0, 1)") for line in COMMANDS.values()]
USAGE += [(f"{COMMANDS[name]} -r {{}}/no", "{}/no is no file", "one that exists") for name in [*COMMANDS][1:]]


@pytest.mark.parametrize(("arguments", "given", "allowed"), USAGE, ids=[case[0] for case in USAGE])
def test_a_wrong_command_line(folder: Path, arguments: str, given: str, allowed: str) -> None:
    code, line = failing(folder, arguments)
    assert code == 2
    assert given.replace("{}", str(folder)) in line and allowed in line
    assert line.rpartition("; see ")[2].startswith("'larosa") and line.endswith(" --help'")


FAILURES = [
    # command line, what was given, what is allowed, what to do
    ("explain {}/no.gguf", "no GGUF file at {}/no.gguf", HUB, "give "),
    ("explain {}/no/model", "no model at '{}/no/model'", HUB, "give "),
    ("explain {}/text.txt", "{}/text.txt is a file, but no .gguf", HUB, "give "),
    ("explain {}/bare", "{}/bare holds no config.json", HUB, "give "),
    ("explain {}/unknown", "'{}/unknown'", HUB, "give "),
    ("explain {}/unweighted", "'{}/unweighted'", HUB, "give "),
    ("explain {}/broken.gguf", "'{}/broken.gguf'", HUB, "give "),
    (f"generate {{}}/toneless -p x {RECIPE}", "its tokenizer from '{}/toneless'", HUB, "give "),
    ("explain {}/model --device abacus", "'abacus'", "cpu or cuda:0", "allowed is"),
    ("explain {}/model --device meta", "'meta'", "an accelerator", "use cpu"),
    ("explain {}/model -r {}/text.txt", "{}/text.txt", "a whole safetensors file", "copy it again or calibrate"),
    ("inspect {}/half.safetensors", "{}/half.safetensors", "a whole safetensors file", "copy it again or calibrate"),
    ("inspect {}/no", "no recipe at {}/no", "Recipe.save wrote", "give a file"),
    ("inspect {}/model/model.safetensors", "model.safetensors", "expected 'larosa-recipe'", "give a file"),
    (f"explain {{}}/model {RECIPE}", "found [160, 64]", "expected [96, 64]", "Calibrate this model"),
    (f"bench {{}}/model {RECIPE}", "found [160, 64]", "expected [96, 64]", "Calibrate this model"),
    (f"eval {{}}/model {RECIPE} {TEXT}", "found [160, 64]", "expected [96, 64]", "Calibrate this model"),
    (f"generate {{}}/model {RECIPE} -p w3", "found [160, 64]", "expected [96, 64]", "Calibrate this model"),
    ("generate {}/model --dense -p w3 --chat", "this model's has none", "a chat template", "use --no-chat"),
    ("generate {}/model --dense -p w3 -n 600", "got 601", "512 tokens", "ask for fewer"),
    (f"eval {{}}/model {RECIPE} {TEXT} --context 513", "got 513", "512 tokens", "ask for fewer"),
    (f"bench {{}}/model {RECIPE} --context 400", "got 528", "512 tokens", "ask for fewer"),
    (f"{CALIBRATE} --text {{}}/latin.txt", "{}/latin.txt is not UTF-8", "UTF-8", "give a text file"),
    (f"{CALIBRATE} --text {{}}/empty.txt", "--text holds no text", "at least two tokens", "give one"),
    (f"{CALIBRATE} --text {{}}/word.txt", "--text holds a single token", "at least two tokens", "give a text"),
    (f"{CALIBRATE} {TEXT} --method cats --rotation layer", "got 'layer'", "must be 'none' or None", "leave it out"),
    (f"{CALIBRATE} --dataset :train", "':train'", "NAME[:split[:column]]", "give "),
    (f"{CALIBRATE} --dataset a:b:c:d", "'a:b:c:d'", "NAME[:split[:column]]", "give "),
    (f"{CALIBRATE} --dataset {{}}/bare", "'{}/bare'", "NAME[:split[:column]]", "give "),
    (f"{CALIBRATE} --dataset {{}}/data", "(a, b)", "NAME[:split[:column]]", "name one"),
    (f"{CALIBRATE} --dataset {{}}/data:train:c", "'c'", "only a, b", "give "),
    (f"{CALIBRATE} --dataset {{}}/data:test", "test", "NAME[:split[:column]]", "give "),
]

FAILURES += [(f"{line} --device abacus", "'abacus'", "cpu or cuda:0", "allowed is") for line in COMMANDS.values()]


@pytest.mark.parametrize(("arguments", "given", "allowed", "to_do"), FAILURES, ids=[case[0] for case in FAILURES])
def test_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, given: str, allowed: str, to_do: str
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    code, line = failing(folder, arguments)
    assert code == 1
    assert given.replace("{}", str(folder)) in line and allowed in line and to_do in line
    assert "not expected" not in line
    assert not (folder / "r.safetensors").exists()


def test_every_option_is_in_these_tables() -> None:
    """Options that take a value, and arguments; a prompt may be anything."""
    lines = [case[0] for case in (*USAGE, *FAILURES)]
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        words = {word.partition("=")[0] for line in lines if line.split()[0] == name for word in line.split()}
        words |= {"--output"} if "-o" in words else set()
        for parameter in command.params:
            if parameter.param_type_name == "option" and not parameter.is_flag:
                assert words & {*parameter.opts}, f"larosa {name} {parameter.opts}"
        assert f"{name}" in lines or any(line.startswith(f"{name} {{}}/") for line in lines), "its first argument"


def test_a_model_on_the_hub_that_cannot_be_had(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, line = failing(folder, "explain nobody/nothing")
    assert code == 1 and "cannot load the model from 'nobody/nothing' (" in line and HUB in line


def test_a_gguf_file_without_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    code, line = failing(folder, "explain {}/broken.gguf")
    assert code == 1
    assert line.endswith(
        'reading broken.gguf needs gguf, which this environment lacks; pip install "larosa-compile[gguf]"'
    )


def test_a_model_that_transformers_does_not_compile(tmp_path: Path) -> None:
    model = tiny_model("rwkv", num_hidden_layers=2, attention_hidden_size=64, context_length=128)
    larosa_compile.calibrate(model, [token_ids(1, 16)], progress=False).save(tmp_path / "r")
    model.save_pretrained(tmp_path)
    save_tiny_tokenizer(tmp_path)
    code, line = failing(tmp_path, "generate {} -r {}/r -p w3 -n 8")
    torch._dynamo.reset()
    assert code == 1
    assert "did not compile this model's decoding" in line and "no cache of a fixed size; run it with --dense" in line


def test_what_dynamo_wraps_is_still_one_line() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    fast = torch.compile(model, backend="larosa", options={"lowering": "triton"})
    with torch.no_grad(), pytest.raises(Exception, match="triton") as caught:
        fast(token_ids(1, 3), use_cache=False)
    torch._dynamo.reset()
    assert (
        described(caught.value)
        == "option 'lowering' must be one of 'inductor', 'eager', got 'triton'; give one of them"
    )


def test_what_the_system_refuses_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recipe, "save", raising(OSError(28, "No space left on device", "r.safetensors")))
    code, line = failing(folder, f"{CALIBRATE} {TEXT} --tokens 16")
    torch._dynamo.reset()
    assert code == 1
    assert line == "larosa: No space left on device: 'r.safetensors'; give a file that can be read or written there"


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_what_nobody_foresaw_says_how_to_see_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recipe, "load", raising(ZeroDivisionError("two\nlines")))
    code, line = failing(folder, f"inspect {RECIPE[3:]}")
    assert code == 1
    assert line.startswith(
        "larosa: ZeroDivisionError: two lines; this is not expected: run again with LAROSA_TRACEBACK=1"
    )


@pytest.mark.parametrize("how", ["option", "variable"])
def test_a_traceback_where_it_is_wanted(folder: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "variable":
        monkeypatch.setenv(command_line.TRACEBACK_VARIABLE, "1")
    arguments = [*(["--traceback"] if how == "option" else []), "inspect", str(folder / "half.safetensors")]
    assert isinstance(CliRunner().invoke(app, arguments).exception, LarosaError)


def test_ctrl_c_while_a_recipe_is_written_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = recipe_file.save_file

    def interrupted(tensors: Any, path: Path, metadata: Any) -> None:
        save(tensors, path, metadata=metadata)
        raise KeyboardInterrupt

    target = tmp_path / "r.safetensors"
    target.write_text("what was there before")
    monkeypatch.setattr(recipe_file, "save_file", interrupted)
    words = ["calibrate", folder / "model", "--text", folder / "text.txt", "--tokens", 32, "-o", target]
    result = CliRunner().invoke(app, [str(word) for word in words])
    torch._dynamo.reset()
    assert result.exit_code == 130
    assert result.stderr == "larosa: interrupted\n"
    assert list(tmp_path.iterdir()) == [target] and target.read_text() == "what was there before"


def test_an_error_in_one_line() -> None:
    assert in_one_line(ValueError("\n  first.\nsecond.")) == "first. second"
    assert in_one_line(KeyError()) == "KeyError"
    assert in_one_line(ValueError("x" * 300)) == "x" * 199 + "…"


def test_loading_passes_on_what_is_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("larosa_compile.loading.AutoModelForCausalLM.from_pretrained", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        load_model(folder / "model")
