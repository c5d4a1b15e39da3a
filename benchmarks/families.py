"""Every causal language model of transformers as a tiny model with random weights, built from a shrunken config.

Sizes and counts shrink; structure stays. Lists with an entry per layer keep one layer of each kind, and what no rule
about names and types can reach stands in `benchmarks/family_overrides.py`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.family_overrides import BASE, COUNT_FROM_ZERO, OVERRIDES, UNSUPPORTED
from larosa_compile.caches import CACHE

# Sizes differ from each other wherever a config allows it, so that no coincidence of shapes hides an error, and stay
# above 16 and a multiple of four, which grouped matrix products ask for.
SIZES: dict[str, int] = {
    name: size
    for size, names in (
        (64, "hidden_size n_embd d_model emb_dim embedding_dim lru_width"),
        (112, "intermediate_size ffn_dim ffn_hidden_size dff dim_ff d_ff d_inner feed_forward_size mlp_dim"),
        (112, "encoder_ffn_dim decoder_ffn_dim"),
        (136, "intermediate_size_mlp dense_intermediate_size"),
        (40, "moe_intermediate_size expert_ffn_hidden_size"),
        (56, "shared_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size"),
        (56, "moe_shared_expert_intermediate_size"),
        (4, "num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads index_n_heads"),
        (4, "encoder_attention_heads decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads"),
        (4, "linear_num_heads linear_num_value_heads mamba_n_heads mamba_num_heads"),
        (2, "num_key_value_heads swa_num_key_value_heads linear_num_key_heads n_mamba_heads"),
        (2, "n_groups mamba_n_groups mamba_ngroups o_groups"),
        (24, "head_dim dim_head kv_channels d_kv attention_head_size swa_head_dim linear_head_dim"),
        (24, "linear_key_head_dim index_head_dim qk_nope_head_dim"),
        (24, "hidden_size_per_layer_input laurel_rank router_hidden_size"),
        (32, "linear_value_head_dim mamba_d_head mamba_head_dim v_head_dim"),
        (20, "state_size ssm_state_size mamba_d_state time_step_rank mamba_dt_rank qk_rope_head_dim"),
        (36, "q_lora_rank o_lora_rank"),
        (28, "kv_lora_rank"),
        (160, "vocab_size decoder_vocab_size vocab_size_per_layer_input shape_vocab_size pronunciation_vocab_size"),
        (156, "unpadded_vocab_size"),
        (128, "max_position_embeddings n_positions max_seq_len n_ctx model_max_length"),
        (2, "num_hidden_layers n_layer n_layers num_layers num_blocks depth"),
        (2, "encoder_layers decoder_layers num_encoder_layers num_decoder_layers"),
        (6, "num_experts num_local_experts n_routed_experts moe_num_experts"),
        (2, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts zero_expert_num"),
        (2, "n_group num_expert_group"),
        (1, "topk_group first_k_dense_replace num_dense_layers"),
        (6, "sliding_window sliding_window_size attention_window_size window_size attention_chunk_size"),
        (8, "chunk_size mamba_chunk_size patch_size"),
        (4, "index_topk"),
        (32, "image_size"),
    )
    for name in names.split()
}
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")
# Set whatever the default is, where a config has them; many defaults are None or tell nothing about released models.
ALWAYS: dict[str, Any] = {
    "is_decoder": True,
    "head_dim": 24,
    "num_key_value_heads": 2,
    # of state space models; the defaults are so short that few tokens leave the decay without effect
    "time_step_min": 0.05,
    "time_step_max": 0.5,
}
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
FIRST_TOKEN, LAST_TOKEN = 3, 100  # ordinary tokens; all special ones lie outside
NOISE = 0.1


class UnsupportedFamily(RuntimeError):
    """transformers itself cannot build this family."""


def family_names() -> list[str]:
    """All names of the causal-LM mapping of transformers."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family: str) -> PreTrainedConfig:
    """The config of a family with all structure and small sizes."""
    if family in UNSUPPORTED:
        raise UnsupportedFamily(f"{family}: {UNSUPPORTED[family]}")
    return _shrunken(CONFIG_MAPPING[family], deepcopy(OVERRIDES.get(family, {})))


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A model of `tiny_config(family)` in evaluation mode and float32; every weight is random and matters."""
    config = tiny_config(family)
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])
    for part in ("text_config", "decoder"):  # a text model that goes by the name of a larger one
        if isinstance(getattr(config, part, None), model_class.config_class):
            config = getattr(config, part)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class._from_config(config).float().eval()
        _randomise(model)
    assert isinstance(model, PreTrainedModel)
    return model


def example_inputs(model: PreTrainedModel, batch: int = 1, tokens: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments for a causal forward of `tokens` ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = batch * getattr(model, "num_codebooks", 1)  # models of audio read a row of ids per codebook
    return {"input_ids": torch.randint(FIRST_TOKEN, LAST_TOKEN, (rows, tokens), generator=generator)}


def cache_of(output: Any) -> tuple[str, Any]:
    """The cache in a model's output, and the name of the argument that takes it back."""
    for name in (CACHE, "cache_params", "past_buckets_states", "mems", "state"):
        if getattr(output, name, None) is not None:
            return name, getattr(output, name)
    raise ValueError(f"no cache in {type(output).__name__}, only {', '.join(output.keys())}")


def decode_inputs(model: PreTrainedModel, output: Any, token_ids: Tensor, position: int) -> dict[str, Any]:
    """Keyword arguments that go on from `output` with one token `[rows, 1]` at `position`, in the model's own cache."""
    name, cache = cache_of(output)
    inputs: dict[str, Any] = {"input_ids": token_ids, name: cache, "use_cache": True}
    if model.config.model_type in COUNT_FROM_ZERO:
        inputs["position_ids"] = torch.full_like(token_ids, position)
    return inputs


