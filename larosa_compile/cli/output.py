"""Where commands print: results to standard output, everything else to standard error."""

import json
import sys
from collections.abc import Mapping
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

PIPED_WIDTH = 120
"""Columns where nobody says how wide the output is."""


def print_json(value: Mapping[str, Any]) -> None:
    """Prints one JSON object."""
    typer.echo(json.dumps(value, indent=1))


def print_table(table: Table) -> None:
    """Prints a table, as wide as the terminal."""
    Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False).print(table)


def note(line: str) -> None:
    """Prints a line that is no result to standard error."""
    typer.echo(line, err=True)


def table(*columns: str, title: str | None = None) -> Table:
    """A table whose first column is text and whose others are numbers."""
    made = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left", overflow="fold")
    return made
