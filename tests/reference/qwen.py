"""Qwen v1, from config.json's keys and arXiv 2309.16609; also past ``seq_length``, where the native class ends.

Two rules hold there, each with its switch: ``use_dynamic_ntk`` stretches the rotary base (section 2.3), and
``use_logn_attn`` scales each query by the logarithm of its place.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from .layers import Cache, Original, Weights, attend, positions, rms_norm


def shapes(original: Original) -> dict[str, tuple[int, ...]]:
    """Name every trained tensor of the checkpoint with its shape."""
    vocabulary, hidden, ffn = original["vocab_size"], original["hidden_size"], original["intermediate_size"] // 2
    projection = original["num_attention_heads"] * original["kv_channels"]
    named: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (vocabulary, hidden)}
    for i in range(original["num_hidden_layers"]):
        layer = f"transformer.h.{i}."
        named[layer + "ln_1.weight"] = (hidden,)
        named[layer + "attn.c_attn.weight"] = (3 * projection, hidden)
        named[layer + "attn.c_attn.bias"] = (3 * projection,)
        named[layer + "attn.c_proj.weight"] = (hidden, projection)
        named[layer + "ln_2.weight"] = (hidden,)
        named[layer + "mlp.w1.weight"] = (ffn, hidden)
        named[layer + "mlp.w2.weight"] = (ffn, hidden)
        named[layer + "mlp.c_proj.weight"] = (hidden, ffn)
    return named | {"transformer.ln_f.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def logits(
    original: Original, weights: Weights, input_ids: Tensor, attention_mask: Tensor, cache: Cache | None = None
) -> Tensor:
    """Run the model: ids [batch, new], mask [batch, past + new] -> [batch, new, vocab_size].

    Past ``seq_length`` only whole, unpadded sequences: the original freezes the stretched base at the prefill.
    """
    epsilon, heads = original["layer_norm_epsilon"], original["num_attention_heads"]
    places = positions(attention_mask, input_ids.shape[1])
    base, scale = stretched(original, attention_mask.shape[1], places)

    x = weights["transformer.wte.weight"][input_ids]
    for i in range(original["num_hidden_layers"]):
        layer = f"transformer.h.{i}."
        normed = rms_norm(x, weights[layer + "ln_1.weight"], epsilon)
        fused = linear(normed, weights[layer + "attn.c_attn.weight"], weights[layer + "attn.c_attn.bias"])
        query, key, value = fused.unflatten(-1, (3, heads, original["kv_channels"])).unbind(2)
        query, key = rotate(query, places, base) * scale, rotate(key, places, base)
        mixed = attend(query, key, value, attention_mask, cache, i)
        x = x + linear(mixed, weights[layer + "attn.c_proj.weight"])

        normed = rms_norm(x, weights[layer + "ln_2.weight"], epsilon)
        gate, up = linear(normed, weights[layer + "mlp.w2.weight"]), linear(normed, weights[layer + "mlp.w1.weight"])
        x = x + linear(silu(gate) * up, weights[layer + "mlp.c_proj.weight"])
    return linear(rms_norm(x, weights["transformer.ln_f.weight"], epsilon), weights["lm_head.weight"])


def stretched(original: Original, total: int, places: Tensor) -> tuple[float, Tensor]:
    """Return the rotary base, and the factor of each query [batch, new, 1, 1], for ``total`` tokens."""
    base, factor = original["rotary_emb_base"], torch.ones(places.shape)
    limit, width = original["seq_length"], original["kv_channels"]
    if total > limit and original["use_dynamic_ntk"]:
        alpha = 2 ** math.ceil(math.log2(total / limit) + 1) - 1
        base = base * alpha ** (width / (width - 2))
    if total > limit and original["use_logn_attn"]:
        factor = ((places + 1).log() / math.log(limit)).clamp(min=1)
    return base, factor[:, :, None, None]


def rotate(x: Tensor, places: Tensor, base: float) -> Tensor:
    """Turn pairs that lie half a head apart, (0, width / 2), (1, width / 2 + 1)..., over the whole head."""
    pairs = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(pairs, dtype=torch.float32) / pairs)
    angles = places[:, :, None, None] * frequencies
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)
