"""Baichuan and Baichuan 2, from config.json's keys (Baichuan 2: arXiv 2309.10305, section 2).

The two differ in the output head alone, and no key of config.json says so: it is in the models' code. So there are
two functions here, and a test says which model it means. 7B and 13B differ in their positions, rotary or ALiBi (arXiv
2108.12409); the 13B has no key ``max_position_embeddings``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from .layers import Cache, attend, positions, rms_norm
from .llama import frequencies, rotate


def shapes(original: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name every trained tensor of the checkpoint with its shape."""
    vocabulary, hidden, ffn = (original[key] for key in ("vocab_size", "hidden_size", "intermediate_size"))
    named: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(original["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        named[layer + "self_attn.W_pack.weight"] = (3 * hidden, hidden)
        named[layer + "self_attn.o_proj.weight"] = (hidden, hidden)
        named[layer + "mlp.gate_proj.weight"] = (ffn, hidden)
        named[layer + "mlp.up_proj.weight"] = (ffn, hidden)
        named[layer + "mlp.down_proj.weight"] = (hidden, ffn)
        named[layer + "input_layernorm.weight"] = (hidden,)
        named[layer + "post_attention_layernorm.weight"] = (hidden,)
    named["model.norm.weight"] = (hidden,)
    named["lm_head.weight"] = (vocabulary, hidden)
    return named


def logits(
    original: dict[str, Any],
    weights: dict[str, Tensor],
    input_ids: Tensor,
    attention_mask: Tensor,
    cache: Cache | None = None,
) -> Tensor:
    """Run Baichuan 1: ids [batch, new], mask [batch, past + new] -> [batch, new, vocab_size]."""
    return linear(last_hidden(original, weights, input_ids, attention_mask, cache), weights["lm_head.weight"])


def norm_head_logits(
    original: dict[str, Any],
    weights: dict[str, Tensor],
    input_ids: Tensor,
    attention_mask: Tensor,
    cache: Cache | None = None,
) -> Tensor:
    """Run Baichuan 2, whose logits are products with rows of length 1: as ``logits``, divided by each row's length."""
    lengths = weights["lm_head.weight"].square().sum(-1).sqrt()
    return logits(original, weights, input_ids, attention_mask, cache) / lengths


def last_hidden(
    original: dict[str, Any],
    weights: dict[str, Tensor],
    input_ids: Tensor,
    attention_mask: Tensor,
    cache: Cache | None = None,
) -> Tensor:
    """Run everything below the output head, the same in both models: -> [batch, new, hidden]."""
    epsilon, heads = original["rms_norm_eps"], original["num_attention_heads"]
    width = original["hidden_size"] // heads
    rotary = "max_position_embeddings" in original
    if rotary:
        places = positions(attention_mask, input_ids.shape[1])
        turns = frequencies(original, width, attention_mask.shape[1])
    slopes = None if rotary else torch.tensor(alibi_slopes(heads))

    x = weights["model.embed_tokens.weight"][input_ids]
    for i in range(original["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        normed = rms_norm(x, weights[layer + "input_layernorm.weight"], epsilon)
        # One product gives all queries, then all keys, then all values.
        packed = linear(normed, weights[layer + "self_attn.W_pack.weight"]).unflatten(-1, (3, heads, width))
        query, key, value = packed.unbind(2)
        if rotary:
            query, key = rotate(query, places, turns), rotate(key, places, turns)
        mixed = attend(query, key, value, attention_mask, cache, i, slopes)
        x = x + linear(mixed, weights[layer + "self_attn.o_proj.weight"])

        normed = rms_norm(x, weights[layer + "post_attention_layernorm.weight"], epsilon)
        gate = silu(linear(normed, weights[layer + "mlp.gate_proj.weight"]))
        opened = gate * linear(normed, weights[layer + "mlp.up_proj.weight"])
        x = x + linear(opened, weights[layer + "mlp.down_proj.weight"])
    return rms_norm(x, weights["model.norm.weight"], epsilon)


def alibi_slopes(heads: int) -> list[float]:
    """Return each head's slope as section 3 of the paper and its code's ``get_slopes`` do.

    For a power of two a geometric series from 2 ** (-8 / heads); else that of the power of two below, and every
    second one of the power of two above.
    """
    below = 2 ** math.floor(math.log2(heads))
    if below == heads:
        return [2 ** (-8 / heads * (head + 1)) for head in range(heads)]
    return alibi_slopes(below) + alibi_slopes(2 * below)[::2][: heads - below]
