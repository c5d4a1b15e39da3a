"""What people do with `generate`: batches, pipelines, chats, streams, assistants, other dtypes; on tiny models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, PreTrainedModel, TextStreamer, pipeline

import larosa_compile
from larosa_compile import registry
from larosa_compile.errors import ModelError
from larosa_compile.recipe import Recipe
from tests.support.models import tiny_model, token_ids
from tests.support.saved import save_tiny_model

NEW = 10
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def recipe(model: PreTrainedModel) -> Recipe:
    return larosa_compile.calibrate(model, [token_ids(4, 32)], 0.5)


def compiling(**options: Any) -> dict[str, Any]:
    """Arguments of `generate` that compile decoding by the backend."""
    config = CompileConfig(backend="larosa", mode=None, fullgraph=False, options={"lowering": "eager", **options})
    config._compile_all_devices = True  # transformers compiles `generate` on accelerators only by default
    return {"cache_implementation": "static", "compile_config": config}


def test_batches_padded_on_the_left(model: PreTrainedModel, recipe: Recipe) -> None:
    prompts = [token_ids(1, length, length) for length in (9, 6, 4)]
    ids, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, 9 - prompt.shape[1] :], mask[row, 9 - prompt.shape[1] :] = prompt[0], 1

    def batch(**arguments: Any) -> Tensor:
        tokens: Tensor = model.generate(ids, attention_mask=mask, **GREEDY, **arguments)
        return tokens[:, -NEW:]

    assert torch.equal(batch(**compiling(recipe=recipe.with_sparsity(0))), batch())
    found = batch(**compiling(recipe=recipe))
    assert not torch.equal(found, batch()), "sparsity must change something for this to test"
    for row, prompt in enumerate(prompts):
        mask_of_one = torch.ones_like(prompt)
        alone = model.generate(prompt, attention_mask=mask_of_one, **GREEDY, **compiling(recipe=recipe))
        assert torch.equal(found[row], alone[0, -NEW:])


def test_pipelines_chats_and_streams(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path, chat=True)
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    recipe = larosa_compile.calibrate(loaded.eval(), [token_ids(4, 32)], 0.0)
    torch._dynamo.reset()
    counters.clear()
    generator = pipeline("text-generation", model=loaded, tokenizer=tokenizer)
    chat = [{"role": "user", "content": "w5 w6 w7"}]
    greedy: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "max_cache_len": 32}
    for prompt in ("w8 w9 w10", chat):
        expected = generator(prompt, max_new_tokens=NEW, do_sample=False)
        assert generator(prompt, **greedy, **compiling(recipe=recipe)) == expected
    ids = tokenizer("w8 w9 w10", return_tensors="pt").input_ids
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    arguments = {**greedy, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    tokens = loaded.generate(ids, streamer=streamer, **arguments, **compiling(recipe=recipe))
    assert capsys.readouterr().out.split() == tokenizer.decode(tokens[0, 3:]).split()
    assert counters["stats"]["unique_graphs"] == 1, "prompts of any length share one cache size, and so one graph"


@pytest.mark.slow
def test_an_assistant_drafts_for_a_compiled_model(
    model: PreTrainedModel, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers has no static cache for this, so the forward is what is compiled."""
    assistant, ids = tiny_model("llama", seed=3, num_hidden_layers=1), token_ids(1, 7)
    arguments = {"attention_mask": torch.ones_like(ids), **GREEDY}
    with torch.no_grad():
        options: Any = {"recipe": recipe.with_sparsity(0), "lowering": "eager"}
        expected = model.generate(ids, **arguments)
        monkeypatch.setattr(model, "forward", torch.compile(model.forward, backend="larosa", options=options))
        assert torch.equal(model.generate(ids, assistant_model=assistant, **arguments), expected)
    assert registry.reports_of(model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    model, ids = tiny_model("llama", dtype=dtype, num_hidden_layers=1), token_ids(1, 7)
    recipe = larosa_compile.calibrate(model, [token_ids(4, 32)], 0.0)
    arguments = {"attention_mask": torch.ones_like(ids), **GREEDY}
    assert torch.equal(model.generate(ids, **arguments, **compiling(recipe=recipe)), model.generate(ids, **arguments))


def test_without_a_recipe_one_is_learnt_from_what_is_decoded() -> None:
    model, ids = tiny_model("llama", num_hidden_layers=1), token_ids(1, 7)
    arguments = {"attention_mask": torch.ones_like(ids), **GREEDY}
    expected = model.generate(ids, **arguments)
    # the prompt goes through the eager model, unseen; its last logits are the first new token
    dense = model.generate(ids, **arguments, **compiling(calibration_tokens=NEW - 1))
    assert torch.equal(dense, expected) and registry.recipe_of(model.parameters()) is None
    learnt = model.generate(ids, **arguments, **compiling(calibration_tokens=NEW - 1))
    assert larosa_compile.recipe_of(model).calibration["tokens"] == NEW - 1
    again = model.generate(ids, **arguments, **compiling(recipe=larosa_compile.recipe_of(model)))
    assert torch.equal(learnt, again)


def test_weights_without_values_are_refused(model: PreTrainedModel, recipe: Recipe) -> None:
    empty = AutoModelForCausalLM.from_config(model.config).to("meta").eval()
    with pytest.raises(ModelError, match=r"on device 'meta'.*from_pretrained"):
        larosa_compile.calibrate(empty, [token_ids(1, 4)])
    fast = torch.compile(empty, backend="larosa", options={"recipe": recipe})
    with torch.no_grad(), pytest.raises(Exception, match=r"on device 'meta'.*from_pretrained") as caught:
        fast(input_ids=token_ids(1, 4).to("meta"), use_cache=False)
    assert isinstance(caught.value.inner_exception, ModelError)
