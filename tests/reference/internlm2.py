"""InternLM2, from config.json's keys (arXiv 2403.17297, section 2)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import linear, silu

from .layers import Cache, attend, positions, rms_norm
from .llama import frequencies, rotate


def shapes(original: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name every trained tensor of the checkpoint with its shape."""
    vocabulary, hidden, ffn = (original[key] for key in ("vocab_size", "hidden_size", "intermediate_size"))
    fused = hidden + 2 * hidden // original["num_attention_heads"] * original["num_key_value_heads"]
    named: dict[str, tuple[int, ...]] = {"model.tok_embeddings.weight": (vocabulary, hidden)}
    for i in range(original["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        named[layer + "attention.wqkv.weight"] = (fused, hidden)
        named[layer + "attention.wo.weight"] = (hidden, hidden)
        if original["bias"]:
            named[layer + "attention.wqkv.bias"] = (fused,)
            named[layer + "attention.wo.bias"] = (hidden,)
        named[layer + "feed_forward.w1.weight"] = (ffn, hidden)
        named[layer + "feed_forward.w3.weight"] = (ffn, hidden)
        named[layer + "feed_forward.w2.weight"] = (hidden, ffn)
        named[layer + "attention_norm.weight"] = (hidden,)
        named[layer + "ffn_norm.weight"] = (hidden,)
    named["model.norm.weight"] = (hidden,)
    named["output.weight"] = (vocabulary, hidden)
    return named


def logits(
    original: dict[str, Any],
    weights: dict[str, Tensor],
    input_ids: Tensor,
    attention_mask: Tensor,
    cache: Cache | None = None,
) -> Tensor:
    """Run the model: ids [batch, new], mask [batch, past + new] -> [batch, new, vocab_size]."""
    epsilon, heads, groups = (original[key] for key in ("rms_norm_eps", "num_attention_heads", "num_key_value_heads"))
    width = original["hidden_size"] // heads
    places = positions(attention_mask, input_ids.shape[1])
    turns = frequencies(original, width, attention_mask.shape[1])

    def apply(name: str, x: Tensor) -> Tensor:
        return linear(x, weights[name + ".weight"], weights.get(name + ".bias"))

    x = weights["model.tok_embeddings.weight"][input_ids]
    for i in range(original["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        normed = rms_norm(x, weights[layer + "attention_norm.weight"], epsilon)
        # Each group holds its query heads, one key head and one value head; groups follow one another.
        fused = apply(layer + "attention.wqkv", normed).unflatten(-1, (groups, heads // groups + 2, width))
        query, key, value = fused[:, :, :, :-2].flatten(2, 3), fused[:, :, :, -2], fused[:, :, :, -1]
        mixed = attend(rotate(query, places, turns), rotate(key, places, turns), value, attention_mask, cache, i)
        x = x + apply(layer + "attention.wo", mixed)

        normed = rms_norm(x, weights[layer + "ffn_norm.weight"], epsilon)
        opened = silu(apply(layer + "feed_forward.w1", normed)) * apply(layer + "feed_forward.w3", normed)
        x = x + apply(layer + "feed_forward.w2", opened)
    return linear(rms_norm(x, weights["model.norm.weight"], epsilon), weights["output.weight"])
