"""Models of known shapes with random weights: what a decode step costs depends on shapes, not on what was learned."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from benchmarks import assets
from larosa_compile import loading

STD = 0.02
DRAWN = 16_777_259
"""Normals drawn once and copied to every weight. A prime, so that no two rows of a weight start at the same one."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder. `family`: transformers' name of the architecture."""

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool

    @property
    def head(self) -> int:
        """Features of one attention head."""
        return self.hidden // self.heads

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """What the compiler makes of a layer's linears: name -> (in, out), those that read one activation together."""
        return {
            "qkv": (self.hidden, (self.heads + 2 * self.kv_heads) * self.head),
            "o": (self.heads * self.head, self.hidden),
            "gate_up": (self.hidden, 2 * self.intermediate),
            "down": (self.intermediate, self.hidden),
        }

    def config(self, layers: int | None = None) -> PreTrainedConfig:
        """The configuration, cut to `layers` layers."""
        return AutoConfig.for_model(
            self.family,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers if layers is None else layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head,
            vocab_size=self.vocabulary,
            tie_word_embeddings=self.tied,
            max_position_embeddings=32768,
        )


SHAPES = {
    "llama-1b": Shape("llama", 2048, 8192, 16, 32, 8, 128256, True),
    "llama-7b": Shape("llama", 4096, 11008, 32, 32, 32, 32000, False),
    "llama-8b": Shape("llama", 4096, 14336, 32, 32, 8, 128256, False),
    "qwen-0.5b": Shape("qwen2", 896, 4864, 24, 14, 2, 151936, True),
    "qwen-1.5b": Shape("qwen2", 1536, 8960, 28, 12, 2, 151936, True),
    "qwen-7b": Shape("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
}
"""Llama 3.2 1B, Llama 2 7B, Llama 3.1 8B and Qwen 2.5."""


def build(name: str, layers: int | None = None) -> PreTrainedModel:
    """A bfloat16 model in evaluation mode without gradients: a known shape, the same weights each time, or a real one.

    Args:
        name: of a shape in `SHAPES`, or whatever `assets.load_model` reads.
        layers: cut a known shape to this depth.

    Raises:
        ValueError: `layers` is not among the shape's, or was given for a real model.
    """
    if layers is not None:
        check_depth(name, layers)
    if name not in SHAPES:
        return without_gradients(loading.load_model(assets.source(name), torch.bfloat16, "cpu"))
    return materialised(skeleton(SHAPES[name].config(layers)))


def checkpoint(name: str, layers: int | None, folder: Path) -> str:
    """What `build` reads the same model from as users have theirs, mapped from a file: a known shape is written to
    `folder`, a real model is where it is."""
    if name not in SHAPES:
        return name
    build(name, layers).save_pretrained(folder)
    return str(folder)


def check_depth(name: str, layers: int) -> None:
    """Refuses a depth that the model cannot be cut to.

    Raises:
        ValueError: not a known shape, or `layers` is not among its layers.
    """
    if name not in SHAPES:
        raise ValueError(f"only a known shape ({', '.join(SHAPES)}) can be cut to {layers} layers, got {name!r}")
    if not 1 <= layers <= SHAPES[name].layers:
        raise ValueError(f"{name} can be cut to 1 to {SHAPES[name].layers} layers, got {layers}")


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device: shapes without memory."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return without_gradients(model.eval())


def materialised(model: PreTrainedModel) -> PreTrainedModel:
    """Gives a skeleton memory on the CPU: normal weights, scales of one, biases of zero, its buffers computed anew."""
    model.to_empty(device="cpu")
    model.tie_weights()  # to_empty gave each place of a shared parameter memory of its own
    generator = torch.Generator().manual_seed(0)
    block = torch.empty(DRAWN, dtype=torch.bfloat16).normal_(0, STD, generator=generator)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if path.endswith(".bias") else 1.0)
            else:
                _fill(parameter.view(-1), block, generator)
        for module in model.modules():
            if any(True for _ in module.buffers(recurse=False)):
                # memory of a buffer that no checkpoint holds is garbage until its module is made again
                fresh: Callable[..., torch.nn.Module] = type(module)
                for name, buffer in fresh(config=model.config).named_buffers(recurse=False):
                    module.get_buffer(name).copy_(buffer)
    return without_gradients(model)


def without_gradients(model: PreTrainedModel) -> PreTrainedModel:
    """The same model; its parameters ask for no gradients."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def _fill(flat: torch.Tensor, block: torch.Tensor, generator: torch.Generator) -> None:
    """Copies a drawn block over a weight from a random offset on, around and around: drawing all would take minutes."""
    start = int(torch.randint(len(block), (), generator=generator))
    position = -start
    while position < len(flat):
        first, last = max(position, 0), min(position + len(block), len(flat))
        flat[first:last] = block[first - position : last - position]
        position += len(block)


def parameters(model: PreTrainedModel) -> int:
    """How many parameters a model has, a tied one counted once."""
    return sum(math.prod(parameter.shape) for parameter in model.parameters())
