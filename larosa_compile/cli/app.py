"""The console script `larosa`: its commands, and how each of them ends.

Exit codes: 0 done, 1 an error, 2 a command line that is wrong, 130 interrupted. Every error is one line on stderr.
"""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import larosa_compile
from larosa_compile.cli.bench import bench
from larosa_compile.cli.calibrate import calibrate
from larosa_compile.cli.evaluate import evaluate
from larosa_compile.cli.explain import explain
from larosa_compile.cli.generate import generate
from larosa_compile.cli.inspect import inspect
from larosa_compile.errors import LarosaError

TRACEBACK_VARIABLE = "LAROSA_TRACEBACK"
"""Environment variable that stands in for the option `--traceback`."""

INTERRUPTED = 130

# by inheritance, as typer keeps the class itself where it likes: in itself or in click
UsageError: Any = typer.BadParameter.__mro__[1]


class Commands(TyperGroup):
    """Commands whose every failure is one line on standard error and an exit code."""

    def main(self, args: Any = None, *rest: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Runs a command line; exits unless `standalone_mode` is off."""
        try:
            code: Any = super().main(args, *rest, **extra | {"standalone_mode": False})
        except UsageError as error:
            if error.format_message():  # a bare `larosa` has printed its help, and says no more
                complain(self._usage(error, sys.argv[1:] if args is None else args))
            code = error.exit_code
        except typer.Abort:
            code = INTERRUPTED
        if standalone_mode:
            raise SystemExit(code or 0)
        return code

    def invoke(self, context: Any) -> Any:
        """Runs the command that was asked for; its errors become lines, or pass where a traceback is wanted."""
        try:
            return super().invoke(context)
        except (typer.Exit, typer.Abort, UsageError, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            complain("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if context.params.get("traceback") or os.environ.get(TRACEBACK_VARIABLE, "0") != "0":
                raise
            complain(described(error))
            raise typer.Exit(1) from error

    def _usage(self, error: Any, args: Sequence[str]) -> str:
        """A wrong command line: what is allowed, as the parser says it, what was given, and where to read more."""
        message = " ".join(error.format_message().split()).rstrip(".").replace("Value error, ", "")
        given = _given(getattr(error, "param", None), args)
        if given is not None and given not in message:
            message += f", got {given!r}"
        context = error.ctx
        if context is not None and context.command is self:
            message += f"; the commands are {', '.join(self.commands)}"
        path = context.command_path if context is not None else "larosa"
        return f"{message}; see '{path} --help'"


def _given(parameter: Any, args: Sequence[str]) -> str | None:
    """What a command line gives for an option, where it does: the parser's own messages leave it out."""
    names = getattr(parameter, "opts", ())
    for arg, after in zip(args, [*args[1:], None], strict=True):
        name, equals, value = arg.partition("=")
        if name in names:
            return value if equals else after
    return None


def described(error: BaseException) -> str:
    """One line for an error: larosa's own says what to do; of any other, which no one foresaw, what it is."""
    known = _larosa_error(error)
    if known is not None:
        return " ".join(str(known).split())
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename!r}; give a file that can be read or written there"
    said = " ".join(str(error).split())[:200]
    return (
        f"{type(error).__name__}: {said or 'no message'}; this is not expected: run again with "
        f"{TRACEBACK_VARIABLE}=1 to see where it comes from, and report it"
    )


def _larosa_error(error: BaseException | None) -> LarosaError | None:
    """The error of ours that this one is, or was raised from: Dynamo wraps what a backend raises."""
    seen = set[int]()
    while error is not None and id(error) not in seen:
        if isinstance(error, LarosaError):
            return error
        seen.add(id(error))
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return None


def complain(line: str) -> None:
    """Prints an error's one line."""
    typer.echo(f"larosa: {line}", err=True)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"larosa {larosa_compile.__version__}")
        raise typer.Exit


def larosa(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help=f"Show where an error comes from, as {TRACEBACK_VARIABLE}=1 does.")
    ] = False,
) -> None:
    """Decode with fewer weights read: calibrate a model once, then run it sparse through torch.compile."""


app = typer.Typer(name="larosa", cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False)
app.callback()(larosa)
app.command()(calibrate)
app.command()(inspect)
app.command()(generate)
app.command()(bench)
app.command()(explain)
app.command("eval")(evaluate)
