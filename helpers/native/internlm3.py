"""InternLM3 -> ``LlamaForCausalLM``.

InternLM3 is Llama under a name of its own: the tensors have Llama's names and layout, and config.json says ``qkv_bias``
for the query, key and value projections and ``bias`` for all others. Its tokenizer is InternLM2's, with a larger model.

Source: modelling code and config.json of internlm/internlm3-8b-instruct.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from . import internlm2, llama
from .family import Family, Original, need, refuse_unless
from .rules import Rule

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast


def config(original: Original) -> LlamaConfig:
    """Translate config.json; Llama has one switch for the biases of all four projections of attention."""
    refuse_unless(original, "qkv_bias", need(original, "bias"), default=False)
    return llama.config(_as_llama(original))


def rules(original: Original) -> list[Rule]:
    """Table of tensors: every name stays."""
    return llama.rules(_as_llama(original))


def tokenizer(folder: Path, original: Original, chat_format: str) -> PreTrainedTokenizerFast:
    """Build the tokenizer: SentencePiece, whose last six pieces are the chat marks."""
    return internlm2.tokenizer(folder, original, chat_format)


def _as_llama(original: Original) -> Original:
    return original | {"attention_bias": original["bias"], "mlp_bias": original["bias"]}


FAMILY = Family("internlm3", "LlamaForCausalLM", "internlm3", config, rules, tokenizer)
