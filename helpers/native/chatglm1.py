"""ChatGLM-6B, the first one -> ``ChatGLM1ForCausalLM``, a class of ours: transformers has none like it.

Its config.json calls itself ``chatglm`` like those of ChatGLM2 and 3; only it has ``inner_hidden_size``. There are
two vocabularies for the same weights: 130,528 tokens, and in early copies 150,528, whose first 20,000 are images.

Source: config.json and modelling code of THUDM/chatglm-6b; GLM: arXiv 2103.10360.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import HelpersError
from .family import Family, Original, need, refuse_unless, rope
from .rules import Rule, drop, keep

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from .own.chatglm1 import ChatGLM1Config


def config(original: Original) -> ChatGLM1Config:
    """Translate config.json; refuses quantised copies and those with a trained prefix (P-Tuning)."""
    from .own.chatglm1 import ChatGLM1Config

    bits = original.get("quantization_bit", 0)
    if bits:
        raise HelpersError(
            "cannot convert this checkpoint",
            f"config.json says quantization_bit={bits!r}: its weights are packed integers of its own kind",
            "take chatglm-6b itself and load it with precision='nf4' or 'int8'",
        )
    refuse_unless(original, "position_encoding_2d", True, default=True)
    refuse_unless(original, "pre_seq_len", None, default=None)
    start = need(original, "bos_token_id")
    return ChatGLM1Config(
        vocab_size=need(original, "vocab_size"),
        hidden_size=need(original, "hidden_size"),
        intermediate_size=need(original, "inner_hidden_size"),
        num_hidden_layers=need(original, "num_layers"),
        num_attention_heads=need(original, "num_attention_heads"),
        max_position_embeddings=need(original, "max_sequence_length"),
        layer_norm_eps=need(original, "layernorm_epsilon"),
        rope_parameters=rope(10_000),
        tie_word_embeddings=original.get("tie_word_embeddings", True),
        # Early copies do not name these two; the order is [MASK] [gMASK] [sMASK] <unused_0> <sop> <eop>.
        mask_token_id=original.get("mask_token_id", start - 4),
        gmask_token_id=original.get("gmask_token_id", start - 3),
        bos_token_id=start,
        eos_token_id=need(original, "eos_token_id"),
        pad_token_id=original.get("pad_token_id", 0),
    )


def rules(original: Original) -> list[Rule]:
    """Table of tensors: all keep their names."""
    layer = "transformer.layers.{i}."
    modules = [layer + name for name in ("input_layernorm", "attention.query_key_value", "attention.dense")]
    modules += [layer + name for name in ("post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")]
    modules += ["transformer.final_layernorm"]
    return [
        *keep("transformer.word_embeddings.weight", "lm_head.weight"),
        *keep(*(f"{module}.{kind}" for module in modules for kind in ("weight", "bias"))),
        drop(layer + "attention.rotary_emb.inv_freq"),
    ]


def tokenizer(folder: Path, original: Original, chat_format: str) -> PreTrainedTokenizerFast:
    """Build the tokenizer: SentencePiece, whose texts end in ``[gMASK]<sop>``."""
    from .tokenizers import chatglm1

    return chatglm1(folder, chat_format, original["bos_token_id"])


FAMILY = Family(
    "chatglm",
    "ChatGLM1ForCausalLM",
    "chatglm",
    config,
    rules,
    tokenizer,
    ("ice_text.model",),
    known_by="inner_hidden_size",
)
