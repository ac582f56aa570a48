"""What quantisation costs: perplexity of unseen text, and how many learnt poems a model still recites."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerFast

    from ..checkpoints.make.poems import Poem

LARGEST_E4M3 = 448.0


def fp8_cache(model: PreTrainedModel) -> Cache:
    """Return an empty KV cache that rounds keys and values to e4m3 (4 bits of exponent, 3 of fraction), scale 1.0.

    That is what vLLM's ``kv_cache_dtype="fp8"`` keeps where the folder brings no scales
    (https://docs.vllm.ai/en/latest/features/quantization/quantized_kvcache/); queries and products stay as they are.
    """
    import torch
    from transformers import DynamicCache

    def rounded(states: Tensor) -> Tensor:
        return states.clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn).to(states.dtype)

    class Fp8Cache(DynamicCache):
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **more: Any) -> tuple[Tensor, Tensor]:
            return super().update(rounded(key_states), rounded(value_states), *args, **more)

    return Fp8Cache(config=model.config)


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    batch: int = 25,
    cache: Callable[[PreTrainedModel], Cache] | None = None,
) -> float:
    """Return the perplexity per token of texts, exp of the mean negative log-likelihood.

    The tokens that precede every text (e.g. ``<s>``) are read, not counted. ``cache`` makes the KV cache to read
    through, e.g. ``fp8_cache``; the model's own when None.
    """
    import torch
    from torch.nn.functional import cross_entropy

    opening = tokenizer("").input_ids
    start = max(1, len(opening))
    total = count = 0
    for first in range(0, len(texts), batch):
        encoded = tokenizer(list(texts[first : first + batch]), add_special_tokens=False).input_ids
        rows = [[*opening, *ids] for ids in encoded]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [-1] * (longest - len(row)) for row in rows], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=ids.clamp(min=0), **_through(cache, model)).logits
        targets = ids[:, start:]
        total += cross_entropy(
            logits[:, start - 1 : -1].flatten(0, 1).float(), targets.flatten(), ignore_index=-1, reduction="sum"
        ).item()
        count += int((targets >= 0).sum())
    return math.exp(total / count)


def recited(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    poems: Sequence[Poem],
    cache: Callable[[PreTrainedModel], Cache] | None = None,
) -> int:
    """Count the poems that greedy decoding completes exactly from the first verse; ``cache`` as ``perplexity``."""
    firsts = tokenizer([poem.verses[0] for poem in poems]).input_ids
    return exact(model, tokenizer, firsts, ["".join(poem.verses[1:]) for poem in poems], cache)


def _through(cache: Callable[[PreTrainedModel], Cache] | None, model: PreTrainedModel) -> dict[str, Cache]:
    return {"past_key_values": cache(model)} if cache else {}


def exact(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    wanted: Sequence[str],
    cache: Callable[[PreTrainedModel], Cache] | None = None,
) -> int:
    """Count the prompts, as ids, that greedy decoding continues exactly as wanted (spaces around it aside)."""
    import torch

    longest = max(map(len, prompts))
    padded = [[0] * (longest - len(ids)) + ids for ids in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    room = 8 + max(len(ids) for ids in tokenizer(list(wanted)).input_ids)
    with torch.inference_mode():
        written = model.generate(
            input_ids=torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=room,
            do_sample=False,
            **_through(cache, model),
        )
    answers = tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
    return sum(answer.strip() == text for answer, text in zip(answers, wanted, strict=True))
