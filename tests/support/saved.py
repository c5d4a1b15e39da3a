"""A tiny model with a tokenizer in a folder, and text for it: what the command line is tried on."""

import random
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from tests.support.models import SIZES, tiny_model

WORDS = ["<pad>", "<s>", "</s>", *(f"w{index}" for index in range(3, SIZES["vocab_size"]))]

CHAT_TEMPLATE = "{% for message in messages %}w3 {{ message['content'] }} w4 {% endfor %}"


def save_tiny_model(folder: Path, chat: bool = False, **sizes: object) -> Path:
    """Saves a decoder of one layer, which never ends by itself, and a tokenizer of one word per token."""
    sizes = {"num_hidden_layers": 1, "max_position_embeddings": 512, "eos_token_id": None} | sizes
    tiny_model("llama", **sizes).save_pretrained(folder)
    save_tiny_tokenizer(folder, chat)
    return folder


def save_tiny_tokenizer(folder: Path, chat: bool = False) -> None:
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<pad>")
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def some_text(words: int, seed: int = 0) -> str:
    """Random words of the tokenizer's vocabulary."""
    return " ".join(random.Random(seed).choices(WORDS[3:], k=words))
