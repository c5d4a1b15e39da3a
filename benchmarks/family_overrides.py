"""What the general shrinking of `benchmarks/families.py` cannot know about single families.

An entry of `OVERRIDES` holds arguments of a family's config; a dictionary under the name of a sub-config goes into
that sub-config. Arguments under `BASE` are needed already for the default config that the shrinking starts from.
Where kinds of layers are given, it is because the default config has fewer of them than released models.
"""

from typing import Any

from transformers import SiglipVisionConfig

Overrides = dict[str, Any]

BASE = "base"
SLIDING_FULL = ["sliding_attention", "full_attention"]
CONV_FULL = ["conv", "full_attention", "conv"]

# All of these default to one, which hides them.
GRANITE: Overrides = {
    "embedding_multiplier": 1.7,
    "logits_scaling": 1.3,
    "residual_multiplier": 0.8,
    "attention_multiplier": 0.3,
}
GRANITE_SWA: Overrides = GRANITE | {"layer_rope_theta": [10000.0, 5000.0]}
# In both of these the last two layers read the keys and values of the first two.
GEMMA3N_TEXT: Overrides = {
    "num_kv_shared_layers": 2,
    "layer_types": SLIDING_FULL * 2,
    "intermediate_size": [112] * 4,
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
}
GEMMA4_TEXT: Overrides = {
    "num_kv_shared_layers": 2,
    "layer_types": SLIDING_FULL * 2,
    "use_double_wide_mlp": True,
    "global_head_dim": 32,
    "final_logit_softcapping": 30.0,
}
# The other released kind: a mixture of experts, and keys that serve as values in layers of full attention.
GEMMA4_MOE: Overrides = {
    "layer_types": SLIDING_FULL,
    "enable_moe_block": True,
    "num_experts": 6,
    "top_k_experts": 2,
    "moe_intermediate_size": 40,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "global_head_dim": 32,
    "final_logit_softcapping": 30.0,
}
# gemma3n's own vision tower comes from timm, which is not installed; text does not pass through it.
SIGLIP: Overrides = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "rms_norm_eps": 1e-6,
    "vocab_size": 8,
    "vocab_offset": 144,
}
QWEN4_TEXT: Overrides = {
    BASE: {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "indexer_head_dim": 24,
    "hc_lowrank": 20,
    # embeddings of hashed n-grams, in the first layer
    "ple_layer_ids": [1],
    "ple_embed_dim": 48,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 100,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 2,
    "eos_token_id": 2,
}
# Layers of sliding attention have sizes of their own.
DOTS3_TEXT: Overrides = {
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 44,
    "swa_kv_lora_rank": 48,
    "swa_head_dim": 32,
    "swa_qk_nope_head_dim": 20,
    "swa_v_head_dim": 28,
    "head_dim": 44,
}
# A whole forward clamps time steps at their minimum, a decoding step does not.
RARELY_CLAMPED: Overrides = {"time_step_min": 1e-5, "time_step_floor": 0.05}

OVERRIDES: dict[str, Overrides] = {
    "afmoe": {"mup_enabled": True},
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},  # the only one for a decoder
    "blt": {
        # other than the 2 × 64 that the encoder makes of a patch, so that a projection lies between
        "global_config": {"hidden_size": 96},
        "encoder_config": {"hidden_size_global": 96},
        "decoder_config": {"hidden_size_global": 96},
        "encoder_hash_byte_group_vocab": 50,
        "local_attention_window_len": 6,
        "patching_threshold": 4.6,  # about the entropy of random logits, for patches of several lengths
        "num_hidden_layers": 2,  # asked for by the default cache
    },
    "codegen": {"rotary_dim": 8},
    "cohere2_moe": {
        "num_shared_experts": 1,
        "layer_types": ["sliding_attention", *SLIDING_FULL],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "prefix_dense_intermediate_size": 136,
    },
    "cohere_compass_text": {
        "layer_types": SLIDING_FULL,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "full_attention": None,
        },
    },
    # transformers reads `rope_theta` here but has no default for it
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2}},
    "deepseek_v2": {
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy",
        "n_group": 2,
        "topk_group": 1,
    },
    "deepseek_v4": {
        "layer_types": ["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "compress_rates": {"heavily_compressed_attention": 4, "compressed_sparse_attention": 2},
        "head_dim": 32,  # an eighth of it is rotated
    },
    "doge": {"keep_window_size": 6},
    "dory": {  # the first layer and the last are run once, those between them twice
        "layer_types": SLIDING_FULL * 2,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    "dots1": {"n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note": {
        "text_config": DOTS3_TEXT,
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": DOTS3_TEXT,
    "electra": {"embedding_size": 48},
    "falcon_h1": {
        "mamba_d_ssm": 128,
        "embedding_multiplier": 1.7,
        "lm_head_multiplier": 0.8,
        "key_multiplier": 0.7,
        "attention_in_multiplier": 0.9,
        "attention_out_multiplier": 1.2,
        "mlp_multipliers": [0.8, 1.3],
        "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7],
        "ssm_in_multiplier": 1.2,
        "ssm_out_multiplier": 0.9,
    },
    "flint": {"layer_types": ["full_attention", *SLIDING_FULL], "mlp_only_layers": [0]},
    "gemma3n": {
        "text_config": GEMMA3N_TEXT,
        "vision_config": SiglipVisionConfig(**SIGLIP),
        "audio_config": {"vocab_offset": 152, "vocab_size": 8},
    },
    "gemma3n_text": GEMMA3N_TEXT,
    "gemma4": {"text_config": GEMMA4_MOE},
    "gemma4_text": GEMMA4_TEXT,
    "gemma4_unified": {"text_config": GEMMA4_TEXT},
    "gemma4_unified_text": GEMMA4_TEXT,
    "glm_moe_dsa": {
        "layer_types": ["indexed_attention"] * 3,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "indexer_types": ["full", "full", "shared"],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granite": GRANITE,
    "granite_swa": GRANITE_SWA,
    "granitemoe": GRANITE,
    "granitemoe_swa": GRANITE_SWA | {"shared_intermediate_size": 56},
    "granitemoehybrid": GRANITE | {"layer_types": ["linear_attention", "full_attention"]},
    "granitemoeshared": GRANITE | {"shared_intermediate_size": 56},
    "helium": {"head_dim": 16},  # a quarter of the hidden size whatever the config says
    "hunyuan_v1_moe": {"num_experts": 6, "moe_topk": 2},
    "inkling2_loop_text": {  # two layers that are run once, two that are run three times
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "n_layers_per_attn_res_block": 2,
        "loop_layer_index_start": 2,
        "loop_layer_index_end": 4,
        "loop_gate_rank": 24,
    },
    "inkling2_text": {"layer_types": ["hybrid_sliding", "hybrid"] * 2, "n_layers_per_attn_res_block": 2},
    "inkling_text": {
        "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    "laguna": {"layer_types": SLIDING_FULL, "num_attention_heads_per_layer": [4, 6]},
    "lfm2": {"layer_types": CONV_FULL, "block_multiple_of": 16},
    "lfm2_moe": {"layer_types": CONV_FULL},
    "llama4": {"text_config": {"interleave_moe_layer_step": 2}},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "mamba2": {"head_dim": 32},
    "mellum": {"layer_types": SLIDING_FULL, "mlp_layer_types": ["dense", "sparse"]},
    "minimax": {"block_size": 8},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "rotary_dim": 12,
    },
    "mllama": {"text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]}},
    "moshi": {"sliding_window": 64},  # the cache drops what lies outside, a whole forward does not
    "nemotron_h": RARELY_CLAMPED,
    "phi4_multimodal": {
        "audio_config": {"nemo_conv_channels": 64, "ext_pw_out_channel": 64, "depthwise_separable_out_channel": 64}
    },
    "qwen4_exp": {"text_config": QWEN4_TEXT},
    "qwen4_exp_text": QWEN4_TEXT,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": (24, 40), "axial_pos_shape": (8, 16), "attn_layers": ["local", "lsh"]},
    "rembert": {"input_embedding_size": 48, "output_embedding_size": 80},
    "roc_bert": {"shape_embed_dim": 40, "pronunciation_embed_dim": 48},
    "roformer": {"embedding_size": 64},
    "rwkv": {"attention_hidden_size": 64, "rescale_every": 1},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},  # with "bi", every token sees the next one unless a mask forbids it
    # keys have half the hidden size, which the cache rounds up to a multiple of 64
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    # the layers after the first hybrid one share its transformer
    "zamba": {
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 5,
    },
    "zamba2": RARELY_CLAMPED
    | {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 4},
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": 6},
}
COUNT_FROM_ZERO = frozenset({"bamba"})  # these number the tokens of every call from zero unless told otherwise
ALL_SHARED = (
    "an assistant has to share the keys of all its layers, and then transformers' kv_sharing_modes raises "
    "'The set of layer types producing a cache is different than the set of layer types using them'"
)
UNSUPPORTED: dict[str, str] = {"gemma4_assistant": ALL_SHARED, "gemma4_unified_assistant": ALL_SHARED}
