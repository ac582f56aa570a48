"""ChatGLM2-6B and ChatGLM3-6B -> ``GlmForCausalLM``.

Both are the same network: RMSNorm before each block, multi-query attention with few key-value groups, rotary
positions on the first half of every head, and a gated SiLU feed-forward whose two halves lie in one matrix.
GLM-4's native class is that network with other names. The rotary halves are interleaved in both, so no row moves.

Sources: config.json and modelling code of the published checkpoints (ChatGLM2: arXiv 2406.12793, section 2).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .family import Family, Original, need, qkv, refuse_unless, rope
from .rules import Rule, drop, rename, split_rows

if TYPE_CHECKING:
    from transformers import GlmConfig, PreTrainedTokenizerFast

EOS, PAD = 2, 0
"""SentencePiece's own </s> and <unk>; GlmConfig's defaults are the ids of GLM-4."""


def config(original: Original) -> GlmConfig:
    """Translate config.json; refuses the variants that never left the training code."""
    from transformers import GlmConfig

    refuse_unless(original, "multi_query_attention", True, default=False)
    refuse_unless(original, "apply_residual_connection_post_layernorm", False, default=False)
    refuse_unless(original, "rmsnorm", True, default=True)
    refuse_unless(original, "post_layer_norm", True, default=True)
    refuse_unless(original, "add_bias_linear", False, default=False)
    refuse_unless(original, "original_rope", True, default=True)
    refuse_unless(original, "fp32_residual_connection", False, default=False)
    refuse_unless(original, "pre_seq_len", None, default=None)
    # One key, two meanings: the code of ChatGLM3 and GLM-4 multiplies the rotary base by rope_ratio, which is what
    # happens below; that of ChatGLM2-6B-32K divides positions by it. Only the name tells them apart.
    if "chatglm2" in str(original.get("_name_or_path", "")).lower():
        refuse_unless(original, "rope_ratio", 1, default=1)
    return GlmConfig(
        vocab_size=need(original, "padded_vocab_size"),
        hidden_size=need(original, "hidden_size"),
        intermediate_size=need(original, "ffn_hidden_size"),
        num_hidden_layers=need(original, "num_layers"),
        num_attention_heads=need(original, "num_attention_heads"),
        num_key_value_heads=need(original, "multi_query_group_num"),
        head_dim=need(original, "kv_channels"),
        rms_norm_eps=need(original, "layernorm_epsilon"),
        max_position_embeddings=need(original, "seq_length"),
        attention_bias=original.get("add_qkv_bias", False),
        rope_parameters=rope(10_000 * original.get("rope_ratio", 1), partial_rotary_factor=0.5),
        tie_word_embeddings=original.get("tie_word_embeddings", False),
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def rules(original: Original) -> list[Rule]:
    """Table of tensors, original -> native."""
    head_dim, groups = original["kv_channels"], original["multi_query_group_num"]
    sizes = [original["num_attention_heads"] * head_dim, groups * head_dim, groups * head_dim]
    layer, native = "transformer.encoder.layers.{i}.", "model.layers.{i}."
    return [
        rename("transformer.embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        drop("transformer.rotary_pos_emb.inv_freq"),
        split_rows(layer + "self_attention.query_key_value.weight", qkv(), sizes),
        split_rows(layer + "self_attention.query_key_value.bias", qkv(kind="bias"), sizes),
        rename(layer + "self_attention.dense.weight", native + "self_attn.o_proj.weight"),
        rename(layer + "mlp.dense_h_to_4h.weight", native + "mlp.gate_up_proj.weight"),
        rename(layer + "mlp.dense_4h_to_h.weight", native + "mlp.down_proj.weight"),
        rename(layer + "input_layernorm.weight", native + "input_layernorm.weight"),
        rename(layer + "post_attention_layernorm.weight", native + "post_attention_layernorm.weight"),
        rename("transformer.encoder.final_layernorm.weight", "model.norm.weight"),
        rename("transformer.output_layer.weight", "lm_head.weight"),
    ]


def tokenizer(folder: Path, original: Original, chat_format: str) -> PreTrainedTokenizerFast:
    """Build the tokenizer: SentencePiece, with the special tokens that the original code appends to it."""
    from .tokenizers import chatglm

    return chatglm(folder, chat_format)


FAMILY = Family("chatglm", "GlmForCausalLM", "chatglm3", config, rules, tokenizer)
