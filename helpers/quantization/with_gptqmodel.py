"""GPTQModel, the successor of AutoGPTQ: GPTQ, AWQ and, to compare with, plain rounding to nearest.

Sources: GPTQ arXiv 2210.17323, AWQ arXiv 2306.00978, https://github.com/ModelCloud/GPTQModel (7.6.0).
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from ..checkpoints.quantized import GPTQ_BLOCKS, NO_RWKV, quiet
from ..checkpoints.random import SHARD
from ..errors import HelpersError, unknown
from .calibration import Text, calibrate
from .folder import Job, quantizing

BITS = [2, 3, 4, 8]
GROUP_SIZES = [-1, 16, 32, 64, 128]
"""Weights that share a scale; -1 for a whole row."""


def gptq(
    model: str,
    target: Path | str,
    *,
    weights: str | Path = "tiny",
    bits: int = 4,
    group_size: int = 32,
    desc_act: bool = False,
    sym: bool = True,
    damp: float = 0.05,
    calibration: Text = None,
    samples: int = 256,
    device: str = "auto",
    replace: bool = False,
) -> Path:
    """Quantise a model by GPTQ: round column by column, the columns left making up for each error.

    Args:
        model: catalogue id, or the path of a native folder.
        target: folder to make.
        weights: ``"tiny"``, ``"hub"``, ``"random"``, or the path of a published or native folder.
        bits: 2, 3, 4 or 8.
        group_size: weights that share a scale: 16, 32, 64, 128, or -1 for a row. It has to divide every row.
        desc_act: take columns by falling activation; better, and slower to run.
        sym: no zero points, which fast kernels (Marlin) ask for; at 3 bits and below, False is much better.
        damp: part of the mean of the Hessian's diagonal that is added to it.
        calibration: texts, the path of a text file, or None for the shipped poems.
        samples: texts used at most.
        device: as ``load``.
        replace: overwrite the result of an earlier run.

    Returns:
        ``target``, which ``load(model, weights=target)`` and ``GPTQModel.load(target)`` read.

    Raises:
        HelpersError: unknown bits or group size, an architecture that cannot be done (RWKV), too little calibration
            text, or as ``quantizing``.
    """
    check_bits(bits, group_size)
    settings = {"bits": bits, "group_size": group_size, "desc_act": desc_act, "sym": sym, "damp": damp}
    with quantizing("gptq", model, target, weights, device, replace, settings) as job:
        # GPTQModel's default without desc_act: whole groups change places, which costs no speed.
        options = {"desc_act": desc_act, "damp_percent": damp, "act_group_aware": group_size > 0 and not desc_act}
        _run(job, "GPTQConfig", bits, group_size, sym, calibrate(job, calibration, samples), options)
    return Path(target)


def awq(
    model: str,
    target: Path | str,
    *,
    weights: str | Path = "tiny",
    bits: int = 4,
    group_size: int = 32,
    sym: bool = False,
    calibration: Text = None,
    samples: int = 256,
    device: str = "auto",
    replace: bool = False,
) -> Path:
    """Quantise a model by AWQ: scale up the input channels that matter, then round. Arguments as ``gptq``; 4 bit."""
    check_bits(bits, group_size, [4])
    settings = {"bits": bits, "group_size": group_size, "sym": sym}
    with quantizing("awq", model, target, weights, device, replace, settings) as job:
        _run(job, "AWQConfig", bits, group_size, sym, calibrate(job, calibration, samples), {})
    return Path(target)


def rtn(
    model: str,
    target: Path | str,
    *,
    weights: str | Path = "tiny",
    bits: int = 4,
    group_size: int = 32,
    sym: bool = True,
    device: str = "auto",
    replace: bool = False,
) -> Path:
    """Round a model's weights to nearest, in GPTQ's format: what GPTQ has to beat. Arguments as ``gptq``."""
    check_bits(bits, group_size)
    settings = {"bits": bits, "group_size": group_size, "sym": sym}
    with quantizing("rtn", model, target, weights, device, replace, settings) as job:
        _run(job, "RTNConfig", bits, group_size, sym, None, {})
    return Path(target)


def check_bits(bits: int, group_size: int, valid: list[int] = BITS) -> None:
    """Raise HelpersError for bits or a group size that GPTQ has no form for."""
    if bits not in valid:
        raise unknown("bits", bits, [str(one) for one in valid])
    if group_size not in GROUP_SIZES:
        raise unknown("group_size", group_size, [str(one) for one in GROUP_SIZES])


def _run(
    job: Job, kind: str, bits: int, group_size: int, sym: bool, ids: list[list[int]] | None, options: dict[str, Any]
) -> None:
    """Quantise ``job.source`` into ``job.folder`` as GPTQModel's config class ``kind`` says; RTN has no ids."""
    import torch
    from tqdm.auto import tqdm

    linear, awq = job.linear_layers(), kind == "AWQConfig"
    _check_model(job, linear, group_size, awq)
    dtype = job.compute_dtype
    if awq and dtype == torch.float32:  # its packing takes 16 bit only
        dtype = torch.float16 if job.dtype == torch.float32 else job.dtype
    rows = ids and [{"input_ids": one, "attention_mask": [1] * len(one)} for one in ids]
    blocks = len({name.split(".layers.")[1].split(".")[0] for name in linear})
    logs = job.folder / "logs"
    bar = tqdm(total=blocks, desc="quantising", unit="layer", delay=5, disable=job.weights == "tiny")
    try:
        with quiet():
            library = _library()
            library.looper.loop_processor._PROJECT_LOG_DIR = logs  # else a folder logs/ where the reader works
            config = getattr(library.quantization.config, kind)
            settings = config(bits=bits, group_size=group_size, sym=sym, offload_to_disk=False, **options)
            model = library.GPTQModel.load(str(job.source), settings, device=job.device, dtype=dtype)
            model.layer_callback = lambda layer_idx, submodule_finalized: submodule_finalized and bar.update()
            # On a CPU AWQ's default is a kernel that needs CUDA, although it only packs here.
            backend = library.BACKEND.AWQ_TORCH if awq else library.BACKEND.AUTO
            model.quantize(rows, batch_size=8, backend=backend)
            if dtype != job.dtype:
                _to_published(model.model, job.dtype)
            model.save(str(job.folder), max_shard_size=SHARD)
    finally:
        bar.close()
        shutil.rmtree(logs, ignore_errors=True)
    _mend_config(job)


