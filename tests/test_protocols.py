"""Which tokens a protocol leaves to the dense model."""

from typing import Any

import pytest
import torch

import larosa_compile
from benchmarks.protocols import PROTOCOLS, begun_dense, dense_tokens
from tests.support.models import tiny_model, token_ids

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_first_tokens_are_dense_and_what_follows_reads_them() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    recipe = larosa_compile.calibrate(model, [token_ids(4, 32)], 0.5)
    sparse = torch.compile(model, backend="larosa", options={"recipe": recipe, "lowering": "eager"})
    ids = token_ids(2, 8)
    with torch.no_grad():
        dense = model(ids).logits
        found = {protocol: begun_dense(sparse, model, protocol)(ids).logits for protocol in PROTOCOLS}
    for protocol, first in zip(PROTOCOLS, (0, 1, 4), strict=True):
        assert dense_tokens(protocol, 8) == first
        torch.testing.assert_close(found[protocol][:, :first], dense[:, :first])
        assert (found[protocol][:, first:] - dense[:, first:]).abs().amax(-1).min() > 1e-4
    # tokens that are sparse in both see another cache
    assert (found["first-dense"] - found["all"])[:, 1:].abs().amax(-1).min() > 1e-5


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_model_behind_itself_is_that_model(protocol: str) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    calls: list[int] = []

    def counted(input_ids: torch.Tensor, **arguments: Any) -> Any:
        calls.append(input_ids.shape[1])
        return model(input_ids=input_ids, **arguments)

    with torch.no_grad():
        for tokens in (1, 2, 7):
            ids = token_ids(3, tokens)
            torch.testing.assert_close(begun_dense(counted, model, protocol)(ids).logits, model(ids).logits)
    # a sequence of one token leaves nothing to go on with
    assert calls == {"all": [1, 2, 7], "first-dense": [1, 6], "decode": [1, 4]}[protocol]
