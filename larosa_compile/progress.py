"""One progress bar for everything that takes seconds: on stderr, and only where that is a terminal."""

from rich.console import Console
from rich.progress import Progress


def progress_bar(wanted: bool) -> Progress:
    """A progress bar that shows itself if it is wanted and standard error is a terminal."""
    console = Console(stderr=True)
    return Progress(console=console, disable=not (wanted and console.is_terminal))
