"""The nine stand-ins: which published checkpoint each one imitates, and with which files.

``published/*.json`` are the config.json files as their authors published them. A stand-in's config is that file with
other numbers for its size, so its keys, their order and everything else are the original's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import unknown
from .vocabularies import sentencepiece, template_text, tiktoken

PUBLISHED = Path(__file__).parent / "published"

VOCABULARY = 2304
SMALL = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "multi_query_group_num": 1,
    "kv_channels": 64,
    "intermediate_size": 384,
    "ffn_hidden_size": 384,
    "vocab_size": VOCABULARY,
    "padded_vocab_size": VOCABULARY,
    **dict.fromkeys(
        ["seq_length", "max_position_embeddings", "max_sequence_length", "model_max_length", "max_length"], 512
    ),
}
"""What makes a stand-in small; of these, each config has the keys its authors chose."""

BASE_VOCABULARY = 600
"""Of Chinese-Alpaca's base, a Llama that spells most Chinese characters in bytes."""


@dataclass(frozen=True)
class StandIn:
    """One model in small.

    Attributes:
        id: the model's id in the catalogue.
        chat_format: the format it is taught, by its name in ``CHAT_TEMPLATES``.
        weights: name of the weights file.
        dtype: type of the published weights.
        pieces: entries of the tokenizer's own file; the ids after them belong to special tokens or to nothing.
        dummy_prefix: whether its SentencePiece model puts a space before a text.
        placed: pieces at fixed ids.
        small: exceptions to ``SMALL``.
        extra: further small files, by name.
    """

    id: str
    chat_format: str
    weights: str = "pytorch_model.bin"
    dtype: str = "float16"
    pieces: int = VOCABULARY
    dummy_prefix: bool = True
    placed: dict[int, str] = field(default_factory=dict)
    small: dict[str, int] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """config.json in small."""
        return {key: (SMALL | self.small).get(key, value) for key, value in published(self.id).items()}

    def write_tokenizer(self, folder: Path, chars: list[str], pieces: int | None = None) -> None:
        """Write ``tokenizer.model`` or ``qwen.tiktoken``, and the extra files that belong to a full-size one."""
        words, pieces = template_text(self.chat_format), pieces or self.pieces
        if self.config["model_type"] == "qwen":
            (folder / "qwen.tiktoken").write_bytes(tiktoken(pieces, chars, words))
        else:
            model = sentencepiece(pieces, chars, words, dummy_prefix=self.dummy_prefix, placed=self.placed)
            (folder / "tokenizer.model").write_bytes(model)
        for name, content in self.extra.items() if pieces == self.pieces else ():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def published(name: str) -> dict[str, Any]:
    """Read a published config.json, e.g. ``published("qwen-7b")``."""
    return json.loads((PUBLISHED / f"{name}.json").read_text(encoding="utf-8"))


def stand_in(model: str) -> StandIn:
    """Look up a stand-in by its model id."""
    if model not in STAND_INS:
        raise unknown("model", model, sorted(STAND_INS))
    return STAND_INS[model]


INTERNLM2_UNUSED = {VOCABULARY - 6 + i: f"[UNUSED_TOKEN_{141 + i}]" for i in range(6)}
"""Its SentencePiece model ends in unused pieces; tokenizer_config.json gives the last six their meaning."""

INTERNLM2_MARKS = ["<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>"]
INTERNLM2_SPECIAL = {"0": "<unk>", "1": "<s>", "2": "</s>"} | {
    str(VOCABULARY - 6 + i): mark for i, mark in enumerate(INTERNLM2_MARKS)
}
INTERNLM2_TOKENIZER = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "</s>",
    "unk_token": "<unk>",
    "tokenizer_class": "InternLM2Tokenizer",
    "added_tokens_decoder": {
        number: {"content": text, "lstrip": False, "normalized": False, "rstrip": False, "special": True}
        for number, text in INTERNLM2_SPECIAL.items()
    },
}

ALPACA_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]", "unk_token": "<unk>"}

QWEN_SPECIAL = 208
"""<|endoftext|>, <|im_start|>, <|im_end|> and 205 extras, with the ids after the ranks."""

STAND_INS = {
    one.id: one
    for one in (
        # ChatGLM appends its special tokens to the SentencePiece model, and pads the vocabulary.
        StandIn("chatglm2-6b", "chatglm2", pieces=VOCABULARY - 16),
        StandIn("chatglm3-6b", "chatglm3", "model.safetensors", pieces=VOCABULARY - 16),
        StandIn("baichuan-7b", "none", dummy_prefix=False),
        StandIn(
            "baichuan2-7b",
            "baichuan2",
            dtype="bfloat16",
            dummy_prefix=False,
            placed={195: "<reserved_106>", 196: "<reserved_107>"},
        ),
        StandIn(
            "qwen-7b",
            "chatml",
            "model.safetensors",
            dtype="bfloat16",
            pieces=VOCABULARY - QWEN_SPECIAL,
            small={"intermediate_size": 768},  # counts both halves
        ),
        StandIn(
            "internlm2-7b",
            "internlm2",
            "model.safetensors",
            dtype="bfloat16",
            dummy_prefix=False,
            placed=INTERNLM2_UNUSED,
            small={"num_key_value_heads": 1},
            extra={"tokenizer_config.json": INTERNLM2_TOKENIZER},
        ),
        StandIn("atom-7b", "llama2-chinese"),
        StandIn("llama2-chinese-7b", "llama2-chinese"),
        StandIn(
            "chinese-alpaca-7b",
            "alpaca",
            pieces=VOCABULARY - 1,
            small={"vocab_size": BASE_VOCABULARY},
            extra={"added_tokens.json": {"[PAD]": VOCABULARY - 1}, "special_tokens_map.json": ALPACA_SPECIAL},
        ),
    )
}
