"""Text for calibration and evaluation: from files, or from a data set on the hub."""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from larosa_compile.calibration import Tokenizer, token_batches
from larosa_compile.errors import OptionError
from larosa_compile.loading import check_positions, in_one_line, positions, quiet
from larosa_compile.progress import progress_bar

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

CHARACTERS_PER_TOKEN = 32
"""More than any text has on average, so that a large source is read no further than it is needed."""

WINDOW = 1024
"""Tokens in a window, where nobody says otherwise."""

ALLOWED = "give NAME[:split[:column]], such as Salesforce/wikitext/wikitext-2-raw-v1:train:text"


def file_texts(paths: Sequence[Path], tokens: int) -> list[str]:
    """The text of files, each read no further than `tokens` tokens may need.

    Raises:
        OptionError: one cannot be read, or is no UTF-8, or all are blank.
    """
    texts = []
    for path in paths:
        try:
            with open(path, encoding="utf-8") as file:
                texts.append(file.read(tokens * CHARACTERS_PER_TOKEN))
        except OSError as error:
            raise OptionError(f"cannot read --text {path} ({error.strerror}); give a text file in UTF-8") from error
        except UnicodeDecodeError as error:
            raise OptionError(
                f"--text {path} is not UTF-8 (byte {error.start}: {error.reason}); give a text file in UTF-8"
            ) from error
    return _not_blank(texts, "--text")


def dataset_texts(spec: str, tokens: int) -> list[str]:
    """Rows of a data set's column of text, as many as `tokens` tokens may need.

    spec: NAME[:split[:column]]; NAME is owner/name or owner/name/configuration on the hub, or a folder. By default the
    split is train, and the column is "text", or the only one that holds text.

    Raises:
        OptionError: there is no such data set, split or column, or nothing in it.
    """
    name, split, column, *rest = [*spec.split(":"), "", ""]
    if not name or any(rest):
        raise OptionError(f"--dataset {spec!r} is not understood; {ALLOWED}")
    wanted, texts = tokens * CHARACTERS_PER_TOKEN, list[str]()
    try:
        with quiet(hub=True), progress_bar(True) as bar:
            task = bar.add_task(f"reading {name}, characters", total=wanted)
            for row in _rows(name, split or "train"):
                column = column or _text_column(row)
                texts.append(row[column] if isinstance(row[column], str) else "")
                bar.advance(task, len(texts[-1]))
                wanted -= len(texts[-1])
                if wanted <= 0:
                    break
    except OptionError:
        raise
    except KeyError as error:
        raise OptionError(f"--dataset {name!r} has no column {column!r}, only {', '.join(row)}; {ALLOWED}") from error
    # of what the package and the network raise there is no list
    except Exception as error:
        raise OptionError(f"cannot read --dataset {spec!r} ({in_one_line(error)}); {ALLOWED}") from error
    return _not_blank(texts, f"--dataset {spec!r}")


def _not_blank(texts: list[str], source: str) -> list[str]:
    if not any(text.strip() for text in texts):
        raise OptionError(f"{source} holds no text; give one of at least two tokens")
    return texts


def window_length(model: "PreTrainedModel", asked: int | None) -> int:
    """Tokens in a window: as asked for, or else `WINDOW`, or what the model has positions for if that is less.

    Raises:
        OptionError: the model has fewer positions than were asked for.
    """
    if asked is None:
        return min(WINDOW, positions(model) or WINDOW)
    check_positions(model, asked, "--context")
    return asked


def windows_of(texts: Iterable[str], tokenizer: Tokenizer, context: int, count: int, source: str) -> "list[Tensor]":
    """At most `count` windows `[1, context]` of token ids, without overlap; a shorter one if there is no whole one.

    Raises:
        OptionError: there are not even two tokens.
    """
    windows = list(islice(token_batches(list(texts), tokenizer, context), count))
    if not windows or windows[0].numel() < 2:
        raise OptionError(f"{source} holds a single token; give a text of at least two tokens")
    return windows


def _rows(name: str, split: str) -> Iterable[dict[str, Any]]:
    import datasets  # type: ignore[import-untyped]

    path, configuration = name, None
    if name.count("/") == 2 and not Path(name).exists():
        path, _, configuration = name.rpartition("/")
    rows: Iterable[dict[str, Any]] = datasets.load_dataset(path, configuration, split=split, streaming=True)
    return rows


def _text_column(row: dict[str, Any]) -> str:
    """The column to read where none was named.

    Raises:
        OptionError: several hold text, or none does.
    """
    columns = [column for column, value in row.items() if isinstance(value, str)]
    if "text" in columns:
        return "text"
    if len(columns) != 1:
        raise OptionError(f"--dataset has several columns or none of text ({', '.join(row)}); name one: {ALLOWED}")
    return columns[0]
