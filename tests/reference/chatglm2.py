"""ChatGLM2-6B and ChatGLM3-6B, from config.json's keys (GLM: arXiv 2103.10360; ChatGLM: arXiv 2406.12793)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from .layers import Cache, Original, Weights, attend, positions, rms_norm


def shapes(original: Original) -> dict[str, tuple[int, ...]]:
    """Name every trained tensor of the checkpoint with its shape."""
    vocabulary, hidden, ffn = (original[key] for key in ("padded_vocab_size", "hidden_size", "ffn_hidden_size"))
    heads, groups, width = (original[key] for key in ("num_attention_heads", "multi_query_group_num", "kv_channels"))
    fused = (heads + 2 * groups) * width
    named: dict[str, tuple[int, ...]] = {"transformer.embedding.word_embeddings.weight": (vocabulary, hidden)}
    for i in range(original["num_layers"]):
        layer = f"transformer.encoder.layers.{i}."
        named[layer + "input_layernorm.weight"] = (hidden,)
        named[layer + "self_attention.query_key_value.weight"] = (fused, hidden)
        if original["add_qkv_bias"]:
            named[layer + "self_attention.query_key_value.bias"] = (fused,)
        named[layer + "self_attention.dense.weight"] = (hidden, heads * width)
        named[layer + "post_attention_layernorm.weight"] = (hidden,)
        named[layer + "mlp.dense_h_to_4h.weight"] = (2 * ffn, hidden)
        named[layer + "mlp.dense_4h_to_h.weight"] = (hidden, ffn)
    named["transformer.encoder.final_layernorm.weight"] = (hidden,)
    named["transformer.output_layer.weight"] = (vocabulary, hidden)
    return named


def logits(
    original: Original, weights: Weights, input_ids: Tensor, attention_mask: Tensor, cache: Cache | None = None
) -> Tensor:
    """Run the model: ids [batch, new], mask [batch, past + new] -> [batch, new, padded_vocab_size]."""
    epsilon = original["layernorm_epsilon"]
    heads, groups, width = (original[key] for key in ("num_attention_heads", "multi_query_group_num", "kv_channels"))
    places = positions(attention_mask, input_ids.shape[1])
    base = 10_000 * original.get("rope_ratio", 1)

    x = weights["transformer.embedding.word_embeddings.weight"][input_ids]
    for i in range(original["num_layers"]):
        layer = f"transformer.encoder.layers.{i}."
        normed = rms_norm(x, weights[layer + "input_layernorm.weight"], epsilon)
        bias = weights[layer + "self_attention.query_key_value.bias"] if original["add_qkv_bias"] else None
        fused = linear(normed, weights[layer + "self_attention.query_key_value.weight"], bias)
        # All query heads come first, then the few key heads, then as many value heads.
        rows = fused.unflatten(-1, (heads + 2 * groups, width))
        query, key, value = rows[:, :, :heads], rows[:, :, heads : heads + groups], rows[:, :, heads + groups :]
        mixed = attend(rotate(query, places, base), rotate(key, places, base), value, attention_mask, cache, i)
        x = x + linear(mixed, weights[layer + "self_attention.dense.weight"])

        normed = rms_norm(x, weights[layer + "post_attention_layernorm.weight"], epsilon)
        gate, up = linear(normed, weights[layer + "mlp.dense_h_to_4h.weight"]).chunk(2, dim=-1)
        x = x + linear(silu(gate) * up, weights[layer + "mlp.dense_4h_to_h.weight"])
    x = rms_norm(x, weights["transformer.encoder.final_layernorm.weight"], epsilon)
    return linear(x, weights["transformer.output_layer.weight"])


def rotate(x: Tensor, places: Tensor, base: float) -> Tensor:
    """Turn neighbouring pairs (0, 1), (2, 3)... of the first half of every head; the second half has no position.

    A pair is a complex number here, and turning it by an angle a is multiplying it by exp(i a).
    """
    turned, rest = x.chunk(2, dim=-1)
    pairs = turned.shape[-1] // 2
    frequencies = base ** (-torch.arange(pairs, dtype=torch.float32) / pairs)
    angles = places[:, :, None, None] * frequencies
    complex_pairs = torch.view_as_complex(turned.unflatten(-1, (pairs, 2)).contiguous())
    turned = torch.view_as_real(complex_pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    return torch.cat([turned, rest], dim=-1)
