"""The report page: its numbers are those of the report and of direct measurements, and it needs nothing else."""

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import larosa_compile
from larosa_compile import curves, page
from larosa_compile.cli.app import app
from larosa_compile.config import Config
from larosa_compile.decoding import Spread
from larosa_compile.errors import MissingPackageError, OptionError
from larosa_compile.evaluation import next_token_losses, perplexity
from larosa_compile.passes.graph import Refusal
from larosa_compile.recipe import Recipe
from tests.support.browser import NAMES, find_browser, look_at
from tests.support.models import tiny_model, token_ids
from tests.support.reports import tiny_report
from tests.support.saved import save_tiny_model, some_text

NARROW = 360
"""Pixels: a small telephone."""


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return larosa_compile.calibrate(tiny_model("llama"), [token_ids(4, 16)], progress=False)


def made_up_speeds() -> curves.Speeds:
    """A gigabyte dense, half of it sparse, at 10 GB/s."""
    dense, sparse = Spread(0.5, 0.4, 0.7, 3), Spread(0.2, 0.1, 0.4, 3)
    variants = (curves.Speed(None, dense, 10**9), curves.Speed(0.5, sparse, 10**9 // 2))
    return curves.Speeds(variants, Spread(10, 9, 11, 3), "made up")


@pytest.fixture(scope="module")
def whole(recipe: Recipe) -> str:
    """A page with everything that it can hold."""
    refusals = (Refusal("model.layers.1.mlp.a_rather_long_name_of_a_projection.weight", "a reason & <more>"),)
    report = replace(tiny_report("llama"), refusals=refusals)
    panels = page.known_panels(report, recipe)
    panels.append(page.perplexity_panel(curves.Perplexities(10.0, {0.25: 11.0, 0.5: 20.0, 0.75: 300.0}, "made up")))
    panels.append(page.speed_panel(made_up_speeds()))
    return page.rendered("A model with-a-name/of-some-length-0.5B-Instruct", [report], recipe, panels)


class Elements(HTMLParser):
    """Start tags with their attributes, and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_can_be_read_aloud(whole: str) -> None:
    elements = Elements(whole)
    assert not [tag for tag, _ in elements.tags if tag in ("script", "img", "iframe", "object")]
    assert [given["href"] for tag, given in elements.tags if tag == "link"] == ["data:,"]
    named = {
        value for _, given in elements.tags for key, value in given.items() if key in ("src", "href", "xlink:href")
    }
    assert all(value and value.startswith(("#", "data:")) for value in named)
    assert all(found == "#" for found in re.findall(r"url\((.)", whole))
    ids = [given["id"] for _, given in elements.tags if "id" in given]
    assert len(ids) == len(set(ids))
    figures = [given for tag, given in elements.tags if tag == "svg"]
    assert len(figures) == 8 and all(given["role"] == "img" for given in figures)
    assert whole.count("<title>") >= 1 + len(figures)
    assert ("html", {"lang": "en"}) in elements.tags


def test_the_page_says_what_the_report_says(whole: str, recipe: Recipe) -> None:
    report, text = tiny_report("llama"), Elements(whole).text
    assert f"{report.dense_bytes / 1e6:.0f} → {report.sparse_bytes / 1e6:.0f} MB" in text
    assert f"{100 * report.bytes_skipped_share:.1f} %" in text
    assert recipe.digest[:12] in text and torch.__version__ in text
    assert "a reason & <more>" in text and "a reason & <more>" not in whole
    for part in ("mlp.gate_proj + up_proj", "Measured: made up", "300.00", "+290.00", "10.0 GB/s", "text_digest"):
        assert part in text


def test_energy_is_that_of_the_leading_components(recipe: Recipe) -> None:
    _, energy = page.spectrum_panels(tiny_report("llama"), recipe)
    site = next(site for site in tiny_report("llama").sites if site.read is not None)
    assert site.read is not None
    held = float(recipe.spectra[site.read][: site.kept].sum())
    assert energy.rows[0][2:] == (f"{site.kept} / {site.features}", f"{100 * held:.1f} %")


def test_a_recipe_without_spectra_says_so(recipe: Recipe) -> None:
    old = Recipe(recipe.sparsity, recipe.sites, recipe.rotations, recipe.parameters, recipe.calibration)
    (panel,) = page.spectrum_panels(tiny_report("llama"), old)
    assert panel.note.startswith("Not stored") and not panel.svg
    assert not page.spectrum_panels(replace(tiny_report("llama"), sites=()), recipe)


def test_perplexities_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "SPARSITIES", (0.25,))
    model, done = tiny_model("llama", num_hidden_layers=1), list[None]()
    windows = [token_ids(1, 24, seed) for seed in (1, 2)]
    recipe = larosa_compile.calibrate(model, windows, progress=False)
    found = curves.perplexities(model, recipe, windows, lambda: done.append(None))
    assert found.dense == pytest.approx(perplexity(next_token_losses(model, windows)))
    options: Any = {"recipe": recipe.with_sparsity(0.25), "lowering": "eager"}
    fast = torch.compile(model, backend="larosa", options=options)
    assert found.sparse.keys() == {0.25, 0.5}
    assert found.sparse[0.25] == pytest.approx(perplexity(next_token_losses(fast, windows)))
    assert "2 windows of 24 tokens, 46 tokens predicted" in found.protocol
    assert len(done) == 3
    with pytest.raises(OptionError, match="all of one length"):
        curves.perplexities(model, recipe, [*windows, token_ids(1, 9)])


def test_the_limit_is_bytes_over_bandwidth() -> None:
    measured = made_up_speeds()
    assert [measured.bound_s(variant) for variant in measured.variants] == [0.1, 0.05]
    rows = page.speed_panel(measured).rows
    assert rows[1] == ("50 %", "200.0", "100.0 to 400.0", "50.0")


def test_without_matplotlib_the_error_says_what_to_install(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r'pip install "larosa-compile\[report\]"'):
        page.known_panels(tiny_report("llama"), recipe)


@pytest.mark.slow  # the guide to the page runs the same command, with less to look at
def test_the_command_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything measured; nothing goes through Inductor, and no more is timed than it takes to see it is."""
    from_options, torch_compile = Config.from_options, torch.compile
    monkeypatch.setattr(Config, "from_options", lambda options=None: replace(from_options(options), lowering="eager"))
    monkeypatch.setattr(torch, "compile", lambda model, **kw: torch_compile(model, **({"backend": "eager"} | kw)))
    for name, value in {"SPARSITIES": (), "PROMPT": 8, "TOKENS": 2, "ROUNDS": 1}.items():
        monkeypatch.setattr(curves, name, value)
    folder, target = save_tiny_model(tmp_path / "tiny"), tmp_path / "report.html"
    (tmp_path / "text.txt").write_text(some_text(200))
    given = [str(folder), "--text", str(tmp_path / "text.txt"), "--context", "32"]
    runner, file = CliRunner(), str(tmp_path / "r")
    assert runner.invoke(app, ["calibrate", *given, "--tokens", "64", "-o", file]).exit_code == 0
    arguments = ["explain", *given, "--windows", "2", "-r", file, "--html", str(target), "--speed"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    assert str(target) in result.stderr and "residual stream" in result.stdout
    text = Elements(target.read_text()).text
    for part in ("2 windows of 32 tokens", "context 8; 1 rounds of 2 tokens", "GB/s", "tiny", "torch.compile, dense"):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--html", "page.html"], "a page shows a recipe, got none; give its file with --recipe"),
        (["--text", __file__], "it is measured for a page; give its file with --html"),
        (["--speed"], "it is measured for a page; give its file with --html"),
        (["--html", "no/such/folder/page.html"], "which is no folder; give a file in a folder that exists"),
    ],
)
def test_wrong_command_lines(arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(app, ["explain", "model", *arguments])
    assert result.exit_code == 2
    assert complaint in result.stderr


def browser() -> str:
    found = find_browser()
    if found is None:
        pytest.skip(f"no browser to look with: none of {', '.join(NAMES)} is installed; `make browser` does that")
    return found


@pytest.mark.parametrize("width", [NARROW, 1100])
def test_in_a_browser_nothing_complains_and_nothing_sticks_out(whole: str, width: int) -> None:
    opened = whole.replace("<details>", "<details open>")
    for text in (whole, opened):
        seen = look_at(browser(), text, width)
        assert not seen.console
        assert (seen.width, seen.wide) == (width, "")
        assert seen.figures == 7


def test_the_browser_test_sees_faults(whole: str) -> None:
    wide = whole.replace("<header>", '<header><p style="width:500px">wide</p>')
    assert "P" in look_at(browser(), wide, NARROW).wide
    foreign = whole.replace("<header>", '<header><img src="https://example.invalid/x.png">')
    assert any("Content Security Policy" in line for line in look_at(browser(), foreign, NARROW).console)
