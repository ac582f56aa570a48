"""Llama2-Chinese, Atom-7B and merged Chinese-LLaMA / Alpaca -> ``LlamaForCausalLM``.

The tensors are Llama's already and keep their names. What changes is around them: rotary buffers of old exports are
left out, the tokenizer is built from the SentencePiece file, and the shards become safetensors.

``merge_lora`` adds a published Chinese-LLaMA-Alpaca adapter to its base.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .family import Family, Original, llama_layers, need, qkv, refuse_unless, rope
from .rules import Rule, drop, keep, rename

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast


def config(original: Original) -> LlamaConfig:
    """Translate config.json of any generation; old ones state neither key-value heads nor a rotary base."""
    from transformers import LlamaConfig

    refuse_unless(original, "hidden_act", "silu", default="silu")
    heads = need(original, "num_attention_heads")
    scaling = original.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    refuse_unless({"rope_scaling.type": kind}, "rope_scaling.type", "default", "dynamic", "linear", default="default")
    more = {"rope_type": kind, "factor": float(scaling["factor"])} if kind != "default" else {}
    pad = original.get("pad_token_id")
    return LlamaConfig(
        vocab_size=need(original, "vocab_size"),
        hidden_size=need(original, "hidden_size"),
        intermediate_size=need(original, "intermediate_size"),
        num_hidden_layers=need(original, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=original.get("num_key_value_heads") or heads,
        head_dim=original.get("head_dim"),
        max_position_embeddings=need(original, "max_position_embeddings", "max_sequence_length"),
        rms_norm_eps=need(original, "rms_norm_eps"),
        attention_bias=original.get("attention_bias", False),
        mlp_bias=original.get("mlp_bias", False),
        rope_parameters=rope(original.get("rope_theta", 10_000)) | more,
        tie_word_embeddings=original.get("tie_word_embeddings", False),
        bos_token_id=original.get("bos_token_id", 1),
        eos_token_id=original.get("eos_token_id", 2),
        pad_token_id=None if pad == -1 else pad,  # the first Llama's exports write "none" as -1
    )


def rules(original: Original) -> list[Rule]:
    """Table of tensors: every name stays."""
    biases = [*qkv(kind="bias"), "model.layers.{i}.self_attn.o_proj.bias"] if original.get("attention_bias") else []
    if original.get("mlp_bias"):
        biases += [f"model.layers.{{i}}.mlp.{part}_proj.bias" for part in ("gate", "up", "down")]
    return [
        *keep("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", *qkv(), *biases),
        *(rename(*pair) for pair in llama_layers()),
        drop("model.layers.{i}.self_attn.rotary_emb.inv_freq"),
    ]


def tokenizer(folder: Path, original: Original, chat_format: str) -> PreTrainedTokenizerFast:
    """Build the tokenizer: SentencePiece with Llama's settings."""
    from .tokenizers import llama

    return llama(folder, chat_format)


FAMILY = Family("llama", "LlamaForCausalLM", "llama2-chinese", config, rules, tokenizer)
