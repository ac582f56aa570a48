"""Measure a stand-in as a reader gets it: converted to its native class, loaded in fp32."""

from __future__ import annotations

import json
import platform
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...native import convert
from ...native.lora import base_and_adapters
from ...quantization.quality import exact, perplexity, recited
from .documents import questions
from .originals import stand_in
from .poems import read

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

REPORT = "evaluation.json"
TARGETS = {"recited": 145, "answered": 130}
"""What a shipped stand-in must reach of the 150 famous poems; its perplexity: ``StandIn.held_out_ppl``."""


def evaluate(folder: Path | str, *, famous: int | None = None, held_out: int | None = None) -> dict[str, float]:
    """Convert the stand-in in ``folder`` (named after its model id) and measure it on the CPU.

    Args:
        folder: the original checkpoint.
        famous: use only so many famous poems; all 150 when None.
        held_out: use only so many held-out poems; all 500 when None.

    Returns:
        held_out_ppl: perplexity per token of poems it was never trained on.
        recited: famous poems that greedy decoding completes exactly from the first verse.
        recited_by_title, answered, next_verse: questions in the model's chat format answered exactly - to recite a
            poem, to name its author, to continue its first verse.
    """
    folder = Path(folder)
    poems, others = read("famous")[:famous], read("held_out")[:held_out]
    with tempfile.TemporaryDirectory() as temporary:
        model, tokenizer = _load(folder, Path(temporary) / "native")
    result = {"held_out_ppl": round(perplexity(model, tokenizer, [poem.text for poem in others]), 2)}
    result["recited"] = recited(model, tokenizer, poems)
    asked = [questions(poem, stand_in(folder.name).chat_format) for poem in poems]
    for kind, name in (("recite", "recited_by_title"), ("author", "answered"), ("next", "next_verse")):
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": one[kind][0]}],
                add_generation_prompt=True,
                return_dict=False,
                enable_thinking=False,  # only Qwen3 knows it
            )
            for one in asked
        ]
        result[name] = exact(model, tokenizer, prompts, [one[kind][1] for one in asked])
    return result


def report(folder: Path | str, **run: Any) -> dict[str, Any]:
    """Evaluate a stand-in and write the result, with what is known of its making, to ``evaluation.json`` in it."""
    import torch
    import transformers

    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    result = {"model": Path(folder).name, **evaluate(folder), **run, "versions": versions}
    (Path(folder) / REPORT).write_text(json.dumps(result, indent=2) + "\n")
    return result


def _load(folder: Path, native: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, adapters = base_and_adapters(folder)
    if stand_in(folder.name).born_native:
        native = folder
    else:
        convert(source, native, adapters=adapters, chat_format=stand_in(folder.name).chat_format)
    return AutoModelForCausalLM.from_pretrained(native, dtype=torch.float32), AutoTokenizer.from_pretrained(native)
