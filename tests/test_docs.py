"""Every Python and console block of the README and the guides runs, on a tiny model; links lead somewhere."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from larosa_compile import curves, registry
from larosa_compile.cli.app import app
from larosa_compile.config import Config
from tests.support.saved import save_tiny_model, some_text

ROOT = Path(__file__).resolve().parent.parent
GUIDES = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *GUIDES]

LONGEST = "sparsity"
"""The guide whose commands measure; the README has the same commands, with less to measure."""

EXAMPLES = [pytest.param(page, id=page.stem, marks=[pytest.mark.slow] * (page.stem == LONGEST)) for page in PAGES]

SUBSTITUTIONS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "tiny",
    'load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="train[:1000]")["text"]': "TEXTS",
}
"""What a reader gets from the hub, and what is there instead."""

PLACEHOLDERS = {"MODEL": "tiny", "RECIPE": "smollm2.larosa.safetensors", "FILE": "text.txt"}
"""Words of a command line that stand for a reader's own."""

SHORTER = {"bench": ["--tokens", "2", "--rounds", "1"], "generate": ["-n", "4"], "explain": ["--windows", "1"]}
"""Options that are added to a command: less of the same."""

LARGEST_IMAGE = 300_000
"""Bytes."""


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of the fenced blocks of a page."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the guides take for granted: a model, texts, a recipe."""
    folder = tmp_path_factory.mktemp("docs")
    save_tiny_model(folder / "tiny", chat=True)
    # a search measures on one piece of what is held out and checks on another
    for name, words, seed in (("text.txt", 400, 0), ("held-out.txt", 1200, 1)):
        (folder / name).write_text(some_text(words, seed))
    recipe = folder / PLACEHOLDERS["RECIPE"]
    arguments = [folder / "tiny", "--text", folder / "text.txt", "--tokens", 128, "--context", 32, "-o", recipe]
    assert CliRunner().invoke(app, ["calibrate", *map(str, arguments)]).exit_code == 0
    return folder


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing goes through Inductor, and little is timed: that the examples run is what is shown here."""
    from_options, torch_compile = Config.from_options, torch.compile
    monkeypatch.setattr(Config, "from_options", lambda options=None: replace(from_options(options), lowering="eager"))
    monkeypatch.setattr(torch, "compile", lambda model, **kw: torch_compile(model, **({"backend": "eager"} | kw)))
    for name, value in {"SPARSITIES": (), "PROMPT": 8, "TOKENS": 2, "ROUNDS": 1}.items():
        monkeypatch.setattr(curves, name, value)
    registry.drop_graphs()
    yield
    registry.drop_graphs()


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("page", EXAMPLES)
def test_examples_run(page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    names: dict[str, Any] = {"TEXTS": [some_text(400)]}
    for language, text in blocks(page):
        for given, used in SUBSTITUTIONS.items():
            text = text.replace(given, used)
        if language == "python":
            exec(compile(text, f"{page.name}: {text[:40]!r}", "exec"), names)
        elif language == "console":
            run_commands(text, monkeypatch)


def run_commands(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line must be a prompt, perhaps variables, and a `larosa` command that ends well."""
    for line in text.splitlines():
        prompt, *words = shlex.split(line, comments=True)
        assert prompt == "$", f"a console block is commands and nothing else, got {line!r}"
        variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
        command, *arguments = words[len(variables) :]
        assert command == "larosa"
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            result = CliRunner().invoke(
                app, [PLACEHOLDERS.get(word, word) for word in arguments + SHORTER.get(arguments[0], [])]
            )
        assert result.exit_code == 0, f"{line}\n{result.output}"
        torch._dynamo.reset()


def test_blocks_are_fenced_in_a_language_that_is_known() -> None:
    found = {language for page in PAGES for language, _ in blocks(page)}
    assert found == {"python", "console", "text"}
    fences = [line for page in PAGES for line in page.read_text().splitlines() if line.startswith("```")]
    assert len(fences) == 2 * sum(len(blocks(page)) for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


def test_every_guide_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert all(f"(docs/{guide.name})" in text for guide in GUIDES)


def test_images_are_small() -> None:
    images = list((ROOT / "docs" / "images").iterdir())
    assert images and all(image.stat().st_size < LARGEST_IMAGE for image in images)


def test_the_api_reference_is_what_the_docstrings_say() -> None:
    spec = importlib.util.spec_from_file_location("generate_api", ROOT / "docs" / "generate_api.py")
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    expected = "\n".join(program.lines()) + "\n"
    assert (ROOT / "docs" / "api.md").read_text() == expected, "run `python docs/generate_api.py > docs/api.md`"
