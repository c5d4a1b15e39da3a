"""A page in a real browser without a window: what its console said, and how wide it is in a narrow frame."""

import html
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--enable-logging=stderr", "--virtual-time-budget=5000"),
)

# The page stands in a frame of that width: a window has a least width of its own, a frame has none. What sticks out
# is named, so that a failure says where to look.
_FRAME = """<!doctype html><body style="margin:0">
<iframe style="width:{width}px;height:800px;border:0" srcdoc="{page}"></iframe><p id="found"></p><script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const inner = frame.contentDocument, root = inner.documentElement;
  const scrolls = node => node && (getComputedStyle(node).overflowX === "auto" || scrolls(node.parentElement));
  const wide = [...inner.body.querySelectorAll("*")].filter(node =>
    !scrolls(node.parentElement) && node.getBoundingClientRect().right > {width} + 1).map(node => node.tagName);
  document.getElementById("found").textContent =
    `found: ${{root.scrollWidth}} ${{inner.querySelectorAll("figure svg").length}} ${{wide.join(",")}} end`;
}};
</script>"""


@dataclass(frozen=True)
class Seen:
    """console: what was logged. width: of the page, scrolled to its end. figures: `<svg>` in figures. wide: tags of
    elements that stick out."""

    console: tuple[str, ...]
    width: int
    figures: int
    wide: str


def find_browser() -> str | None:
    """The path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def look_at(browser: str, page: str, width: int) -> Seen:
    """Opens a page, given as text, in a frame of `width` pixels."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "frame.html"
        file.write_text(_FRAME.format(width=width, page=html.escape(page)), encoding="utf-8")
        profile = f"--user-data-dir={folder}/profile"
        command = [browser, *FLAGS, profile, "--dump-dom", file.as_uri()]
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    found = re.search(r"found: (\d+) (\d+) (\S*) end", run.stdout)
    assert found is not None, run.stderr
    console = tuple(line for line in run.stderr.splitlines() if ":CONSOLE" in line)
    return Seen(console, int(found[1]), int(found[2]), found[3])
