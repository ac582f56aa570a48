"""Llama and its Chinese children (Atom, Llama2-Chinese, Chinese-LLaMA), from config.json's keys.

Sources: LLaMA arXiv 2302.13971, Llama 2 arXiv 2307.09288, rotary positions arXiv 2104.09864; stretched positions:
linear arXiv 2306.15595, dynamic NTK as in the models' own code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from .layers import Cache, attend, positions, rms_norm


def shapes(original: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name every trained tensor of the checkpoint with its shape."""
    vocabulary, hidden, ffn = (original[key] for key in ("vocab_size", "hidden_size", "intermediate_size"))
    key_values = hidden // original["num_attention_heads"] * kv_heads(original)
    named: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(original["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, rows in {"q": hidden, "k": key_values, "v": key_values, "o": hidden}.items():
            named[layer + f"self_attn.{name}_proj.weight"] = (rows, hidden)
            if original.get("attention_bias"):
                named[layer + f"self_attn.{name}_proj.bias"] = (rows,)
        named[layer + "mlp.gate_proj.weight"] = (ffn, hidden)
        named[layer + "mlp.up_proj.weight"] = (ffn, hidden)
        named[layer + "mlp.down_proj.weight"] = (hidden, ffn)
        named[layer + "input_layernorm.weight"] = (hidden,)
        named[layer + "post_attention_layernorm.weight"] = (hidden,)
    named["model.norm.weight"] = (hidden,)
    if not original.get("tie_word_embeddings"):
        named["lm_head.weight"] = (vocabulary, hidden)
    return named


def logits(
    original: dict[str, Any],
    weights: dict[str, Tensor],
    input_ids: Tensor,
    attention_mask: Tensor,
    cache: Cache | None = None,
) -> Tensor:
    """Run the model: ids [batch, new], mask [batch, past + new] -> [batch, new, vocab_size]."""
    epsilon, heads = original["rms_norm_eps"], original["num_attention_heads"]
    width = original["hidden_size"] // heads
    places = positions(attention_mask, input_ids.shape[1])
    turns = frequencies(original, width, attention_mask.shape[1])

    def apply(name: str, x: Tensor) -> Tensor:
        return linear(x, weights[name + ".weight"], weights.get(name + ".bias"))

    x = weights["model.embed_tokens.weight"][input_ids]
    for i in range(original["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        normed = rms_norm(x, weights[layer + "input_layernorm.weight"], epsilon)
        query = apply(layer + "self_attn.q_proj", normed).unflatten(-1, (heads, width))
        key = apply(layer + "self_attn.k_proj", normed).unflatten(-1, (kv_heads(original), width))
        value = apply(layer + "self_attn.v_proj", normed).unflatten(-1, (kv_heads(original), width))
        mixed = attend(rotate(query, places, turns), rotate(key, places, turns), value, attention_mask, cache, i)
        x = x + apply(layer + "self_attn.o_proj", mixed)

        normed = rms_norm(x, weights[layer + "post_attention_layernorm.weight"], epsilon)
        opened = silu(apply(layer + "mlp.gate_proj", normed)) * apply(layer + "mlp.up_proj", normed)
        x = x + apply(layer + "mlp.down_proj", opened)
    x = rms_norm(x, weights["model.norm.weight"], epsilon)
    tied = original.get("tie_word_embeddings", False)
    return linear(x, weights["model.embed_tokens.weight" if tied else "lm_head.weight"])


def kv_heads(original: dict[str, Any]) -> int:
    """Return the number of key-value heads; configs older than grouped-query attention have as many as heads."""
    return original.get("num_key_value_heads") or original["num_attention_heads"]


def frequencies(original: dict[str, Any], width: int, length: int) -> Tensor:
    """Return by how much each pair of a head turns from one position to the next [width / 2], in radians.

    Args:
        original: config.json; ``rope_theta`` and ``rope_scaling`` (type, factor) are read.
        width: values a head.
        length: tokens so far, padding included: past the trained length, dynamic NTK raises the base with it.
    """
    base, scaling = original.get("rope_theta", 10_000), original.get("rope_scaling") or {}
    factor, trained = scaling.get("factor", 1.0), original["max_position_embeddings"]
    if scaling.get("type") == "dynamic" and length > trained:
        base = base * (factor * length / trained - (factor - 1)) ** (width / (width - 2))
    turns = base ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    return turns / factor if scaling.get("type") == "linear" else turns


def rotate(x: Tensor, places: Tensor, turns: Tensor) -> Tensor:
    """Turn the pairs (0, h), (1, h + 1)... of every head, where h is half its width, by position times ``turns``.

    A pair is a complex number here, and turning it by an angle a is multiplying it by exp(i a).

    Args:
        x: [batch, new, heads, width].
        places: positions [batch, new].
        turns: [width / 2], see ``frequencies``.
    """
    angles = places[:, :, None, None] * turns
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)
