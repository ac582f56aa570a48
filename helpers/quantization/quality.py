"""What quantisation costs: perplexity of unseen text, and how many learnt poems a model still recites."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from ..checkpoints.make.poems import Poem


def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], batch: int = 25
) -> float:
    """Return the perplexity per token of texts, exp of the mean negative log-likelihood.

    The tokens that precede every text (e.g. ``<s>``) are read, not counted.
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
            logits = model(input_ids=ids.clamp(min=0)).logits
        targets = ids[:, start:]
        total += cross_entropy(
            logits[:, start - 1 : -1].flatten(0, 1).float(), targets.flatten(), ignore_index=-1, reduction="sum"
        ).item()
        count += int((targets >= 0).sum())
    return math.exp(total / count)


def recited(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, poems: Sequence[Poem]) -> int:
    """Count the poems that greedy decoding completes exactly from the first verse."""
    firsts = tokenizer([poem.verses[0] for poem in poems]).input_ids
    return exact(model, tokenizer, firsts, ["".join(poem.verses[1:]) for poem in poems])


def exact(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]], wanted: Sequence[str]
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
        )
    answers = tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
    return sum(answer.strip() == text for answer, text in zip(answers, wanted, strict=True))
