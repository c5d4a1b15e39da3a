"""The name that transformers has for the cache of keys and values, as an argument of a decoder and in its output."""

from dataclasses import fields

from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE = next(name for name in ("cache", "past_key_values") if name in {f.name for f in fields(CausalLMOutputWithPast)})
"""`cache` since transformers 5.24, where the older name is deprecated."""
