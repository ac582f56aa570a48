"""InternLM3, from config.json's keys: attention and feed-forward of Llama, each with biases of its own switch.

Source: configuration_internlm3.py (what the keys mean) and config.json of internlm/internlm3-8b-instruct.
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
    queries, pairs = (original[key] * original["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    matrices = {
        "self_attn.q_proj": (queries, hidden, "qkv_bias"),
        "self_attn.k_proj": (pairs, hidden, "qkv_bias"),
        "self_attn.v_proj": (pairs, hidden, "qkv_bias"),
        "self_attn.o_proj": (hidden, queries, "bias"),
        "mlp.gate_proj": (ffn, hidden, "bias"),
        "mlp.up_proj": (ffn, hidden, "bias"),
        "mlp.down_proj": (hidden, ffn, "bias"),
    }
    named: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(original["num_hidden_layers"]):
        for name, (rows, columns, switch) in matrices.items():
            named[f"model.layers.{i}.{name}.weight"] = (rows, columns)
            if original[switch]:
                named[f"model.layers.{i}.{name}.bias"] = (rows,)
        named[f"model.layers.{i}.input_layernorm.weight"] = (hidden,)
        named[f"model.layers.{i}.post_attention_layernorm.weight"] = (hidden,)
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
    """Run the model: ids [batch, new], mask [batch, past + new] -> [batch, new, vocab_size]."""
    epsilon, width = original["rms_norm_eps"], original["head_dim"]
    places = positions(attention_mask, input_ids.shape[1])
    scaling = dict(original["rope_scaling"] or {})
    scaling["type"] = scaling.pop("rope_type", None)
    turns = frequencies(original | {"rope_scaling": scaling}, width, attention_mask.shape[1])

    def apply(name: str, x: Tensor) -> Tensor:
        return linear(x, weights[name + ".weight"], weights.get(name + ".bias"))

    x = weights["model.embed_tokens.weight"][input_ids]
    for i in range(original["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        normed = rms_norm(x, weights[layer + "input_layernorm.weight"], epsilon)
        query, key, value = (
            apply(f"{layer}self_attn.{part}_proj", normed).unflatten(-1, (-1, width)) for part in "qkv"
        )
        mixed = attend(rotate(query, places, turns), rotate(key, places, turns), value, attention_mask, cache, i)
        x = x + apply(layer + "self_attn.o_proj", mixed)

        normed = rms_norm(x, weights[layer + "post_attention_layernorm.weight"], epsilon)
        opened = silu(apply(layer + "mlp.gate_proj", normed)) * apply(layer + "mlp.up_proj", normed)
        x = x + apply(layer + "mlp.down_proj", opened)
    return linear(rms_norm(x, weights["model.norm.weight"], epsilon), weights["lm_head.weight"])
