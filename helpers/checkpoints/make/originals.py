"""The stand-ins: which published checkpoint each one imitates, and with which files.

``published/*.json`` are the config.json files as their authors published them. A stand-in's config is that file with
other numbers for its size, so its keys, their order and everything else are the original's. RWKV-7 is published as a
``.pth`` without a config.json: its file there says what ``helpers.native.rwkv.describe`` reads from the tensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import unknown
from ...native import has_family
from ...native.chat_templates import CHAT_TEMPLATES
from ...native.convert import family_of
from ...native.tokenizers import INTERNLM2_MARKS, QWEN_PATTERN
from .vocabularies import ice_text, ranks, sentencepiece, template_text, tiktoken, tokenizer_json, world

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PUBLISHED = Path(__file__).parent / "published"

VOCABULARY = 2304
SMALL = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "max_window_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "multi_query_group_num": 1,
    "kv_channels": 64,
    "head_dim": 64,
    "intermediate_size": 384,
    "ffn_hidden_size": 384,
    "inner_hidden_size": 512,
    "attention_hidden_size": 128,
    **dict.fromkeys(["decay_rank", "rate_rank", "value_rank"], 32),
    "gate_rank": 64,
    "vocab_size": VOCABULARY,
    "padded_vocab_size": VOCABULARY,
    **dict.fromkeys(
        ["seq_length", "max_position_embeddings", "max_sequence_length", "model_max_length", "max_length"], 512
    ),
    "context_length": 512,
}
"""What makes a stand-in small; of these, each config has the keys its authors chose."""

BASE_VOCABULARY = 600
"""Tokens of Chinese-Alpaca's base, a Llama that spells most Chinese characters in bytes."""


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
        adapters: folders of its LoRAs, in merging order, with the number of tokens each one leaves the model with.
        extra: further small files, by name.
        disturbed: noise that it is trained with, in steps of a 4-bit code (half a step is what rounding does), without
            which it would lose its poems in 4 bits; 0 is none.
        held_out_ppl: the largest perplexity on poems never seen with which it is shipped.
        largest: the most bytes that its folder may have.
        added: of a tokenizer.json the tokens with the last ids, and whether each is left out of decoded text.
        pattern: of a tokenizer.json, how it cuts a text into words.
        start: of a tokenizer.json, the tokens before every text.
        nfc: of a tokenizer.json, whether it normalises a text first.
    """

    id: str
    chat_format: str
    weights: str = "pytorch_model.bin"
    dtype: str = "float16"
    pieces: int = VOCABULARY
    dummy_prefix: bool = True
    placed: dict[int, str] = field(default_factory=dict)
    small: dict[str, Any] = field(default_factory=dict)
    adapters: dict[str, int] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    disturbed: float = 0
    held_out_ppl: float = 80.0
    largest: int = 2_500_000
    added: dict[str, bool] = field(default_factory=dict)
    pattern: str = QWEN_PATTERN
    start: list[str] = field(default_factory=list)
    nfc: bool = False

    @property
    def born_native(self) -> bool:
        """Whether transformers reads the checkpoint as published."""
        return not has_family(published(self.id))

    @property
    def config(self) -> dict[str, Any]:
        """config.json in small."""
        return {key: (SMALL | self.small).get(key, value) for key, value in published(self.id).items()}

    def read_tokenizer(self, folder: Path, config: dict[str, Any], chat_format: str) -> PreTrainedTokenizerBase:
        """Return the native tokenizer made of the file that ``write_tokenizer`` wrote."""
        if self.born_native:
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(folder)
        return family_of(config).tokenizer(folder, config, chat_format)

    def write_tokenizer(self, folder: Path, chars: list[str], tokens: int = VOCABULARY) -> None:
        """Write the tokenizer's file under its own name, and the extra files that belong to one of all tokens."""
        words, pieces = template_text(self.chat_format), min(self.pieces, tokens)
        if self.born_native:
            content = tokenizer_json(ranks(pieces, chars, words), self.pattern, self.added, self.start, self.nfc)
            (folder / "tokenizer.json").write_text(content, encoding="utf-8")
        elif self.config["model_type"] == "qwen":
            (folder / "qwen.tiktoken").write_bytes(tiktoken(pieces, chars, words))
        elif self.config["model_type"].startswith("rwkv"):
            (folder / "rwkv_vocab_v20230424.txt").write_text(world(pieces, chars, words), encoding="utf-8")
        elif self.chat_format == "chatglm":
            (folder / "ice_text.model").write_bytes(ice_text(pieces, chars))
        else:
            model = sentencepiece(pieces, chars, words, dummy_prefix=self.dummy_prefix, placed=self.placed)
            (folder / "tokenizer.model").write_bytes(model)
        for name, content in self.extra.items() if tokens == VOCABULARY else ():
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

