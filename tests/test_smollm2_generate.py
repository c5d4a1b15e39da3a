"""`generate` on a real pretrained model, decoded by the backend through a static cache: takes minutes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, PreTrainedModel, StaticCache

import larosa_compile
from benchmarks import assets
from larosa_compile import weights
from larosa_compile.caches import CACHE
from larosa_compile.calibration import token_batches

NEW, ROOM = 200, 256
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived an old woman who",
    "Water boils at",
)

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def folded_bytes() -> int:
    """Bytes of all folded weights that compiled graphs hold, each storage once."""
    storages = {weight.tensor.untyped_storage() for weight in weights._folded.values()}
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def decoded(model: PreTrainedModel, forward: Any, ids: torch.Tensor) -> list[int]:
    """Greedy tokens: the prompt through the eager model, every other token through `forward`."""
    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    tokens: list[int] = []
    with torch.no_grad():
        last = model(input_ids=ids, **{CACHE: cache}, use_cache=True).logits[:, -1]
        for position in range(ids.shape[1], ids.shape[1] + NEW):
            tokens.append(int(last.argmax()))
            inputs = {"input_ids": torch.tensor([tokens[-1:]]), "position_ids": torch.tensor([[position]])}
            visible = (torch.arange(ROOM) <= position)[None, None, None]
            last = forward(**inputs, attention_mask=visible, **{CACHE: cache}, use_cache=True).logits[:, -1]
    return tokens


def test_generate_is_a_loop_over_the_compiled_forward_and_compiles_once() -> None:
    model, tokenizer = assets.load_model("smollm2", torch.float32)
    windows = list(token_batches(assets.text("wiki")[:40_000], tokenizer, 256))
    recipe = larosa_compile.calibrate(model, windows[:8], sparsity=0.5)
    torch._dynamo.reset()
    counters.clear()
    config = CompileConfig(backend="larosa", mode=None, fullgraph=False, options={"recipe": recipe})
    config._compile_all_devices = True  # transformers compiles `generate` on accelerators only by default
    arguments: dict[str, Any] = {
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "do_sample": False,
        "max_cache_len": ROOM,
    }
    prompts = [torch.tensor([tokenizer(text)["input_ids"]]) for text in PROMPTS]
    assert len({prompt.shape[1] for prompt in prompts}) == len(prompts)
    found = []
    for ids in prompts:
        inputs = {"attention_mask": torch.ones_like(ids), "pad_token_id": tokenizer.eos_token_id, "eos_token_id": None}
        tokens = model.generate(ids, cache_implementation="static", compile_config=config, **inputs, **arguments)
        found.append(tokens[0, ids.shape[1] :].tolist())
    assert counters["stats"]["unique_graphs"] == 1, "one graph, and no recompile"
    held = folded_bytes()
    assert held > 0.9 * sum(p.nbytes for p in model.parameters())

    fast = torch.compile(model, backend="larosa", options={"recipe": recipe})
    assert [decoded(model, fast, ids) for ids in prompts] == found
    with torch.no_grad():
        fast(input_ids=prompts[1], use_cache=False)
    print(f"folded weights: {held / 1e6:.1f} MB for decoding, {folded_bytes() / 1e6:.1f} MB with a graph for prompts")
    assert folded_bytes() == held, "prompts and decoding read the same folded weights"
