"""Talk to a loaded model: a whole answer, an answer as it is written, or the continuation of a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .errors import HelpersError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Messages = str | list[dict[str, Any]]
"""One user turn, or turns such as ``{"role": "user", "content": "你好"}``."""

MAX_NEW_TOKENS = 256


def chat(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    template: Mapping[str, Any] | None = None,
    **generate: Any,
) -> str:
    """Return the model's answer.

    Args:
        model: as ``load`` returns it.
        tokenizer: the model's own; its chat template turns the messages into a prompt.
        messages: one user turn as a string, or a list of turns.
        template: passed to the chat template, e.g. ``{"enable_thinking": False}`` (Qwen3) or ``{"tools": [...]}``.
        generate: passed to ``model.generate``. Default: at most 256 new tokens, always the likeliest one.

    Raises:
        HelpersError: the tokenizer has no chat template, the template refuses the messages (a role that its model
            does not know), or prompt and answer would not fit into the model's context.
    """
    return _generate(model, tokenizer, _prompt(tokenizer, messages, template), **_stops(tokenizer) | generate)


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    template: Mapping[str, Any] | None = None,
    **generate: Any,
) -> str:
    """Print the model's answer as it is written, and return it; arguments and errors as ``chat``."""
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    settings = {"streamer": streamer} | _stops(tokenizer) | generate
    return _generate(model, tokenizer, _prompt(tokenizer, messages, template), **settings)


def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, **generate: Any) -> str:
    """Return how the model continues ``text``, without ``text`` itself: what base models are made for.

    Raises:
        HelpersError: text and continuation would not fit into the model's context.
    """
    return _generate(model, tokenizer, tokenizer(text, return_tensors="pt"), **generate)


def _prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages, template: Mapping[str, Any] | None) -> Any:
    """Return ``input_ids`` and ``attention_mask`` [1, tokens] of a conversation, ready for the answer."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        why = "its tokenizer has no chat template: this is a base model, which continues texts"
        raise HelpersError("cannot chat with this model", why, "call complete(model, tokenizer, text)")
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    try:
        return tokenizer.apply_chat_template(turns, **options, **(template or {}))
    except TemplateError as error:
        why = " ".join(str(error).split())
        raise HelpersError("cannot write these messages as a prompt", why, "change the messages' roles") from None


def _stops(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what ``generate`` needs where a text ends an answer and not a token (RWKV)."""
    stops = getattr(tokenizer, "stop_strings", None)
    return {"stop_strings": stops} if stops else {}


def _generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Any, **generate: Any) -> str:
    """Generate from a prompt of [1, tokens] and decode what is new."""
    import torch

    from .native import check_length

    settings = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False} | generate
    if "stop_strings" in settings:  # generate looks for them in the decoded text
        settings["tokenizer"] = tokenizer
    ids = prompt["input_ids"].to(model.device)
    check_length(model, ids.shape[1] + settings["max_new_tokens"])
    mask = prompt["attention_mask"].to(model.device)
    with torch.inference_mode():
        output = model.generate(input_ids=ids, attention_mask=mask, **settings)
    # Some models begin or end an answer with a line break of their format (ChatGLM3, Llama2-Chinese).
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
