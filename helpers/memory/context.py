"""Time and memory of one more token against the length of the text so far: an RNN beside a Transformer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

READ_AT_ONCE = 2048
"""Tokens of a prompt that one pass reads: the transient memory of a long prompt is no part of the comparison."""

EVEN = 64
"""The twin's feed-forward width is a multiple of this: bitsandbytes' nf4 product on a CPU wants whole blocks of 64."""


@dataclass(frozen=True)
class AtLength:
    """What decoding costs after ``tokens`` tokens: seconds of the fastest token, bytes of the KV cache or state."""

    tokens: int
    seconds: float
    cache_bytes: int


def decode_against_length(
    model: PreTrainedModel, lengths: Sequence[int] = (1024, 2048, 4096, 8192, 16384, 32768), steps: int = 16
) -> list[AtLength]:
    """Read random tokens to each length in turn, and time ``steps`` single tokens there.

    The context that a model was made for is not regarded: past it the words are noise, their cost is not. Of the times
    the least counts, as with Python's timeit: what else the machine does only adds to it, and not to all lengths alike.

    Args:
        model: a causal language model, of RWKV or a Transformer.
        lengths: rising numbers of tokens; fewer than ``steps`` apart makes no sense.
        steps: tokens timed at each length, after one that is not.
    """
    import torch

    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, max(lengths) + steps + 1), generator=draw).to(model.device)
    found, cache, done = [], None, 0

    def read(tokens: int) -> float:
        nonlocal cache, done
        start = time.perf_counter()
        out = model(ids[:, done : done + tokens], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, done = out.past_key_values, done + tokens
        if ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    with torch.inference_mode():
        for length in lengths:
            while done < length:
                read(min(READ_AT_ONCE, length - done))
            size = cache_bytes(cache)
            times = [read(1) for _ in range(steps + 1)][1:]
            found.append(AtLength(length, min(times), size))
    return found


def cache_bytes(cache: Any) -> int:
    """Return the bytes of a KV cache of transformers, or of RWKV's state."""
    if hasattr(cache, "memory"):
        return cache.memory.nbytes + cache.shifts.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def transformer_twin(config: PreTrainedConfig, parameters: int) -> LlamaConfig:
    """Return a Llama of the same width, depth, vocabulary and, as nearly as ``EVEN`` allows, number of parameters.

    Args:
        config: of the RWKV model; heads are 64 wide (or as wide as its own), each with its key and value.
        parameters: number of its parameters; the feed-forward layers are made as wide as it takes.
    """
    from transformers import LlamaConfig

    width, layers = config.hidden_size, config.num_hidden_layers
    left = parameters - 2 * config.vocab_size * width - layers * (4 * width**2 + 2 * width) - width
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // getattr(config, "head_size", 64),
        intermediate_size=EVEN * round(left / (layers * 3 * width * EVEN)),
        max_position_embeddings=max(32768, config.max_position_embeddings),
        tie_word_embeddings=False,
    )
