"""The rules of the source tree: import direction, size and names of modules, no model families."""

import ast
import re
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "passes", "larosa_compile", "benchmarks", "tests")
# pathlib does not follow the links in larosa_compile, so each file is met once, under its real folder.
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TEMPLATES = sorted((ROOT / "kernels").rglob("*.jinja"))
PACKAGE = "larosa_compile"
BARE = {"kernels", "passes"}
FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc", "manager", "base"}
MAX_LINES = 300


def folder_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def imports(source: str, package: str) -> set[str]:
    """Dotted names that a module of `package` imports; `from a import b` counts as `a.b`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def wrong_imports(source: str, folder: str, package: str) -> set[str]:
    """What a module in `folder` imports against the direction kernels <- passes <- larosa_compile."""
    allowed = {"kernels": {"kernels"}, "passes": {"kernels", "passes"}}.get(folder)
    names = [name.split(".") for name in imports(source, package)]
    bare = {".".join(name) for name in names if name[0] in BARE}
    if allowed is None:
        return bare
    return bare | {".".join(name) for name in names if name[0] == PACKAGE and not allowed & {*name[1:2]}}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    parts = path.relative_to(ROOT).parent.parts
    package = ".".join([PACKAGE, *parts] if parts[0] in BARE else parts)
    assert not wrong_imports(path.read_text(), folder_of(path), package)


@pytest.mark.parametrize(
    ("folder", "source", "wrong"),
    [
        ("kernels", "from larosa_compile.kernels import ops", set()),
        ("kernels", "from . import ops", set()),
        ("kernels", "from ..passes import plan", {"larosa_compile.passes.plan"}),
        ("kernels", "import larosa_compile.passes.plan", {"larosa_compile.passes.plan"}),
        ("kernels", "from larosa_compile import errors", {"larosa_compile.errors"}),
        ("kernels", "import larosa_compile", {"larosa_compile"}),
        ("passes", "from larosa_compile.kernels import ops", set()),
        ("passes", "from larosa_compile.recipe import Recipe", {"larosa_compile.recipe.Recipe"}),
        ("larosa_compile", "def f():\n    from kernels import ops", {"kernels.ops"}),
        ("tests", "import passes.plan", {"passes.plan"}),
    ],
)
def test_the_import_test_sees_every_form(folder: str, source: str, wrong: set[str]) -> None:
    assert wrong_imports(source, folder, f"{PACKAGE}.{folder}") == wrong


def test_no_module_is_too_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert not {path: lines for path, lines in lengths.items() if lines > MAX_LINES}


def test_no_module_is_named_after_nothing() -> None:
    assert not [str(path.relative_to(ROOT)) for path in SOURCES if path.stem in FORBIDDEN_NAMES]


def test_top_level_folders_that_must_not_be_regular_packages() -> None:
    for folder in ("kernels", "passes", "tests"):
        assert not list((ROOT / folder).rglob("__init__.py"))
    for name in BARE:
        link = ROOT / PACKAGE / name
        assert link.is_symlink()
        assert link.resolve() == ROOT / name


def test_no_model_family_is_named() -> None:
    """Structure decides, not names: neither `model_type` nor a class of transformers' models appears."""
    classes: set[str] = set()
    for names in (*MODEL_MAPPING_NAMES.values(), *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        classes |= {names} if isinstance(names, str) else set(names)
    families = {re.sub(r"(ForCausalLM|LMHeadModel|Model)$", "", name) for name in classes}
    # A family's other classes are its name and a capitalised word: LlamaRMSNorm, Qwen2MLP.
    alternatives = "|".join(sorted(map(re.escape, families), reverse=True))
    pattern = re.compile(rf"\bmodel_type\b|\b(?:{alternatives})(?:RMSNorm|MLP|[A-Z][a-z]\w*)")
    assert pattern.search("LlamaRMSNorm")
    assert pattern.search("x.config.model_type")
    files = [path for path in SOURCES if folder_of(path) in ("passes", PACKAGE)]
    found = {str(path.relative_to(ROOT)): sorted(set(pattern.findall(path.read_text()))) for path in files}
    assert not {path: names for path, names in found.items() if names}


PARAMETER_NAMES = re.compile(
    r"[a-z]+_proj\b|\b(?:lm_head|embed_tokens|self_attn|mlp|wte|wpe|c_attn|experts?|router|gate_up|input_layernorm)\b"
    r"|\blayers?\.\d|\.h\.\d"
)


def strings_in_code(source: str) -> list[str]:
    """String constants that a program could compare with; docstrings and other free-standing strings are not."""
    tree = ast.parse(source)
    free = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in free)
    return [node.value for node in constants if isinstance(node.value, str)]


def test_no_parameter_is_known_by_name() -> None:
    assert PARAMETER_NAMES.search('x.endswith("q_proj.weight")') and PARAMETER_NAMES.search("layers.0.a")
    assert strings_in_code('"""mlp"""\nif name == "mlp":\n    "lm_head"') == ["mlp"]
    files = [path for path in SOURCES if folder_of(path) in ("passes", PACKAGE)]
    found = {
        str(path.relative_to(ROOT)): [
            text for text in strings_in_code(path.read_text()) if PARAMETER_NAMES.search(text)
        ]
        for path in files
    }
    assert not {path: texts for path, texts in found.items() if texts}
