"""Engines other than transformers and vLLM: llama.cpp, CTranslate2, MNN, and a comparison of all that run on a CPU.

Most of them live in an environment of their own, ``.venv-frameworks`` (``make frameworks``), so nothing is imported
here: a notebook takes what it needs from ``helpers.frameworks.llama_cpp``, ``.ctranslate2``, ``.mnn``
or ``.compare``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy import ndarray
    from transformers import PreTrainedTokenizerFast


def perplexity_of(
    logits_of: Callable[[list[int]], ndarray], tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]
) -> float:
    """Return the perplexity per token of texts, counted as ``helpers.quantization.perplexity`` does.

    Args:
        logits_of: from the ids of a text to the logits after each of them, [tokens, vocabulary]: ``Gguf.logits``,
            ``Mnn.logits``.
        tokenizer: the native folder's, so that every engine counts the same tokens. Those that open every text
            (``<s>``, or ChatGLM's two) are read, not counted.
        texts: each shorter than the engine's context.
    """
    import numpy as np

    opening = tokenizer("").input_ids
    first = max(1, len(opening))
    total = count = 0
    for text in texts:
        ids = [*opening, *tokenizer(text, add_special_tokens=False).input_ids]
        if len(ids) <= first:
            continue
        logits = logits_of(ids)[first - 1 : -1].astype(np.float64)
        largest = logits.max(axis=1, keepdims=True)
        chosen = logits[np.arange(len(logits)), ids[first:]] - largest[:, 0]
        total -= (chosen - np.log(np.exp(logits - largest).sum(axis=1))).sum()
        count += len(logits)
    return math.exp(total / count)
