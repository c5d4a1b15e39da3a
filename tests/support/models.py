"""Tiny decoders with random weights, one builder for every architecture of transformers' mapping."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_model(
    architecture: str, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: object
) -> PreTrainedModel:
    """A small model with every norm scale and bias moved away from one and zero, so that a wrong fold shows."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **(SIZES | sizes))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                # initial weights are small; trained ones are not, and activations should have outliers
                parameter.mul_(3 * torch.rand(1, parameter.shape[-1]) + 0.5)
    return model.to(dtype)


def token_ids(rows: int, tokens: int, seed: int = 1, vocabulary: int = 96) -> torch.Tensor:
    """Random token ids [rows, tokens]."""
    return torch.randint(3, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """`‖found − expected‖ / ‖expected‖` in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