def _shrunken(config_class: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    """A config made anew, so that whatever it derives from sizes is derived from the small ones."""
    required = overrides.get(BASE, {})
    replaced = {name: value for name, value in overrides.items() if isinstance(value, PreTrainedConfig)}
    given = {name: value for name, value in overrides.items() if name != BASE and name not in replaced}
    values = _defaults(config_class, required)
    kwargs = dict(required)
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            kwargs[name] = _shrunken(type(value), given.pop(name, {}))
        elif name in SIZES and type(value) is int and value > 1:
            kwargs[name] = SIZES[name]
        elif name in ALWAYS:
            kwargs[name] = ALWAYS[name]
        elif name == "rope_parameters":
            kwargs |= _rope(value or {})
    if "kv_lora_rank" in values:  # latent attention: a key head for each query head, and the rotary part apart
        latent = {"num_key_value_heads": SIZES["num_attention_heads"], "head_dim": SIZES["qk_rope_head_dim"]}
        kwargs |= {name: value for name, value in latent.items() if name in kwargs}
    if "layer_types" in given:
        given["num_hidden_layers"] = len(given["layer_types"])
    config = config_class(**(kwargs | _tokens(values) | _layer_lists(values) | given))
    for name, part in replaced.items():
        object.__setattr__(config, name, part)  # past the check of the part's type
    return config


def _defaults(config_class: type[PreTrainedConfig], required: dict[str, Any]) -> dict[str, Any]:
    """What the fields of a default config hold, without those that all configs have in common."""
    with _quiet():
        base = config_class(**required)
    names = {field.name for field in dataclasses.fields(config_class)}
    names -= {field.name for field in dataclasses.fields(PreTrainedConfig)} - set(SPECIAL_TOKENS)
    stored = {name: config_class.attribute_map.get(name, name) for name in sorted(names)}
    return {name: vars(base)[attribute] for name, attribute in stored.items() if attribute in vars(base)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' remarks, here on default configs."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Rotary embeddings stretched by as much as the default's, which must fit the small number of positions."""
    if "original_max_position_embeddings" not in parameters:
        return {}
    whole = SIZES["max_position_embeddings"]
    sizes = {"original_max_position_embeddings": int(whole / parameters["factor"]), "max_position_embeddings": whole}
    return {"rope_parameters": {name: sizes.get(name, value) for name, value in parameters.items()}}


def _tokens(values: dict[str, Any]) -> dict[str, int]:
    """Special tokens within the small vocabulary, outside the ordinary tokens, no two placeholders alike."""
    names = [name for name, value in values.items() if name.endswith(("_token_id", "_token_index")) and value]
    placeholders = [name for name in names if name not in SPECIAL_TOKENS]
    tokens = {name: SIZES["vocab_size"] - 1 - index for index, name in enumerate(placeholders)}
    return tokens | {name: SPECIAL_TOKENS[name] for name in names if name in SPECIAL_TOKENS}


def _layer_lists(values: dict[str, Any]) -> dict[str, Any]:
    """Lists with an entry per layer, cut down to the first layer of each kind (and to two layers at least)."""
    count = next((name for name in LAYER_COUNTS if name in values), None)
    if count is None:
        return {}
    lists = {
        name: value
        for name, value in values.items()
        if isinstance(value, list | tuple) and len(value) == values[count] and not _ascending(value)
    }
    needed = {value.index(kind) for value in lists.values() for kind in value}
    kept = sorted(needed if len(needed) > 1 else {0, 1})
    return {count: len(kept), **{name: [value[index] for index in kept] for name, value in lists.items()}}


def _ascending(values: Sequence[Any]) -> bool:
    """Whether these are indices of layers, not properties of layers."""
    return all(type(value) is int for value in values) and all(low < high for low, high in pairwise(values))


def _randomise(model: PreTrainedModel) -> None:
    """Moves norms and biases off one and zero, and scales matrices so that every branch is felt in the logits."""
    owners = {id(parameter): module for module in model.modules() for parameter in module.parameters(recurse=False)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _randomise_parameter(name.rpartition(".")[2], parameter, owners[id(parameter)])
        for name, buffer in model.named_buffers():
            leaf = name.rpartition(".")[2]
            if leaf == "layer_scalar" or ("bias" in leaf and buffer.ndim == 1):
                buffer.add_(NOISE * torch.randn_like(buffer))
            elif leaf == "tid2eid":  # the experts of each token
                experts = model.config.n_routed_experts
                buffer.copy_(torch.rand(len(buffer), experts).argsort(-1)[:, : buffer.shape[1]])


def _randomise_parameter(leaf: str, parameter: nn.Parameter, owner: nn.Module) -> None:
    if isinstance(owner, nn.Embedding):
        if parameter.requires_grad:  # the others are tables of sines
            parameter.normal_(0.0, 0.5)
    elif parameter.ndim > 1 and isinstance(owner, nn.Linear):
        parameter.normal_(0.0, parameter.shape[1] ** -0.5)
    elif parameter.ndim > 1 and isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        parameter.normal_(0.0, parameter[0].numel() ** -0.5)
    elif parameter.numel() == max(parameter.shape, default=1) or "bias" in leaf or leaf == "A_log":
        parameter.add_(NOISE * torch.randn_like(parameter))
    else:  # of experts, with inputs either before or after outputs
        parameter.normal_(0.0, (sum(parameter.shape[-2:]) / 2) ** -0.5)
