"""The digest that keys compiled kernels."""

import shutil
from pathlib import Path

from larosa_compile.kernels import digest


def test_digest_sees_every_source(tmp_path: Path) -> None:
    source = Path(digest.__file__).resolve().parent
    assert digest.source_digest() == digest.folder_digest(source)
    seen = {digest.source_digest()}
    for file in ["ops.py", "lowering.py", "templates/select_row.cpp.jinja"]:
        copy = tmp_path / file.replace("/", "_")
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / file).write_text((copy / file).read_text() + "\n")
        seen.add(digest.folder_digest(copy))
    assert len(seen) == 4
