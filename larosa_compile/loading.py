"""Models and tokenizers by hub name, folder or GGUF file; what cannot be loaded is one error that says why."""

import contextlib
import importlib.util
import io
import os
import sys
import warnings
from collections.abc import Iterator
from logging import ERROR
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers.utils import logging

from larosa_compile import registry
from larosa_compile.errors import MissingModelError, ModelError, OptionError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

ALLOWED = "give a name on the Hugging Face hub, a folder that save_pretrained wrote, or a .gguf file"


def load_model(
    source: str | os.PathLike[str], dtype: torch.dtype | None = None, device: str | None = None
) -> PreTrainedModel:
    """A causal language model in evaluation mode, ordinary and dense.

    Args:
        source: a name on the hub, a folder, or a .gguf file.
        dtype: of the weights; None is the checkpoint's own, and bfloat16 for a GGUF file, whose blocks are unpacked.
        device: as `torch.device` reads it; None is the accelerator that PyTorch finds, or else the CPU.

    Raises:
        MissingModelError: there is no such file or folder.
        ModelError: it cannot be loaded, or a package to read it with is missing.
        OptionError: there is no such device.
    """
    target = usable_device(device)
    arguments = _located(source)
    if "gguf_file" in arguments:
        arguments |= {"dtype": dtype or torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
    else:
        arguments |= {"dtype": dtype or "auto"}
    with _one_error(source, "the model"), quiet(hub=_is_hub_name(source)):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(**arguments)
    if "gguf_file" in arguments:
        _clear_quantisation_marks(model)
    model.eval()
    model.to(target)  # type: ignore[arg-type]
    if "gguf_file" in arguments:
        dtype_name = str(arguments["dtype"]).removeprefix("torch.")
        registry.remember_origin(model, f"were dequantised to {dtype_name} from {arguments['gguf_file']}")
    return model


def load_tokenizer(source: str | os.PathLike[str]) -> Any:
    """The tokenizer that lies with a model.

    Raises:
        MissingModelError: there is no such file or folder.
        ModelError: it cannot be loaded.
    """
    arguments = _located(source)
    with _one_error(source, "its tokenizer"), quiet(hub=_is_hub_name(source)):
        return AutoTokenizer.from_pretrained(**arguments)


def usable_device(name: str | None) -> torch.device:
    """The device of this name, by default the accelerator that PyTorch finds, or else the CPU.

    Raises:
        OptionError: PyTorch knows no such device, or cannot use it here.
    """
    if name is None:
        return (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None) or torch.device(
            "cpu"
        )
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    # what a build without this device raises is of no one class: AssertionError, NotImplementedError, RuntimeError
    except Exception as error:
        raise OptionError(
            f"device {name!r} cannot be used here ({in_one_line(error)}); "
            "allowed is what PyTorch was built for and finds, such as cpu or cuda:0"
        ) from error
    if device.type == "meta":
        raise OptionError("device 'meta' holds no weights to compute with; use cpu, or an accelerator such as cuda:0")
    return device


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens a model has positions for; None where its configuration does not say."""
    found = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def check_positions(model: PreTrainedModel, tokens: int, what: str) -> None:
    """Refuses more tokens than the model has positions for, where it says how many.

    Raises:
        OptionError: there are more.
    """
    allowed = positions(model)
    if allowed is not None and tokens > allowed:
        raise OptionError(f"{what} may be {allowed} tokens for this model, got {tokens}; ask for fewer")


def in_one_line(error: BaseException, limit: int = 200) -> str:
    """What an exception says, lines joined and cut at `limit` characters; its class where it says nothing."""
    said = " ".join(str(error).split()).rstrip(" .:") or type(error).__name__
    return said if len(said) <= limit else said[: limit - 1] + "…"


def _located(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Where `from_pretrained` finds a model."""
    name, path = os.fspath(source), Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise MissingModelError(f"no GGUF file at {path}; {ALLOWED}")
        missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
        if missing:
            raise ModelError(
                f"reading {path.name} needs {' and '.join(missing)}, which this environment lacks; "
                'pip install "larosa-compile[gguf]"'
            )
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    if path.is_file():
        raise ModelError(f"{path} is a file, but no .gguf file; {ALLOWED}")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"the folder {path} holds no config.json; {ALLOWED}")
    if not path.is_dir() and not _is_hub_name(source):
        raise MissingModelError(f"no model at {name!r}; {ALLOWED}")
    return {"pretrained_model_name_or_path": name}


def _is_hub_name(source: str | os.PathLike[str]) -> bool:
    """Whether this may be `owner/name`, or `name`, on the hub."""
    name, path = os.fspath(source), Path(source)
    return bool(name) and not path.exists() and name.count("/") < 2 and not name.startswith((".", "/", "~"))


@contextlib.contextmanager
def _one_error(source: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Whatever transformers raises, of which there is no list, as one ModelError in one line."""
    try:
        yield
    except Exception as error:
        raise ModelError(f"cannot load {what} from {os.fspath(source)!r} ({in_one_line(error)}); {ALLOWED}") from error


@contextlib.contextmanager
def quiet(hub: bool) -> Iterator[None]:
    """Silences log lines, warnings and bars; those of a download, `hub`, stay where somebody sees them."""
    downloads = hub and sys.stderr.isatty()
    verbosity, hub_verbosity = logging.get_verbosity(), hub_logging.get_verbosity()
    bars = not are_progress_bars_disabled()
    logging.set_verbosity_error()
    hub_logging.set_verbosity(ERROR)  # it tells of every retry
    if bars and not downloads:
        disable_progress_bars()
    # the GGUF reader's bar comes from tqdm itself, which no switch reaches
    sink = contextlib.nullcontext() if downloads else contextlib.redirect_stderr(io.StringIO())
    try:
        with sink, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars and not downloads:
            enable_progress_bars()


def _clear_quantisation_marks(model: PreTrainedModel) -> None:
    """Makes a dequantised model ordinary: while marked as quantised, transformers refuses to save it."""
    for name in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(name, None)
    model.__dict__.pop("is_quantized", None)
    model.config.__dict__.pop("quantization_config", None)
