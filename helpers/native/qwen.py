"""Qwen v1 (Qwen-1.8B, 7B, 14B, 72B) -> ``Qwen2ForCausalLM``.

Qwen 2 kept the network and changed the names: query, key and value lie in one matrix with a bias, ``w2`` is the
gate and ``w1`` the other half of the feed-forward, and ``intermediate_size`` counts both halves.

Past ``seq_length`` the original stretches its rotary base and scales the queries (dynamic NTK, log-n). The native
class does neither, so a converted model stops at ``seq_length``, up to which both are equal.

Source: modelling code of the published checkpoints; arXiv 2309.16609.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .family import Family, Original, need, qkv, refuse_unless, rope
from .rules import Rule, drop, rename, split_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2Config


def config(original: Original) -> Qwen2Config:
    """Translate config.json; the context is capped at ``seq_length``."""
    from transformers import Qwen2Config

    refuse_unless(original, "no_bias", True, default=True)
    refuse_unless(original, "rotary_pct", 1.0, default=1.0)
    refuse_unless(original, "scale_attn_weights", True, default=True)
    refuse_unless(original, "use_cache_quantization", False, default=False)
    heads, hidden = need(original, "num_attention_heads"), need(original, "hidden_size")
    made = Qwen2Config(
        vocab_size=need(original, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=need(original, "intermediate_size") // 2,
        num_hidden_layers=need(original, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=need(original, "seq_length"),
        rms_norm_eps=need(original, "layer_norm_epsilon"),
        rope_parameters=rope(need(original, "rotary_emb_base")),
        tie_word_embeddings=original.get("tie_word_embeddings", False),
    )
    made.head_dim = need(original, "kv_channels")
    return made


def rules(original: Original) -> list[Rule]:
    """Table of tensors, original -> native."""
    projection = original["kv_channels"] * original["num_attention_heads"]
    layer, native = "transformer.h.{i}.", "model.layers.{i}."
    return [
        rename("transformer.wte.weight", "model.embed_tokens.weight"),
        rename("transformer.ln_f.weight", "model.norm.weight"),
        rename("lm_head.weight", "lm_head.weight"),
        split_rows(layer + "attn.c_attn.weight", qkv(), [projection] * 3),
        split_rows(layer + "attn.c_attn.bias", qkv(kind="bias"), [projection] * 3),
        rename(layer + "attn.c_proj.weight", native + "self_attn.o_proj.weight"),
        rename(layer + "mlp.w1.weight", native + "mlp.up_proj.weight"),
        rename(layer + "mlp.w2.weight", native + "mlp.gate_proj.weight"),
        rename(layer + "mlp.c_proj.weight", native + "mlp.down_proj.weight"),
        rename(layer + "ln_1.weight", native + "input_layernorm.weight"),
        rename(layer + "ln_2.weight", native + "post_attention_layernorm.weight"),
        drop("transformer.rotary_emb.inv_freq"),
    ]


def tokenizer(folder: Path, original: Original, chat_format: str) -> PreTrainedTokenizerFast:
    """Build the tokenizer: byte-level BPE from ``qwen.tiktoken``."""
    from .tokenizers import qwen

    return qwen(folder, chat_format)


FAMILY = Family("qwen", "Qwen2ForCausalLM", "chatml", config, rules, tokenizer, ("qwen.tiktoken",))
