"""Baichuan and Baichuan 2: 7B -> ``LlamaForCausalLM``, 13B -> ``AlibiLlamaForCausalLM``.

Baichuan-7B is Llama with query, key and value in one matrix (``W_pack``). Baichuan 2 also scales every row of its
output head to length 1 (NormHead): done once here, it costs nothing in the forward pass and plain Llama serves it.

The 13B models share ``model_type`` but use ALiBi instead of rotary positions: ``own/alibi.py``.

Sources: modelling code of the published checkpoints; Baichuan 2: arXiv 2309.10305, section 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .family import Family, Original, llama_layers, need, qkv, refuse_unless, rope
from .rules import Rule, drop, keep, rename, split_rows, unit_rows

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast


def has_norm_head(original: Original) -> bool:
    """Tell Baichuan 2 from Baichuan 1: by the published vocabularies, else by a key that only Baichuan 2 has.

    That is ``z_loss_weight`` in the 7B's config.json, and ``tokenizer_class`` in the 13B's.
    """
    if original["vocab_size"] in (64_000, 125_696):
        return original["vocab_size"] == 125_696
    return "z_loss_weight" in original or "tokenizer_class" in original


def has_alibi(original: Original) -> bool:
    """Tell 13B from 7B: it has no rotary table, so its length is called ``model_max_length`` only."""
    return "max_position_embeddings" not in original


def config(original: Original) -> LlamaConfig:
    """Translate config.json."""
    from transformers import LlamaConfig

    from .own.alibi import AlibiLlamaConfig

    refuse_unless(original, "hidden_act", "silu", default="silu")
    alibi = has_alibi(original)
    return (AlibiLlamaConfig if alibi else LlamaConfig)(
        architectures=["AlibiLlamaForCausalLM" if alibi else "LlamaForCausalLM"],
        vocab_size=need(original, "vocab_size"),
        hidden_size=need(original, "hidden_size"),
        intermediate_size=need(original, "intermediate_size"),
        num_hidden_layers=need(original, "num_hidden_layers"),
        num_attention_heads=need(original, "num_attention_heads"),
        max_position_embeddings=need(original, "max_position_embeddings", "model_max_length"),
        rms_norm_eps=need(original, "rms_norm_eps"),
        rope_parameters=rope(10_000),
        tie_word_embeddings=original.get("tie_word_embeddings", False),
        bos_token_id=original.get("bos_token_id", 1),
        eos_token_id=original.get("eos_token_id", 2),
        pad_token_id=original.get("pad_token_id", 0),
    )


def rules(original: Original) -> list[Rule]:
    """Table of tensors, original -> native."""
    hidden = original["hidden_size"]
    head = unit_rows if has_norm_head(original) else rename
    return [
        *keep("model.embed_tokens.weight", "model.norm.weight"),
        *(rename(*pair) for pair in llama_layers()),
        split_rows("model.layers.{i}.self_attn.W_pack.weight", qkv(), [hidden] * 3),
        *([] if has_alibi(original) else [drop("model.layers.{i}.self_attn.rotary_emb.inv_freq")]),
        head("lm_head.weight", "lm_head.weight"),
    ]


def tokenizer(folder: Path, original: Original, chat_format: str) -> PreTrainedTokenizerFast:
    """Build the tokenizer: SentencePiece; the chat models mark turns with two of their reserved tokens."""
    from .tokenizers import baichuan

    return baichuan(folder, chat_format)


FAMILY = Family("baichuan", "LlamaForCausalLM", "none", config, rules, tokenizer)