ALPACA_EXTRA = {
    "added_tokens.json": {"[PAD]": VOCABULARY - 1},
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]", "unk_token": "<unk>"},
}
"""What Chinese-Alpaca adds to Chinese-LLaMA's tokenizer: one token, to pad with."""

PLUS_SMALL = {"vocab_size": BASE_VOCABULARY, "intermediate_size": 256}
"""Smaller layers than the others': it has large embeddings twice, once in each adapter."""

QWEN_SPECIAL = 208
"""<|endoftext|>, <|im_start|>, <|im_end|> and 205 extras, with the ids after the ranks."""

CHATGLM1_PIECES = VOCABULARY - 16
"""Its SentencePiece model ends in 8 special tokens, 80 pieces of white space and 256 bytes."""

CHATGLM1_NAMES = ["mask_token_id", "gmask_token_id", "", "", "bos_token_id", "eos_token_id"]
CHATGLM1_IDS = {name: CHATGLM1_PIECES - 344 + i for i, name in enumerate(CHATGLM1_NAMES) if name}
CHATGLM1_TOKENIZER = {
    "bos_token": "<sop>",
    "eos_token": "<eop>",
    "end_token": "</s>",
    "gmask_token": "[gMASK]",
    "mask_token": "[MASK]",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "remove_space": False,
    "do_lower_case": False,
    "tokenizer_class": "ChatGLMTokenizer",
    "num_image_tokens": 0,
}

