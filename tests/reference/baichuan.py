"""Baichuan-7B and Baichuan2-7B, from config.json's keys (Baichuan 2: arXiv 2309.10305, section 2).

The two differ in the output head alone, and no key of config.json says so: it is in the models' code. So there are
two functions here, and a test says which model it means.
"""

from __future__ import annotations

from typing import Any

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
    places = positions(attention_mask, input_ids.shape[1])
    turns = frequencies(original, width, attention_mask.shape[1])

    x = weights["model.embed_tokens.weight"][input_ids]
    for i in range(original["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        normed = rms_norm(x, weights[layer + "input_layernorm.weight"], epsilon)
        # One product gives all queries, then all keys, then all values.
        packed = linear(normed, weights[layer + "self_attn.W_pack.weight"]).unflatten(-1, (3, heads, width))
        query, key, value = packed.unbind(2)
        mixed = attend(rotate(query, places, turns), rotate(key, places, turns), value, attention_mask, cache, i)
        x = x + linear(mixed, weights[layer + "self_attn.o_proj.weight"])

        normed = rms_norm(x, weights[layer + "post_attention_layernorm.weight"], epsilon)
        gate = silu(linear(normed, weights[layer + "mlp.gate_proj.weight"]))
        opened = gate * linear(normed, weights[layer + "mlp.up_proj.weight"])
        x = x + linear(opened, weights[layer + "mlp.down_proj.weight"])
    return rms_norm(x, weights["model.norm.weight"], epsilon)
