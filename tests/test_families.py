"""Tiny models of transformers' families: all of them have one, and nothing that matters is lost or trivial in it."""

import pytest
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks import families
from benchmarks.families import UnsupportedFamily, decode_inputs, example_inputs, family_names, tiny_config, tiny_model
from benchmarks.family_overrides import BASE, OVERRIDES, UNSUPPORTED

SUPPORTED = [name for name in family_names() if name not in UNSUPPORTED]
# dense; fused weights and biases; latent attention with experts; per-layer inputs and shared keys; delta rule; state
# space, attention, experts and dense layers; recurrent without attention; several codebooks
DIVERSE = ("llama", "gpt2", "deepseek_v3", "gemma4_text", "qwen3_next", "nemotron_h", "xlstm", "musicgen")


def kinds(config: PreTrainedConfig) -> dict[str, set[str]]:
    """What a config's lists of words contain, such as `layer_types`."""
    lists = {name: [*value] for name, value in vars(config).items() if isinstance(value, list | tuple) and value}
    return {name: set(words) for name, words in lists.items() if all(isinstance(word, str) for word in words)}


def test_nearly_all_families_have_a_config_of_their_class() -> None:
    assert len(SUPPORTED) >= 187
    for name in SUPPORTED:
        assert type(tiny_config(name)) is CONFIG_MAPPING[name], name


def test_every_kind_of_layer_stays() -> None:
    for name in SUPPORTED:
        with families._quiet():
            default = CONFIG_MAPPING[name](**OVERRIDES.get(name, {}).get(BASE, {}))
        small = tiny_config(name)
        texts = (default.get_text_config(decoder=True), small.get_text_config(decoder=True))
        for whole, tiny in ((default, small), texts):
            for field, words in kinds(whole).items():
                assert words <= kinds(tiny)[field], (name, field)


def test_overrides_name_families() -> None:
    assert set(OVERRIDES) | set(UNSUPPORTED) <= set(family_names())


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_refusal(name: str) -> None:
    with pytest.raises(UnsupportedFamily, match=f"^{name}: an assistant has to share the keys"):
        tiny_model(name)


def test_refusal_is_still_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before transformers 5.24 its configuration is refused, since then what it computes."""
    monkeypatch.delitem(UNSUPPORTED, "gemma4_unified_assistant")
    with pytest.raises(
        ValueError, match=r"layer types producing a cache is different than|shared_kv_states cannot be None"
    ):
        model = tiny_model("gemma4_unified_assistant")
        model(**example_inputs(model))


@pytest.fixture(scope="module", params=DIVERSE)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def model(family: str) -> PreTrainedModel:
    return tiny_model(family)


def test_runs_on_batches(model: PreTrainedModel) -> None:
    for batch in (1, 2):
        inputs = example_inputs(model, batch, tokens=10)
        with torch.no_grad():
            logits = model(**inputs).logits
        assert logits.shape == (*inputs["input_ids"].shape, model.config.vocab_size)
        assert logits.dtype == torch.float32 and torch.isfinite(logits).all()


def test_the_seed_decides(family: str, model: PreTrainedModel) -> None:
    state = torch.random.get_rng_state()
    same, other = tiny_model(family), tiny_model(family, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(value, parameters[name]) for name, value in same.named_parameters())
    assert not any(torch.equal(value, parameters[name]) for name, value in other.named_parameters())
    ids = [example_inputs(model, seed=seed)["input_ids"] for seed in (0, 0, 1)]
    assert torch.equal(ids[0], ids[1]) and not torch.equal(ids[0], ids[2])


def test_no_parameter_is_trivial(model: PreTrainedModel) -> None:
    for name, value in model.named_parameters():
        assert value.numel() < 2 or value.std() > 0, name
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            assert buffer.std() > 0, name


def test_every_layer_is_felt(model: PreTrainedModel) -> None:
    inputs = example_inputs(model)
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    with torch.no_grad():
        before = model(**inputs).logits
        for block in blocks:
            saved = {name: value.clone() for name, value in block.state_dict().items()}
            for value in block.parameters():
                value.mul_(1.5)
            change = (model(**inputs).logits - before).norm() / before.norm()
            block.load_state_dict(saved)
            assert change > 1e-3
        assert torch.equal(model(**inputs).logits, before)


def test_cache_continues_the_whole_forward(model: PreTrainedModel) -> None:
    ids = example_inputs(model)["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        output = model(input_ids=ids[:, :8], use_cache=True)
        for position in range(8, ids.shape[1]):
            output = model(**decode_inputs(model, output, ids[:, position : position + 1], position))
            error = (output.logits[:, -1] - expected[:, position]).norm() / expected[:, position].norm()
            assert error < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", SUPPORTED)
def test_every_family_runs(name: str) -> None:
    tiny = tiny_model(name)
    assert sum(value.numel() for value in tiny.parameters()) < 5_000_000
    with torch.no_grad():
        assert torch.isfinite(tiny(**example_inputs(tiny, batch=2)).logits).all()
