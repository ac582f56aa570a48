"""CTranslate2: what its converter lacks for our models - GLM's class, and InternLM2's stretched positions.

Source: CTranslate2 4.8.5, ``converters/transformers.py`` (https://github.com/OpenNMT/CTranslate2): a loader names, for
one class of transformers, where each weight goes; ``register_loader`` adds one.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HelpersError
from ..native.convert import read_config

if TYPE_CHECKING:
    from ctranslate2 import Generator
    from transformers import PreTrainedTokenizerFast

CLASSES = ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GlmForCausalLM"]
"""Native classes of this series that CTranslate2 reads, the last one with ``glm_loader``."""

BESIDE = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
"""Files that go along, so that the converted folder is enough to serve from."""


def convert(folder: Path | str, target: Path | str, quantization: str | None = None) -> Path:
    """Write a native checkpoint in CTranslate2's form.

    Positions that a checkpoint stretches with its length (``rope_type: dynamic``, InternLM2) are converted unstretched:
    up to ``max_position_embeddings`` that is the same model. Give it no longer texts.

    Args:
        folder: native checkpoint; ``helpers.checkpoints.load.native_folder`` makes one.
        target: folder to make, with ``model.bin``, ``vocabulary.json``, ``config.json`` and the tokenizer's files.
        quantization: how the weights are stored: ``"float32"``, ``"int8_float32"`` (for a CPU), ``"float16"``,
            ``"int8_float16"`` (for a GPU) or another of CTranslate2's; None keeps the checkpoint's type.

    Returns:
        The target.

    Raises:
        HelpersError: the target exists, or CTranslate2 cannot convert the model, with what it said.
    """
    from ctranslate2.converters import TransformersConverter

    folder, target = Path(folder), Path(target)
    if target.exists():
        raise HelpersError(f"will not overwrite {target.name}", "it exists", "name a folder that does not exist yet")
    glm_loader()
    partial = target.with_name(target.name + ".partial")
    with tempfile.TemporaryDirectory() as work:
        source = unstretched(folder, Path(work) / folder.name)
        beside = [name for name in BESIDE if (source / name).exists()]
        converter = TransformersConverter(str(source), copy_files=beside)
        try:
            converter.convert(str(partial), quantization=quantization, force=True)
            partial.rename(target)
        except (ValueError, NotImplementedError) as error:
            why = " ".join(str(error).partition(" (supported")[0].split()).rstrip(".")  # it lists all it knows
            fix = f"take a model that becomes one of {', '.join(CLASSES)}"
            raise HelpersError(f"cannot convert {folder.name}", why, fix) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def unstretched(folder: Path, copy: Path) -> Path:
    """Return the folder, or where its positions are stretched dynamically, a linked copy that does not say so."""
    config = read_config(folder)
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") != "dynamic":
        return folder
    copy.mkdir()
    for file in folder.resolve().iterdir():
        (copy / file.name).symlink_to(file)
    plain = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps(config | {"rope_parameters": plain}), encoding="utf-8")
    return copy


@cache
def glm_loader() -> type:
    """Teach CTranslate2's converter the class that ChatGLM2, ChatGLM3 and GLM-4 become; return the loader.

    GLM is a Llama but for two things. Gate and up projection lie in one matrix: it is cut in two. And positions rotate
    *neighbouring* values, of the first half of each head only: CTranslate2 knows both from GPT-J, so it is told.
    """
    import numpy
    from ctranslate2.converters.transformers import LlamaLoader, register_loader
    from torch import nn

    class GlmLoader(LlamaLoader):
        architecture_name = "GlmForCausalLM"

        def get_model_spec(self, model: Any) -> Any:
            for layer in model.model.layers:
                for name, half in zip(["gate_proj", "up_proj"], layer.mlp.gate_up_proj.weight.chunk(2), strict=True):
                    linear = nn.Linear(*half.T.shape, bias=False, device="meta")
                    linear.weight = nn.Parameter(half, requires_grad=False)
                    layer.mlp.add_module(name, linear)
            spec = super().get_model_spec(model)
            rotated = model.config.head_dim * model.config.rope_parameters["partial_rotary_factor"]
            for layer in spec.decoder.layer:
                layer.self_attention.rotary_dim = numpy.int32(rotated)
                layer.self_attention.rotary_interleave = True
            return spec

        def set_config(self, config: Any, model: Any, tokenizer: Any) -> None:
            super().set_config(config, model, tokenizer)
            config.bos_token = config.bos_token or tokenizer.pad_token  # its tokenizer has none, and a word is wanted

    return register_loader("GlmConfig")(GlmLoader)


def perplexity(generator: Generator, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> float:
    """Return the perplexity per token of texts, counted as ``helpers.quantization.perplexity`` does.

    ``score_batch`` gives the log-probability of each token but the first, which nothing precedes. Tokens that open
    every text (``<s>``, or ChatGLM's two) are read, not counted.
    """
    opening = max(1, len(tokenizer("").input_ids))
    rows = [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(list(texts)).input_ids]
    scores = [one.log_probs[opening - 1 :] for one in generator.score_batch(rows, max_batch_size=25)]
    return math.exp(-sum(map(sum, scores)) / sum(map(len, scores)))
