"""Text from a model by transformers' own `generate`, decoded by the compiled sparse graph, and timed."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, GenerationConfig, PreTrainedModel, TextStreamer
from transformers.utils import logging

from larosa_compile import registry
from larosa_compile.errors import ModelError, OptionError
from larosa_compile.loading import check_positions
from larosa_compile.recipe import Recipe
from larosa_compile.report import GraphReport

WARM_UP_TOKENS = 4

WARM_UP_PROMPT = 16
"""Tokens in the prompt that is compiled with, at least."""


def unguarded(**options: Any) -> dict[str, Any]:
    """Options of `torch.compile` by which Dynamo does not look through all modules before every call.

    For whoever has one model of a class in the process, and does not touch its modules. Weights that are no longer
    those that were folded are refused (`StaleWeightsError`), guarded or not. A new dict every time: `torch.compile`
    takes this option out of the one that it is given.
    """
    return options | {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}


@dataclass(frozen=True)
class Continuation:
    """What was generated after one prompt. prefill_s: until the first new token; decode_s: all others together."""

    prompt_tokens: int
    new_tokens: int
    text: str
    prefill_s: float
    decode_s: float

    @property
    def tokens_per_s(self) -> float | None:
        """Decoded tokens per second; the first new token is the prompt's. None where there is no other."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 else None


class ClockedStreamer(TextStreamer):
    """Prints text as it is made, if it is to be seen, and notes when each token came."""

    def __init__(self, tokenizer: Any, visible: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._visible = visible
        self.seconds: list[float] = []

    def put(self, value: Tensor) -> None:
        """value: the prompt `[1, tokens]` first, then one token `[1]` at a time."""
        if not self.next_tokens_are_prompt:
            self.seconds.append(time.perf_counter())
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Prints what became readable."""
        if self._visible:
            super().on_finalized_text(text, stream_end)


class Generator:
    """Greedy generation for one sequence at a time.

    With a recipe, decoding runs through `torch.compile(backend="larosa")`, and prompts through the eager, dense model,
    as transformers does it. Every prompt gets a cache of the same size, as the graph is compiled for one: a longer
    cache for the next prompt would be another compile. Without a recipe nothing is compiled.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        prompts: Sequence[Tensor],
        max_new_tokens: int,
        recipe: Recipe | None,
    ) -> None:
        """prompts: token ids `[1, tokens]` each, all that will be continued.

        Raises:
            OptionError: a prompt is empty, or too long for the model.
            RecipeMismatchError: the recipe belongs to another model.
        """
        longest = max(prompt.shape[1] for prompt in prompts) + max_new_tokens
        if not all(prompt.shape[1] for prompt in prompts):
            raise OptionError("a prompt holds no token; give a prompt with at least one word")
        check_positions(model, longest, "the prompt and the new tokens together")
        # The self-check judges the graph by what it is compiled with, and the first tokens of a text are like no
        # others: their activations are so large in a few features that rounding hides the rest.
        example = max(prompts, key=lambda prompt: prompt.shape[1])
        self._warm_up_prompt = example.repeat(1, math.ceil(WARM_UP_PROMPT / example.shape[1]))
        room = max(longest, self._warm_up_prompt.shape[1] + WARM_UP_TOKENS)
        self._model, self._tokenizer = model, tokenizer
        self._max_new_tokens = max_new_tokens
        self._arguments: dict[str, Any] = {"do_sample": False, "num_beams": 1, "pad_token_id": _padding(tokenizer)}
        if recipe is None:
            self._arguments["disable_compile"] = True
            return
        recipe.attach(model)
        options = unguarded(recipe=recipe)
        arguments: Any = {"backend": "larosa", "mode": None, "fullgraph": False, "options": options}
        config: Any = CompileConfig(**arguments)
        config._compile_all_devices = True  # transformers compiles `generate` on accelerators only by default
        self._arguments |= {"cache_implementation": "static", "compile_config": config}
        if hasattr(GenerationConfig(), "max_cache_len"):
            self._arguments["max_cache_len"] = room

    def warm_up(self) -> float:
        """Generates a few tokens that nobody sees; returns the seconds it took, which is compiling before all.

        Raises:
            ModelError: transformers did not compile this model's decoding.
        """
        start = time.perf_counter()
        self._generate(self._warm_up_prompt, WARM_UP_TOKENS, min_new_tokens=WARM_UP_TOKENS)
        if "compile_config" in self._arguments and not self.compiled_graphs:
            raise ModelError(
                "transformers did not compile this model's decoding, as it has no cache of a fixed size; "
                "run it with --dense, or compile its forward by torch.compile(model, backend='larosa')"
            )
        return time.perf_counter() - start

    def continuation(self, prompt: Tensor, visible: bool) -> Continuation:
        """What the model says after a prompt, printed on the way where `visible`."""
        streamer = ClockedStreamer(self._tokenizer, visible)
        start = time.perf_counter()
        tokens = self._generate(prompt, self._max_new_tokens, streamer=streamer)
        new = tokens[0, prompt.shape[1] :]
        text: str = self._tokenizer.decode(new, skip_special_tokens=True)
        first, last = streamer.seconds[0], streamer.seconds[-1]
        return Continuation(prompt.shape[1], len(new), text, first - start, last - first)

    @property
    def compiled_graphs(self) -> list[GraphReport]:
        """What larosa did with each graph that it has compiled of the model."""
        return registry.reports_of(self._model.parameters())

    def _generate(self, prompt: Tensor, tokens: int, **arguments: Any) -> Tensor:
        ids = prompt.to(self._model.device)
        arguments |= self._arguments | {"attention_mask": torch.ones_like(ids), "max_new_tokens": tokens}
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it remarks on sampling options that greedy decoding leaves out
        try:
            found: Tensor = self._model.generate(ids, **arguments)  # type: ignore[operator]
        finally:
            logging.set_verbosity(verbosity)
        return found


def prompt_ids(tokenizer: Any, text: str, chat: bool | None) -> Tensor:
    """Token ids `[1, tokens]` of a prompt; chat: as a user's turn. None is where the tokenizer has a template for it.

    Raises:
        OptionError: a chat was asked for and the tokenizer has no template.
    """
    template = getattr(tokenizer, "chat_template", None)
    if chat and not template:
        raise OptionError("--chat needs a tokenizer with a chat template, and this model's has none; use --no-chat")
    if template and chat is not False:
        turn = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        ids = tokenizer(text)["input_ids"]
    return torch.tensor([ids], dtype=torch.int64)


def _padding(tokenizer: Any) -> int | None:
    """What `generate` would pad with; never seen with one sequence, but without one it warns."""
    found: int | None = tokenizer.pad_token_id
    return tokenizer.eos_token_id if found is None else found
