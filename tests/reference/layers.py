"""What the reference models share: RMSNorm, positions, and attention with a mask and a KV cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Original = dict[str, Any]
"""An original config.json."""

Weights = dict[str, Tensor]
"""Tensors by their original names."""

Cache = dict[int, tuple[Tensor, Tensor]]
"""Layer number -> keys and values so far, each [batch, kv_heads, tokens, head_dim]."""


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Divide by the root of the mean square over the last axis, then scale (arXiv 1910.07467)."""
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + epsilon) * weight


def positions(attention_mask: Tensor, new: int) -> Tensor:
    """Number the last ``new`` tokens [batch, new], starting at 0 with the first token that is no padding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    cache: Cache | None = None,
    layer: int = 0,
    slopes: Tensor | None = None,
) -> Tensor:
    """Causal attention in which each key-value head serves ``heads / kv_heads`` query heads.

    Args:
        query: [batch, new, heads, head_dim].
        key: [batch, new, kv_heads, head_dim], as is ``value``.
        value: see ``key``.
        attention_mask: [batch, past + new], 1 for tokens and 0 for padding.
        cache: filled in place; what it holds comes before ``key`` and ``value``.
        layer: which entry of the cache.
        slopes: [heads], what a score loses with each token that lies between query and key (ALiBi).

    Returns:
        [batch, new, heads * head_dim]; rows of padding hold no meaning.
    """
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    if cache is not None:
        if layer in cache:
            key, value = (torch.cat(pair, dim=2) for pair in zip(cache[layer], (key, value), strict=True))
        cache[layer] = key, value
    new, total = query.shape[2], key.shape[2]
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    if slopes is not None:
        distance = torch.arange(total - new, total)[:, None] - torch.arange(total)
        scores = scores - slopes[:, None, None] * distance
    causal = torch.ones(total, total, dtype=torch.bool).tril()[total - new :]
    visible = causal & attention_mask[:, None, None, :].bool()
    weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2)
