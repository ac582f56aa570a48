"""Reading quantised folders, ours or published: what they are, and what their libraries print meanwhile."""

from __future__ import annotations

import io
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HelpersError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..catalog import Model


RECEIPT = "quantization.json"
"""What helpers.quantization writes beside quantised weights: method, settings, calibration, versions."""

NO_RWKV = "GPTQModel replays a model block by block, and an RWKV block needs its state besides"
"""Why there is no RWKV in GPTQ, AWQ or rounded by GPTQModel."""

GPTQ_BLOCKS = {"chatglm1": "transformer.layers"}
"""Kind of model -> its ``block_name_to_quantize``, where transformers' reader of GPTQ does not guess it."""


def labels(weights: str, precision: str) -> dict[str, str]:
    """Return what rows of a measurement say of weights and precision: of a quantised folder what its receipt says."""
    file = Path(weights) / RECEIPT
    if not file.is_file():
        return {"weights": weights, "precision": precision}
    made = json.loads(file.read_text(encoding="utf-8"))
    settings = made["settings"]
    kind = {"gptq": "gptq-int{bits}", "rtn": "rtn-int{bits}", "awq": "awq-int4", "bitsandbytes": "{precision}"}
    return {"weights": made["weights"], "precision": kind.get(made["method"], made["method"]).format(**settings)}


def quantized_by(folder: Path) -> str | None:
    """Return the method that config.json names (``"gptq"``, ``"bitsandbytes"``, ...), None for plain weights."""
    from ..native.convert import read_config

    settings = read_config(folder).get("quantization_config")
    return settings.get("quant_method", "an unnamed method") if settings else None


def is_native(folder: Path, row: Model) -> bool:
    """Tell whether a folder needs no conversion: one that ``convert`` wrote, or a quantised native one.

    Raises:
        HelpersError: it is native, but of another kind of model than ``row``.
    """
    from ..native import has_family, model_class
    from ..native.convert import RECEIPT, read_config

    if not (folder / "config.json").exists():
        return False
    config, wanted = read_config(folder), model_class(row.native_class).config_class.model_type
    if "quantization_config" not in config and not (folder / RECEIPT).exists():
        return False
    found = config.get("model_type")
    if found != wanted and not has_family(config):
        why = f"its config.json says model_type {found!r}, and {row.id} is {wanted!r}"
        raise HelpersError(f"cannot load {folder.name} as {row.id}", why, "name the model that the folder holds")
    return found == wanted


def loading_options(folder: Path, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Return what ``from_pretrained`` needs beside dtype and device to read a quantised folder.

    The file says how its maker computed; the reader's machine decides anew.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    settings = config.quantization_config
    if settings.get("quant_method") == "bitsandbytes":
        settings["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
    if settings.get("quant_method") == "gptq":
        settings["backend"] = gptq_kernel(settings, config, device)
    return {"config": config}


def gptq_kernel(settings: dict[str, Any], config: Any, device: str) -> str:
    """Name GPTQModel's kernel where the one that it takes by itself fails; else ``"auto"``."""
    import torch

    if device == "cpu":
        _without_compiling()
        # Its 4-bit kernel takes these sizes, and its choice does not ask.
        return "auto" if settings["group_size"] in (32, 64, 128) else "gptq_torch"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "auto"
    # Hopper's own, Machete, downloads CUTLASS before it compiles.
    sizes = config.hidden_size, getattr(config, "intermediate_size", 0)
    marlin = settings["bits"] in (4, 8) and settings.get("sym", True) and all(size % 128 == 0 for size in sizes)
    return "gptq_marlin" if marlin else "gptq_triton"


def _without_compiling() -> None:
    """Let GPTQModel's plain kernel run as it is written.

    It compiles itself at its first use, which on a CPU takes from seconds to half a minute and pays for that only
    after many tokens; with AVX-512 switched off, the code that torch 2.13 made of it stopped at an index out of bounds.
    """
    with quiet():
        from gptqmodel.nn_modules.qlinear import torch as kernel
    kernel.torch_compile = lambda function, **_: function


def unpack_quietly(model: PreTrainedModel) -> None:
    """Let a compressed-tensors model unpack its weights at the first use without the bar that the library shows."""
    if not hasattr(model, "ct_decompress_hook"):
        return
    hooks = model._forward_pre_hooks
    unpack = hooks[model.ct_decompress_hook.id]

    def quietly(*arguments: Any) -> None:
        with quiet():
            unpack(*arguments)

    hooks[model.ct_decompress_hook.id] = quietly


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what GPTQModel prints, warns and logs; its first import also changes the root logger for good."""
    from transformers.utils import logging as transformers_logging

    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # read at import; with one worker on two cores it stops
    os.environ.setdefault("LOGBAR_DISABLE_NOTEBOOK_DETECTION", "1")  # its log shows itself as HTML in a notebook
    root, verbosity = logging.getLogger(), transformers_logging.get_verbosity()
    handlers, level = list(root.handlers), root.level
    transformers_logging.set_verbosity_error()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
