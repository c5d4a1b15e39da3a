"""The installed package, seen from fresh interpreters."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import larosa_compile

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, cwd: Path) -> str:
    """Run `code` in a new interpreter, warnings as in any program; return what it printed."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_checkout_does_not_shadow_what_transformers_imports() -> None:
    """`kernels` is a Hugging Face package, too; ours must not be taken for it when cwd is the checkout."""
    code = "import transformers, transformers.integrations.hub_kernels as h; print(h.is_kernels_available())"
    assert python(code, ROOT) == "False"


@pytest.mark.parametrize("where", ["checkout", "elsewhere"])
def test_dynamo_finds_the_backend(where: str, tmp_path: Path) -> None:
    code = "import torch._dynamo; print('larosa' in torch._dynamo.list_backends())"
    assert python(code, ROOT if where == "checkout" else tmp_path) == "True"


def test_folders_of_the_checkout_import_under_the_package(tmp_path: Path) -> None:
    code = "import larosa_compile.passes, larosa_compile.kernels; print('ok')"
    assert python(code, tmp_path) == "ok"


def test_import_is_lean(tmp_path: Path) -> None:
    code = "import sys, larosa_compile; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    assert python(code, tmp_path) == "set()"


def test_recipe_needs_no_transformers(tmp_path: Path) -> None:
    code = "import sys; from larosa_compile import Recipe; print('transformers' in sys.modules)"
    assert python(code, tmp_path) == "False"


def test_public_names() -> None:
    assert larosa_compile.__version__ == importlib.metadata.version("larosa-compile")
    assert set(larosa_compile.__all__) <= set(dir(larosa_compile))
    for name in larosa_compile.__all__:
        assert getattr(larosa_compile, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'sparsify'"):
        larosa_compile.sparsify  # noqa: B018
