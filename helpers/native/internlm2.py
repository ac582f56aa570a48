"""InternLM2 -> ``LlamaForCausalLM``.

InternLM2 is Llama with grouped-query attention whose fused projection is stored group by group: for each key-value
head its query heads, then the key, then the value. Cutting it elsewhere loads without complaint and answers noise.

Source: modelling code of the published checkpoints; arXiv 2403.17297, section 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .family import Family, Original, need, qkv, refuse_unless, rope
from .rules import Rule, drop, rename, split_grouped

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast


def config(original: Original) -> LlamaConfig:
    """Translate config.json; ``rope_scaling.type`` becomes transformers' ``rope_type``."""
    from transformers import LlamaConfig

    refuse_unless(original, "hidden_act", "silu", default="silu")
    heads = need(original, "num_attention_heads")
    theta, scaling = need(original, "rope_theta"), original.get("rope_scaling") or {}
    refuse_unless(scaling, "type", "dynamic", "linear", None, default=None)
    positions = rope(theta)
    if scaling:
        positions |= {"rope_type": scaling["type"], "factor": float(scaling["factor"])}
    return LlamaConfig(
        vocab_size=need(original, "vocab_size"),
        hidden_size=need(original, "hidden_size"),
        intermediate_size=need(original, "intermediate_size"),
        num_hidden_layers=need(original, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=original.get("num_key_value_heads") or heads,
        max_position_embeddings=need(original, "max_position_embeddings"),
        rms_norm_eps=need(original, "rms_norm_eps"),
        attention_bias=need(original, "bias"),
        rope_parameters=positions,
        tie_word_embeddings=original.get("tie_word_embeddings", False),
        bos_token_id=original.get("bos_token_id", 1),
        eos_token_id=original.get("eos_token_id", 2),
        pad_token_id=original.get("pad_token_id", 2),
    )


def rules(original: Original) -> list[Rule]:
    """Table of tensors, original -> native."""
    heads = original["num_attention_heads"]
    shape = heads, original.get("num_key_value_heads") or heads, original["hidden_size"] // heads
    layer, native = "model.layers.{i}.", "model.layers.{i}."
    return [
        rename("model.tok_embeddings.weight", "model.embed_tokens.weight"),
        rename("model.norm.weight", "model.norm.weight"),
        rename("output.weight", "lm_head.weight"),
        split_grouped(layer + "attention.wqkv.weight", qkv(), *shape),
        split_grouped(layer + "attention.wqkv.bias", qkv(kind="bias"), *shape),
        rename(layer + "attention.wo.weight", native + "self_attn.o_proj.weight"),
        rename(layer + "attention.wo.bias", native + "self_attn.o_proj.bias"),
        rename(layer + "feed_forward.w1.weight", native + "mlp.gate_proj.weight"),
        rename(layer + "feed_forward.w3.weight", native + "mlp.up_proj.weight"),
        rename(layer + "feed_forward.w2.weight", native + "mlp.down_proj.weight"),
        rename(layer + "attention_norm.weight", native + "input_layernorm.weight"),
        rename(layer + "ffn_norm.weight", native + "post_attention_layernorm.weight"),
        drop(layer + "attention.rotary_emb.inv_freq"),
    ]


def tokenizer(folder: Path, original: Original, chat_format: str) -> PreTrainedTokenizerFast:
    """Build the tokenizer: SentencePiece, with six of the last unused ids named as chat marks."""
    from .tokenizers import internlm2

    return internlm2(folder, chat_format)


FAMILY = Family("internlm2", "LlamaForCausalLM", "internlm2", config, rules, tokenizer)
