"""AutoGPTQ 0.7.1, archived in April 2025, by which most GPTQ checkpoints of these models were made.

It runs in an environment of its own (``make autogptq``), with transformers 4, and quantises on a GPU only.

Source: https://github.com/AutoGPTQ/AutoGPTQ, ``modeling/_base.py``.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import HelpersError
from ..native.convert import read_config
from .calibration import Text, calibrate
from .folder import Job, whole_folder
from .legacy import link_file, older_config
from .with_gptqmodel import check_bits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CUDA = ".venv-autogptq/bin/uv pip install --python .venv-autogptq/bin/python torch==2.11.0"
"""Puts a PyTorch for CUDA (13.0) in the place of the CPU build that ``make autogptq`` installs; 3 GB."""


def autogptq(
    native: Path | str,
    target: Path | str,
    *,
    bits: int = 4,
    group_size: int = 128,
    desc_act: bool = False,
    calibration: Text = None,
    samples: int = 256,
    replace: bool = False,
) -> Path:
    """Quantise a native folder by AutoGPTQ, on a GPU, in an environment that has it.

    Args:
        native: folder of a Llama or a Qwen2, as ``native_folder`` makes it.
        target, bits, group_size, desc_act, calibration, samples, replace: as ``gptq``.

    Returns:
        ``target``: what AutoGPTQ wrote, with the tokenizer and ``quantization.json`` beside it. ``upgrade`` brings it
        to today's form.

    Raises:
        HelpersError: unknown bits or group size, no AutoGPTQ or no GPU, no native folder or one that names code, too
            little calibration text, the target exists, or the disk is full.
    """
    import torch

    check_bits(bits, group_size)
    native, what = Path(native), "cannot quantise by AutoGPTQ"
    try:
        from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
    except ImportError:
        raise HelpersError(what, "it is not in this environment", "run make autogptq, take .venv-autogptq") from None
    if not torch.cuda.is_available():
        fix = f"use a GPU and run {CUDA}; or take gptq, which quantises on a CPU too"
        raise HelpersError(what, "it needs CUDA, and PyTorch finds none here", fix)
    config = read_config(native)
    if "auto_map" in config:  # AutoGPTQ lets it run, whatever it is asked for
        raise HelpersError(what, f"config.json of {native.name} names code", "convert the folder first")
    started, settings = time.monotonic(), {"bits": bits, "group_size": group_size, "desc_act": desc_act}
    with whole_folder(target, replace) as folder:
        job = _Job(native.name, "folder", native, folder, "cuda")
        ids = calibrate(job, calibration, samples)
        older = folder / "older"  # in the words of transformers 4, which else takes another base of the positions
        shutil.copytree(native, older, copy_function=link_file)
        (older / "config.json").write_text(json.dumps(older_config(config)), encoding="utf-8")
        kept = BaseQuantizeConfig(**settings)
        model = AutoGPTQForCausalLM.from_pretrained(str(older), kept, torch_dtype=torch.float16)
        model.quantize([{"input_ids": one, "attention_mask": [1] * len(one)} for one in ids])
        model.quantize_config.model_name_or_path = native.name  # and no path of this machine
        model.save_quantized(str(folder))
        shutil.rmtree(older)
        for file in native.glob("tokenizer*.json"):
            shutil.copy(file, folder)
        job.write_receipt("autogptq", settings, time.monotonic() - started)
    return Path(target)


class _Job(Job):
    """A job whose tokenizer transformers 4 can read: from its file, as it does not know the class that 5 names."""

    def tokenizer(self) -> PreTrainedTokenizerFast:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(tokenizer_file=str(self.source / "tokenizer.json"))
