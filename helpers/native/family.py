"""What the converter needs to know about a family, and how a family reads its config.json."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HelpersError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from .rules import Rule

Original = dict[str, Any]
"""An original config.json, read as plain JSON."""


@dataclass(frozen=True)
class Family:
    """One architecture, from its original form to a class of today's transformers.

    Attributes:
        model_type: ``model_type`` in the original config.json.
        native_class: name of the class the result loads as, where ``config`` names no other in ``architectures``.
        chat_format: the chat template used when the caller names none.
        config: original config -> native config; refuses what the native class cannot express.
        rules: original config -> the table of tensors.
        tokenizer: original folder, config and chat format -> a tokenizer.
        vocabulary: names that the tokenizer's file may have.
        shared: number of rows of models whose vocabulary is the same everywhere, and so not needed in the folder.
        known_by: key of the original config.json that tells this family from others of its ``model_type``.
    """

    model_type: str
    native_class: str
    chat_format: str
    config: Callable[[Original], PreTrainedConfig]
    rules: Callable[[Original], list[Rule]]
    tokenizer: Callable[[Path, Original, str], PreTrainedTokenizerBase]
    vocabulary: tuple[str, ...] = ("tokenizer.model",)
    shared: int | None = None
    known_by: str | None = None

    def matches(self, original: Original) -> bool:
        """Tell whether an original config.json is of this family."""
        return original.get("model_type") == self.model_type and (self.known_by is None or self.known_by in original)

    def stops(self, tokenizer: PreTrainedTokenizerBase, chat_format: str) -> list[int]:
        """Return the ids that end an answer: the end of the text, and the marks that end a turn of the chat."""
        from .chat_templates import STOP_TOKENS

        ids = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(STOP_TOKENS.get(chat_format, []))]
        return sorted(set(ids) - {None, tokenizer.unk_token_id})


def need(original: Original, *keys: str) -> Any:
    """Return ``original[key]`` for the first of ``keys`` that is there; some families renamed a key over time."""
    for key in keys:
        if key in original:
            return original[key]
    raise HelpersError(
        "cannot convert this checkpoint",
        f"its config.json has no {' or '.join(repr(key) for key in keys)}",
        "take the original config.json from the model's own repository",
    )


def refuse_unless(original: Original, key: str, *allowed: Any, default: Any) -> None:
    """Refuse a setting that the native class cannot express, naming field and value."""
    value = original.get(key, default)
    if value not in allowed:
        raise HelpersError(
            "cannot convert this checkpoint",
            f"config.json says {key}={value!r}, and only {' or '.join(map(repr, allowed))} can be converted exactly",
            "use a checkpoint of the published architecture",
        )


def rope(theta: float, **more: Any) -> dict[str, Any]:
    """Return transformers' description of rotary positions with base ``theta``."""
    return {"rope_type": "default", "rope_theta": float(theta), **more}


def llama_layers(source: str = "model.layers.{i}.", target: str = "model.layers.{i}.") -> list[tuple[str, str]]:
    """Pair the names that Llama-like originals and LlamaForCausalLM share in a layer, the attention input left out."""
    names = ["self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    names += ["input_layernorm", "post_attention_layernorm"]
    return [(f"{source}{name}.weight", f"{target}{name}.weight") for name in names]


def qkv(layer: str = "model.layers.{i}.self_attn.", kind: str = "weight") -> list[str]:
    """Name the native query, key and value tensors of a layer."""
    return [f"{layer}{part}_proj.{kind}" for part in ("q", "k", "v")]


def check_length(model: PreTrainedModel, tokens: int) -> None:
    """Refuse a sequence of ``tokens`` (prompt and answer together) that the model was not made for.

    transformers only warns, and past that length the answers turn to noise; Qwen v1 as published goes on with
    dynamic NTK and log-n scaling, which its native class does not have.

    Raises:
        HelpersError: ``tokens`` is larger than the config's ``max_position_embeddings``.
    """
    limit = model.config.max_position_embeddings
    if tokens > limit:
        raise HelpersError(
            f"{tokens} tokens are too many",
            f"this model's context ends at {limit} tokens, prompt and answer together",
            "shorten the prompt or lower max_new_tokens",
        )
