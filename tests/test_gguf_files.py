"""GGUF files made for other runtimes: the same model and metadata, weights of another type."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from benchmarks import gguf_files

VECTOR, ODD = "blk.0.attn_norm.weight", "blk.0.odd.weight"
SHAPES = {"token_embd.weight": (40, 64), VECTOR: (64,), "blk.0.ffn_up.weight": (96, 64), ODD: (8, 30)}


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    """A file with metadata of many types and matrices of Q4_1."""
    path, numbers = tmp_path / "tiny.gguf", np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_Q4_1))
    writer.add_name("tiny é")
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_array("tokenizer.ggml.tokens", ["a", "Ġb", "c"])
    writer.add_array("tokenizer.ggml.token_type", [1, 3, 1])
    writer.add_custom_alignment(64)
    for name, shape in SHAPES.items():
        kind = Kind.F32 if name in (VECTOR, ODD) else Kind.Q4_1
        data = numbers.standard_normal(shape).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_bytes_that_a_token_reads(tiny_gguf: Path, tmp_path: Path) -> None:
    in_blocks = 40 * 64 + 96 * 64
    q4_1, q8_0 = in_blocks // 32 * (16 + 4), in_blocks // 32 * (32 + 2)
    odd = 8 * 30 * 4
    assert gguf_files.linear_bytes(tiny_gguf) == q4_1 + odd, "the embedding is the head, the vector no matrix"
    assert gguf_files.linear_bytes(gguf_files.gguf_file(tiny_gguf, "q8_0", tmp_path)) == q8_0 + odd


def fields_of(path: Path) -> dict[str, Any]:
    return {name: (field.types, field.contents()) for name, field in gguf.GGUFReader(path).fields.items()}


def tensors_of(path: Path) -> dict[str, tuple[Kind, np.ndarray[Any, Any]]]:
    dequantize = gguf.quants.dequantize
    return {one.name: (one.tensor_type, dequantize(one.data, one.tensor_type)) for one in gguf.GGUFReader(path).tensors}


# Of the largest entry of a block: half a step, a whole one at the end that Q4_0 clips, and the rounding of the scale.
ERRORS = {"bf16": 2**-8, "f16": 2**-11, "q8_0": 1 / 127 / 2 + 2**-11, "q4_0": 1 / 8 + 2**-11}


@pytest.mark.parametrize("weights", ERRORS)
def test_other_types_of_weights(weights: str, tiny_gguf: Path, tmp_path: Path) -> None:
    made = tmp_path / "made.gguf"
    gguf_files.requantise(tiny_gguf, made, weights)
    before, after = tensors_of(tiny_gguf), tensors_of(made)
    kind = Kind[weights.upper()]
    head = Kind.Q8_0 if weights == "q4_0" else kind
    kinds = {"token_embd.weight": head, VECTOR: Kind.F32, "blk.0.ffn_up.weight": kind}
    # 30 entries are no whole block, but any number of entries has 16 bits
    kinds[ODD] = kind if "16" in weights else Kind.F32
    assert {name: kind for name, (kind, _) in after.items()} == kinds
    for name, (found, data) in after.items():
        original = before[name][1]
        assert data.shape == original.shape == SHAPES[name]
        if found == Kind.F32:
            assert np.array_equal(data, original)
        else:
            size = 30 if name == ODD else 32
            blocks, errors = (np.abs(each).reshape(-1, size).max(-1) for each in (original, data - original))
            assert (errors <= ERRORS[found.name.lower()] * blocks).all()


def test_metadata_stays_but_for_the_type(tiny_gguf: Path, tmp_path: Path) -> None:
    made = tmp_path / "made.gguf"
    gguf_files.requantise(tiny_gguf, made, "q8_0")
    before, after = fields_of(tiny_gguf), fields_of(made)
    assert before.pop("general.file_type")[1] == gguf.LlamaFileType.MOSTLY_Q4_1
    assert after.pop("general.file_type")[1] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert after == before
    assert gguf.GGUFReader(made).alignment == 64


def test_the_given_file_serves_its_own_type_and_others_are_made_once(tiny_gguf: Path, tmp_path: Path) -> None:
    assert gguf_files.gguf_type(tiny_gguf) == "q4_1"
    assert gguf_files.gguf_file(tiny_gguf, "q4_1", tmp_path) == tiny_gguf
    made = gguf_files.gguf_file(tiny_gguf, "q8_0", tmp_path)
    assert made == tmp_path / "q8_0.gguf" and gguf_files.gguf_type(made) == "q8_0"
    made.write_bytes(tiny_gguf.read_bytes())  # would be lost if it were made again
    assert gguf_files.gguf_type(gguf_files.gguf_file(tiny_gguf, "q8_0", tmp_path)) == "q4_1"
