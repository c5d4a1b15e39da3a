"""A digest of the sources that decide what code Inductor generates for the ops of this package."""

import functools
import hashlib
from pathlib import Path


def folder_digest(folder: Path) -> str:
    """sha256, in hex, over the names and contents of `folder`'s modules and templates."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.py"), *folder.glob("templates/*.jinja")]):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


@functools.cache
def source_digest() -> str:
    """`folder_digest` of this folder, read once per process.

    Inductor's cache key does not see lowering sources: without this in the key, what an edited template
    generated before the edit is served from the cache.
    """
    return folder_digest(Path(__file__).parent)
