"""GGUF files of one model in several types of weights, for the runtimes that read nothing else."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np

HEADS = ("token_embd.weight", "output.weight")
"""GGUF's names of the embedding, which is the head where there is no other, and the head."""


def gguf_type(path: Path) -> str:
    """The type that a GGUF file says most of its weights have, such as "q4_1"; "" if it does not say."""
    gguf = importlib.import_module("gguf")
    field = gguf.GGUFReader(path).fields.get("general.file_type")
    return gguf.LlamaFileType(field.contents()).name.partition("_")[2].lower() if field else ""


def gguf_file(given: Path, weights: str, folder: Path) -> Path:
    """A GGUF file's model with weights of some type: the file itself, or one made from it in the folder, once."""
    if gguf_type(given) == weights:
        return given
    made = folder / f"{weights}.gguf"
    if not made.exists():
        partial = made.with_suffix(".partial")
        requantise(given, partial, weights)
        partial.rename(made)
    return made


def linear_bytes(path: Path) -> int:
    """Bytes of linear weights in a GGUF file: a token reads all of them. The embedding counts where it is the head."""
    reader = importlib.import_module("gguf").GGUFReader(path)
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors if len(tensor.shape) > 1}
    embedding, head = HEADS
    return sum(sizes.values()) - (sizes[embedding] if head in sizes else 0)


def requantise(source: Path, target: Path, weights: str) -> None:
    """Writes the model of a GGUF file with weights of another type; its metadata stays, but for the type.

    As llama.cpp does it: vectors stay as they are, and so does what does not divide into blocks. Where weights have
    less than 8 bits, embedding and head have 8.
    """
    gguf: Any = importlib.import_module("gguf")
    reader, kinds = gguf.GGUFReader(source), gguf.GGMLQuantizationType
    fields = reader.fields
    writer = gguf.GGUFWriter(target, fields["general.architecture"].contents(), endianess=reader.endianess)
    writer.data_alignment = reader.alignment
    for name, field in fields.items():
        value = field.contents()
        if name.startswith("GGUF.") or name == "general.architecture" or value == []:
            continue
        if name == "general.file_type":
            value = int(gguf.LlamaFileType[f"MOSTLY_{weights.upper()}"])
        writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)

    def kind_of(tensor: Any) -> Any:
        kind = kinds.Q8_0 if weights.startswith("q4") and tensor.name in HEADS else kinds[weights.upper()]
        block, _ = gguf.GGML_QUANT_SIZES[kind]
        # GGUF gives the length of a row first
        return kind if len(tensor.shape) > 1 and tensor.shape[0] % block == 0 else tensor.tensor_type

    targets = [(tensor, kind_of(tensor)) for tensor in reader.tensors]
    for tensor, kind in targets:
        shape = gguf.quants.quant_shape_to_byte_shape([int(size) for size in reversed(tensor.shape)], kind)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, kind in targets:
        data = tensor.data
        if kind != tensor.tensor_type:
            data = gguf.quants.quantize(gguf.quants.dequantize(data, tensor.tensor_type), kind)
        writer.write_tensor_data(data)
    writer.close()
