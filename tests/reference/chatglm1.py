"""ChatGLM-6B, from config.json's keys and its published description (GLM: arXiv 2103.10360, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from .layers import Cache, Original, Weights

ALPHA = 56**0.5


def shapes(original: Original) -> dict[str, tuple[int, ...]]:
    """Name every trained tensor of the checkpoint with its shape; the head is stored beside the table it shares."""
    vocabulary, hidden, inner = (original[key] for key in ("vocab_size", "hidden_size", "inner_hidden_size"))
    named: dict[str, tuple[int, ...]] = {"transformer.word_embeddings.weight": (vocabulary, hidden)}

    def module(name: str, *shape: int) -> None:
        named[name + ".weight"], named[name + ".bias"] = shape, shape[:1]

    for i in range(original["num_layers"]):
        layer = f"transformer.layers.{i}."
        module(layer + "input_layernorm", hidden)
        module(layer + "attention.query_key_value", 3 * hidden, hidden)
        module(layer + "attention.dense", hidden, hidden)
        module(layer + "post_attention_layernorm", hidden)
        module(layer + "mlp.dense_h_to_4h", inner, hidden)
        module(layer + "mlp.dense_4h_to_h", hidden, inner)
    module("transformer.final_layernorm", hidden)
    named["lm_head.weight"] = (vocabulary, hidden)
    return named


def logits(
    original: Original, weights: Weights, input_ids: Tensor, attention_mask: Tensor, cache: Cache | None = None
) -> Tensor:
    """Run the model: ids [batch, new], mask [batch, past + new] -> [batch, new, vocab_size].

    Text by text and without its padding, each with the whole of its ids, which the cache keeps beside keys and values.
    """
    cache = {} if cache is None else cache
    rows = []
    for row in range(input_ids.shape[0]):
        seen = cache.setdefault(("ids", row), [])
        new = input_ids[row][attention_mask[row, -input_ids.shape[1] :].bool()].tolist()
        seen += new
        out = torch.zeros(input_ids.shape[1], original["vocab_size"])
        if new:
            out[-len(new) :] = one_text(original, weights, seen, len(new), cache, row)
        rows.append(out)
    return torch.stack(rows)


def one_text(original: Original, weights: Weights, ids: list[int], new: int, cache: Cache, row: int) -> Tensor:
    """Return the logits [new, vocab_size] of the last ``new`` tokens of one text."""
    places, visible = layout(original, ids)
    places, visible = places[:, -new:], visible[-new:]

    def run(name: str, x: Tensor) -> Tensor:
        return linear(x, weights[name + ".weight"], weights[name + ".bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return layer_norm(
            x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"], original["layernorm_epsilon"]
        )

    heads = original["num_attention_heads"]
    x = weights["transformer.word_embeddings.weight"][ids[-new:]]
    for i in range(original["num_layers"]):
        layer = f"transformer.layers.{i}."
        x = norm(layer + "input_layernorm", x)
        fused = run(layer + "attention.query_key_value", x).unflatten(-1, (heads, 3, -1))
        query, key, value = (part.transpose(0, 1) for part in fused.unbind(2))  # [heads, new, head_dim]
        query, key = rotate(query, places), rotate(key, places)
        if (row, i) in cache:
            key, value = (torch.cat(pair, dim=1) for pair in zip(cache[row, i], (key, value), strict=True))
        cache[row, i] = key, value
        scores = (query @ key.transpose(1, 2)) / query.shape[-1] ** 0.5
        mixed = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value
        x = x * ALPHA + run(layer + "attention.dense", mixed.transpose(0, 1).flatten(1))
        x = norm(layer + "post_attention_layernorm", x)
        inner = gelu(run(layer + "mlp.dense_h_to_4h", x), approximate="tanh")
        x = x * ALPHA + run(layer + "mlp.dense_4h_to_h", inner)
    x = norm("transformer.final_layernorm", x)
    return x @ weights["transformer.word_embeddings.weight"].T


def layout(original: Original, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Return the positions [2, tokens] and who sees whom [tokens, tokens] of one text."""
    tokens, start = len(ids), original["bos_token_id"]
    context = ids.index(start) if start in ids else tokens
    first, second = list(range(tokens)), [0] * context + list(range(1, tokens - context + 1))
    for mark in (original["gmask_token_id"], original["mask_token_id"]):
        if mark in ids:
            first[context:] = [ids.index(mark)] * (tokens - context)
            break
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    visible[:, :context] = True
    return torch.tensor([first, second]), visible


def rotate(x: Tensor, places: Tensor) -> Tensor:
    """Turn [heads, new, head_dim]: the first half by the first position, the second by the second.

    In each half, element j and element j + a quarter of the head are one complex number. The frequencies are stored
    in fp16.
    """
    quarter = x.shape[-1] // 4
    frequencies = (10_000 ** (-torch.arange(quarter) / quarter)).half().float()
    turned = []
    for half, place in zip(x.chunk(2, dim=-1), places, strict=True):
        angles = place[:, None] * frequencies
        real, imaginary = half.chunk(2, dim=-1)
        number = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)
        turned += [number.real, number.imag]
    return torch.cat(turned, dim=-1)