def _check_model(job: Job, linear: dict[str, tuple[int, int]], group_size: int, awq: bool) -> None:
    if any(name.startswith("rwkv.") for name in linear):
        raise HelpersError(f"cannot quantise {job.model} by GPTQModel", NO_RWKV, "take bitsandbytes, which does RWKV")
    if awq and any(name.startswith("transformer.") for name in linear):
        why = "AWQ moves scales into the norms, and ChatGLM-6B reads its norms' output beside the matrices too"
        raise HelpersError(f"cannot quantise {job.model} by AWQ", why, "take gptq or bitsandbytes")
    for name, (_, inputs) in linear.items():
        if group_size > 0 and inputs % group_size:
            why = f"{name} has rows of {inputs} weights, which {group_size} does not divide"
            fits = [str(size) for size in GROUP_SIZES if size < 0 or all(i % size == 0 for _, i in linear.values())]
            raise HelpersError(f"cannot take group_size {group_size}", why, f"take {' or '.join(fits)}")


@cache
def _library() -> ModuleType:
    """Import GPTQModel (10 s) and tell it of the models of ours that it does not know."""
    try:
        import gptqmodel
        import gptqmodel.looper.loop_processor
        import gptqmodel.quantization.config
    except ImportError as error:
        why = f"the package gptqmodel cannot be imported ({error})"
        raise HelpersError("cannot quantise by GPTQModel", why, "run pip install gptqmodel optimum") from None
    from gptqmodel.utils.threadx import _DeviceWorker

    # An error in a worker thread would end the whole process, a notebook's kernel, at once (os._exit). It is handed
    # to the waiting thread as well, which raises it.
    _DeviceWorker._abort_process = lambda self, error: None
    from defuser.model_registry import MODEL_CONFIG
    from gptqmodel.models import auto
    from gptqmodel.models.base import BaseQModel
    from gptqmodel.models.definitions.llama import LlamaQModel

    class Glm(BaseQModel):
        """GLM as transformers has it: gate and up projection are one matrix."""

        pre_lm_head_norm_module = "model.norm"
        # AWQ scales a matrix through the one before it, which here has another number of outputs.
        awq_scale_optimize_shape_dependent_modules: ClassVar = ["self_attn.o_proj", "mlp.down_proj"]
        module_tree = _tree("model", "self_attn", ("q_proj:0", "k_proj:0", "v_proj:0", "o_proj:1"), "gate_up_proj")

    class ChatGLM1(BaseQModel):
        """The first ChatGLM-6B."""

        pre_lm_head_norm_module = "transformer.final_layernorm"
        module_tree = _tree(
            "transformer", "attention", ("query_key_value:0", "dense:1"), "dense_h_to_4h", "dense_4h_to_h"
        )

        def prepare_layer_replay_kwargs(
            self, layer: Any, layer_input: Any, additional_inputs: dict[str, Any], target_device: Any
        ) -> dict[str, Any]:
            """Leave out the arguments that a block of ours does not have."""
            return {name: additional_inputs[name] for name in ("mask", "angles")} | {"past_key_values": None}

    # Else the library cuts gate_up_proj in two while loading and saves two, which transformers' GLM cannot read.
    MODEL_CONFIG.pop("glm", None)
    added = {"glm": Glm, "chatglm1": ChatGLM1, "alibi_llama": LlamaQModel}
    auto.MODEL_MAP.update(added)
    auto.SUPPORTED_MODELS.extend(name for name in added if name not in auto.SUPPORTED_MODELS)
    return gptqmodel


def _tree(root: str, attention: str, matrices: tuple[str, ...], up: str, down: str = "down_proj") -> list[Any]:
    """Describe a block to GPTQModel: ``:!`` is not quantised, and what has a number waits for the lower ones."""
    norms = {name: (f"{name}:!",) for name in ("input_layernorm", "post_attention_layernorm")}
    block = {"input_layernorm": norms["input_layernorm"], attention: matrices}
    block |= {"post_attention_layernorm": norms["post_attention_layernorm"], "mlp": (f"{up}:0", f"{down}:1")}
    return [root, "layers", "#", block]


def _to_published(model: Any, dtype: Any) -> None:
    """Bring what was not quantised back to the type it was published in."""
    import torch

    for parameter in model.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _mend_config(job: Job) -> None:
    """Say in config.json which blocks are quantised, which transformers' reader only guesses for known names."""
    file = job.folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if config["model_type"] in GPTQ_BLOCKS:
        config["quantization_config"]["block_name_to_quantize"] = GPTQ_BLOCKS[config["model_type"]]
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
