"""The file a recipe lives in: one safetensors file that any safetensors reader can open.

Tensors: the rotations by basis key, and the spectrum of each as "KEY spectrum". Metadata (strings): "format",
"schema", "digest", and "header", the JSON of everything else. What the header means is known to `recipe.py` only.
"""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from larosa_compile.errors import RecipeError

FORMAT = "larosa-recipe"
SCHEMA = "4"
READABLE = ("2", "3", SCHEMA)
"""Schema 3 is schema 4 without methods and thresholds, schema 2 is schema 3 without spectra."""

_SPECTRUM = " spectrum"
"""Behind a basis key; no parameter path, hence no key, holds a space."""


def write(
    path: Path,
    header: Mapping[str, object],
    rotations: Mapping[str, Tensor],
    spectra: Mapping[str, Tensor],
    digest: str,
) -> None:
    """Write to a new file beside `path`, then rename it, so that no reader ever sees half a recipe.

    Raises:
        RecipeError: the folder does not exist.
    """
    if not path.parent.is_dir():
        raise RecipeError(f"cannot save a recipe to {path}: create the folder {path.parent} first")
    metadata = {
        "format": FORMAT,
        "schema": SCHEMA,
        "header": json.dumps(header, allow_nan=False),
        "digest": digest,
    }
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        # safetensors makes files that only their owner can read; a recipe gets the usual mode of a new file.
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode
        tensors = {**rotations, **{f"{key}{_SPECTRUM}": spectrum for key, spectrum in spectra.items()}}
        save_file(_unshared(tensors), partial, metadata=metadata)
        partial.chmod(mode)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, object], dict[str, Tensor], dict[str, Tensor], str]:
    """Return header, rotations, spectra and digest as the file gives them, tensors mapped where possible.

    Raises:
        RecipeError: the file is missing, truncated, of another schema, or not a recipe.
    """
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise RecipeError(f"no recipe at {path}: it {what}; give a file that Recipe.save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata)
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise RecipeError(
            f"{path} is not a whole safetensors file ({error}); it may be truncated: copy it again or calibrate again"
        ) from error
    try:
        header = json.loads(metadata.get("header", ""))
    except ValueError as error:
        raise damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise damaged(path, f"its header is a {type(header).__name__}, expected an object")
    rotations = {key: tensor for key, tensor in tensors.items() if not key.endswith(_SPECTRUM)}
    spectra = {key.removesuffix(_SPECTRUM): tensors[key] for key in tensors.keys() - rotations.keys()}
    return header, rotations, spectra, metadata.get("digest", "")


def damaged(path: Path, how: str) -> RecipeError:
    """Return the error for a file that was a recipe once."""
    return RecipeError(f"{path} is damaged: {how}; copy it again or calibrate again")


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise RecipeError(
            f"{path} is a safetensors file but not a recipe (format {metadata.get('format')!r}, "
            f"expected {FORMAT!r}); give a file that Recipe.save wrote"
        )
    if metadata.get("schema") not in READABLE:
        raise RecipeError(
            f"{path} has recipe schema {metadata.get('schema')!r}, this version reads "
            f"{', '.join(map(repr, READABLE))}; upgrade larosa-compile, or calibrate again"
        )


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with no two in the same memory, which safetensors would refuse."""
    seen: set[int] = set()
    unshared: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        unshared[key] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return unshared
