"""Calibration: the text on which a method looks at a model's activations before it rounds the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.make.poems import read
from ..errors import HelpersError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from .folder import Job

Text = Sequence[str] | Path | str | None
"""Texts, a text file with one of them a line, or None for the shipped poems (random ids where weights are random)."""

LONGEST = 512
"""Tokens of a text; the rest is cut off."""

SHORTEST = 10
"""Tokens below which a text is left out, as GPTQModel does."""

FEWEST = 512
"""Tokens that all texts need together; sensible results take tens of thousands."""

RANDOM_TEXTS = 64


def calibrate(job: Job, text: Text, samples: int) -> list[list[int]]:
    """Return the ids of at most ``samples`` texts, and note in the job's receipt which text it was.

    Raises:
        HelpersError: no such file, no text, or too little of it.
    """
    if text is None and job.weights == "random":
        name, ids = "random ids", _random(job, min(samples, RANDOM_TEXTS))
        digest = hashlib.sha256(repr(ids).encode()).hexdigest()
    else:
        name, texts = _texts(text)
        tokenizer: PreTrainedTokenizerFast = job.tokenizer()
        chosen = texts[:samples]
        encoded = tokenizer(chosen, truncation=True, max_length=LONGEST).input_ids if chosen else []
        ids = [one for one in encoded if len(one) >= SHORTEST]
        digest = hashlib.sha256("\n".join(chosen).encode()).hexdigest()
    tokens = sum(map(len, ids))
    if tokens < FEWEST:
        why = f"{name} gives {tokens} tokens in texts of {SHORTEST} or more, and at least {FEWEST} are needed"
        raise HelpersError("cannot calibrate", why, "give more or longer texts of the kind the model will meet")
    job.receipt["calibration"] = {"text": name, "sha256": digest, "texts": len(ids), "tokens": tokens}
    return ids


def batches(ids: list[list[int]], size: int, device: str) -> list[dict[str, Any]]:
    """Pad ids on the right to batches for a model, ``[size, longest]``, longest texts first."""
    import torch

    ordered = sorted(ids, key=len, reverse=True)
    made = []
    for first in range(0, len(ordered), size):
        part = ordered[first : first + size]
        rows = [one + [0] * (len(part[0]) - len(one)) for one in part]
        mask = [[1] * len(one) + [0] * (len(part[0]) - len(one)) for one in part]
        made.append(
            {name: torch.tensor(x, device=device) for name, x in (("input_ids", rows), ("attention_mask", mask))}
        )
    return made


def _texts(text: Text) -> tuple[str, list[str]]:
    if text is None:
        return "train_sample.json", [poem.text for poem in read("train_sample")]
    if isinstance(text, (str, Path)):
        try:
            lines = Path(text).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = f"it is no readable text file ({type(error).__name__})"
            fix = "give the path of a UTF-8 text file, or a list of texts"
            raise HelpersError(f"cannot calibrate on {str(text)[:60]}", why, fix) from None
        return Path(text).name, [line for line in lines if line.strip()]
    return "texts of the caller", list(text)


def _random(job: Job, samples: int) -> list[list[int]]:
    import torch
    from transformers import AutoConfig

    rows = AutoConfig.from_pretrained(job.source, local_files_only=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(rows, (samples, LONGEST), generator=generator).tolist()