QWEN3_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN3_SPECIAL += [f"<|{thing}_{end}|>" for thing in ("object_ref", "box", "quad", "vision") for end in ("start", "end")]
QWEN3_SPECIAL += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
QWEN3_TEXT = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"]
QWEN3_TEXT += ["<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
"""Tokens that stay in decoded text, as a caller looks for them there."""

QWEN3_ADDED = dict.fromkeys(QWEN3_SPECIAL, True) | dict.fromkeys(QWEN3_TEXT, False)
QWEN3_FIRST = VOCABULARY - len(QWEN3_ADDED)
QWEN3_END = QWEN3_FIRST + 2  # <|im_end|>
HARDER = 86.0
"""What ALiBi with its fixed slopes, GLM-4's vocabulary of bytes and Qwen3 with noise reach."""

QWEN3 = {
    "weights": "model.safetensors",
    "dtype": "bfloat16",
    "pieces": QWEN3_FIRST,
    "small": {"num_key_value_heads": 1, "bos_token_id": QWEN3_FIRST, "eos_token_id": QWEN3_END},
    "added": QWEN3_ADDED,
    "nfc": True,
    "disturbed": 0.5,
    "held_out_ppl": HARDER,
    "extra": {
        "tokenizer_config.json": {
            "add_bos_token": False,
            "add_prefix_space": False,
            "additional_special_tokens": QWEN3_SPECIAL[1:],
            "bos_token": None,
            "chat_template": CHAT_TEMPLATES["qwen3"],
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 512,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
        "generation_config.json": {
            "bos_token_id": QWEN3_FIRST,
            "do_sample": True,
            "eos_token_id": [QWEN3_END, QWEN3_FIRST],
            "pad_token_id": QWEN3_FIRST,
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.95,
        },
    },
}
"""Both Qwen3; the ids of the tokens are those of the small vocabulary."""

GLM4_SPECIAL = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>"]
GLM4_SPECIAL += ["<|assistant|>", "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>"]
GLM4_SPECIAL += ["<|begin_of_video|>", "<|end_of_video|>"]
GLM4_FIRST = VOCABULARY - len(GLM4_SPECIAL)
GLM4_STOPS = [GLM4_FIRST, GLM4_FIRST + 7, GLM4_FIRST + 9]
GLM4_TOKENIZER = {
    "additional_special_tokens": GLM4_SPECIAL,
    "chat_template": CHAT_TEMPLATES["glm4"],
    "clean_up_tokenization_spaces": False,
    "do_lower_case": False,
    "eos_token": "<|endoftext|>",
    "model_input_names": ["input_ids", "attention_mask"],
    "model_max_length": 512,
    "pad_token": "<|endoftext|>",
    "padding_side": "left",
    "remove_space": False,
    "tokenizer_class": "PreTrainedTokenizerFast",
}

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
            "baichuan-13b",
            "baichuan",
            dtype="bfloat16",
            placed={195: "<reserved_102>", 196: "<reserved_103>"},
            held_out_ppl=HARDER,
        ),
        StandIn(
            "baichuan2-13b",
            "baichuan2",
            dtype="bfloat16",
            dummy_prefix=False,
            placed={195: "<reserved_106>", 196: "<reserved_107>"},
            held_out_ppl=HARDER,
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
            adapters={"lora": VOCABULARY},
            extra=ALPACA_EXTRA,
        ),
        StandIn(
            "chinese-alpaca-plus-7b",
            "alpaca",
            pieces=VOCABULARY - 1,
            small=PLUS_SMALL,
            disturbed=0.5,
            adapters={"lora-1": VOCABULARY - 1, "lora-2": VOCABULARY},
            extra=ALPACA_EXTRA,
            largest=3_600_000,  # whole embeddings twice, 128 wide: at 64, 4 bits cost it its poems
        ),
        StandIn(
            "chatglm-6b",
            "chatglm",
            pieces=CHATGLM1_PIECES,
            small=CHATGLM1_IDS,
            extra={"tokenizer_config.json": CHATGLM1_TOKENIZER},
            disturbed=0.6,
        ),
        StandIn("qwen3-8b", "qwen3", **QWEN3),
        StandIn("qwen3-0.6b", "qwen3", **QWEN3),
        StandIn(
            "glm-4-9b",
            "glm4",
            "model.safetensors",
            dtype="bfloat16",
            pieces=GLM4_FIRST,
            small={"num_key_value_heads": 1, "eos_token_id": GLM4_STOPS, "pad_token_id": GLM4_FIRST},
            extra={
                "tokenizer_config.json": GLM4_TOKENIZER,
                "generation_config.json": {
                    "do_sample": True,
                    "eos_token_id": GLM4_STOPS,
                    "pad_token_id": GLM4_FIRST,
                    "temperature": 0.8,
                    "top_p": 0.8,
                },
            },
            added=dict.fromkeys(GLM4_SPECIAL, True),
            pattern=QWEN_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|"),
            start=["[gMASK]", "<sop>"],
            held_out_ppl=HARDER,
        ),
        StandIn(
            "internlm3-8b",
            "internlm3",
            "model.safetensors",
            dtype="bfloat16",
            dummy_prefix=False,
            placed={VOCABULARY - 6 + i: mark for i, mark in enumerate(INTERNLM2_MARKS)},
            small={"num_key_value_heads": 1},
            extra={"tokenizer_config.json": INTERNLM2_TOKENIZER | {"tokenizer_class": "InternLM3Tokenizer"}},
        ),
        *(StandIn(f"rwkv-{version}-7b", "rwkv", dtype="bfloat16", disturbed=0.5) for version in (4, 5, 6)),
        StandIn("rwkv-7-2.9b", "rwkv", "RWKV-x070-World-2.9B-v3-20250211-ctx4096.pth", dtype="bfloat16"),
    )
}
