"""What every method shares: where the weights come from, and a target folder that is whole or not there."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import catalog
from ..checkpoints.hub import cache_folder
from ..checkpoints.load import check_names, native_folder, pick_device, pick_dtype
from ..checkpoints.quantized import RECEIPT, quantized_by
from ..checkpoints.random import SHARD, save_random
from ..errors import HelpersError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SMALL = 10**8
"""Bytes of weights that are read in an instant: a progress bar would only clutter the page."""


@dataclass
class Job:
    """One model being quantised.

    Attributes:
        model: catalogue id, or the folder's name.
        weights: ``tiny``, ``hub``, ``random`` or ``folder``.
        source: native folder of the weights to quantise.
        folder: where to write; it becomes the target when all is well.
        device: where to compute.
        receipt: what ``quantization.json`` will say.
    """

    model: str
    weights: str
    source: Path
    folder: Path
    device: str
    receipt: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights as published, which those that are not quantised keep."""
        import torch
        from transformers import AutoConfig

        from ..native.convert import open_shard, weight_files

        said = AutoConfig.from_pretrained(self.source, local_files_only=True).dtype
        if isinstance(said, torch.dtype):
            return said
        first = open_shard(weight_files(self.source)[0]).values()
        return next(tensor.dtype for tensor in first if tensor.is_floating_point())

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type to compute in: fp32 on a CPU, the published 16 bit on a GPU (fp16 on one that has no bf16)."""
        names = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}
        return pick_dtype("auto", names[str(self.dtype)], self.device)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Load the model's tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.source, local_files_only=True)

    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Return name -> (outputs, inputs) of the matrices to quantise: all but the output layer's."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.source, local_files_only=True))
        head = empty.get_output_embeddings()
        linear = {name: module for name, module in empty.named_modules() if isinstance(module, torch.nn.Linear)}
        return {name: tuple(module.weight.shape) for name, module in linear.items() if module is not head}

    def write_receipt(self, method: str, settings: dict[str, Any], seconds: float) -> None:
        """Write ``quantization.json``: how the folder was made, with what and when."""
        self.receipt = {
            "method": method,
            "model": self.model,
            "weights": self.weights,
            "settings": settings,
            **self.receipt,
            "versions": _versions(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "seconds": round(seconds, 2),
        }
        text = json.dumps(self.receipt, indent=1, ensure_ascii=False) + "\n"
        (self.folder / RECEIPT).write_text(text, encoding="utf-8")

    def save(self, model: PreTrainedModel) -> None:
        """Write config.json and the weights: in the published type what was computed in fp32, but for the scales."""
        import torch

        for name, parameter in model.named_parameters():
            if parameter.dtype == torch.float32 and not name.endswith("_scale"):
                parameter.data = parameter.data.to(self.dtype)
        model.config.dtype = self.dtype
        model.save_pretrained(self.folder, max_shard_size=SHARD)


@contextmanager
def quantizing(
    method: str, model: str, target: Path | str, weights: str | Path, device: str, replace: bool, settings: dict
) -> Iterator[Job]:
    """Make the target folder around what the caller writes into ``job.folder``.

    On the way out the tokenizer, the generation settings and ``quantization.json`` are added and the folder gets its
    name. After any error or interruption nothing is left.

    Raises:
        HelpersError: ``target`` exists, the weights are quantised already, the disk is full, or as ``native_folder``.
    """
    from transformers.utils import logging as transformers_logging

    from ..native import register
    from ..native.convert import weight_files

    register()
    device, started = pick_device(device), time.monotonic()
    bar_was_on = transformers_logging.is_progress_bar_enabled()
    try:
        with whole_folder(target, replace) as partial:
            job = _job(model, str(weights), partial, device)
            if sum(file.stat().st_size for file in weight_files(job.source)) < SMALL:
                transformers_logging.disable_progress_bar()
            yield job
            shutil.rmtree(partial / "random", ignore_errors=True)
            _copy_rest(job)
            job.write_receipt(method, settings, time.monotonic() - started)
    finally:
        if bar_was_on:
            transformers_logging.enable_progress_bar()


@contextmanager
def whole_folder(target: Path | str, replace: bool = False) -> Iterator[Path]:
    """Give a folder to write into, which gets the target's name when all went well; else nothing is left of it.

    Args:
        target: folder to make.
        replace: take the place of an earlier result, which stays until this one is whole.

    Raises:
        HelpersError: ``target`` exists, or the disk is full.
    """
    target = Path(target)
    _check_target(target, replace)
    partial, earlier = (target.with_name(f"{target.name}.{word}") for word in ("partial", "earlier.partial"))
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        partial.mkdir()
        yield partial
        if target.exists():  # keep the earlier result until this one is in its place
            shutil.rmtree(earlier, ignore_errors=True)
            target.rename(earlier)
        partial.rename(target)
        shutil.rmtree(earlier, ignore_errors=True)
    except BaseException as error:  # an interruption too
        shutil.rmtree(partial, ignore_errors=True)
        if _disk_is_full(error):
            free = shutil.disk_usage(target.parent).free
            why = f"the disk is full: {free / 1e9:.2f} GB are free"
            raise HelpersError(
                f"cannot write {target.name}", why, "free some space, or name a target elsewhere"
            ) from None
        raise


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """Make a folder for models that are made on the way; it is gone with the object.

    It lies in ``cache_folder()``: the system's folder for such things may be RAM, and a 7B model is 15 GB.
    """
    cache_folder().mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix="scratch-", dir=cache_folder())


def _check_target(target: Path, replace: bool) -> None:
    """Refuse to overwrite anything but, where asked to, an earlier result."""
    if not target.exists():
        return
    if not replace:
        raise HelpersError(f"will not overwrite {target.name}", "it exists", "name another target, or set replace=True")
    if not (target / RECEIPT).exists():
        why = f"it holds no {RECEIPT}, so it is not the result of an earlier run"
        raise HelpersError(f"will not replace {target.name}", why, "name a folder that does not exist yet")


def _job(model: str, weights: str, partial: Path, device: str) -> Job:
    """Find or make the native folder to start from."""
    if model not in catalog.models() and Path(model).is_dir():
        name, kind, source = Path(model).name, "folder", Path(model)
    else:
        catalog.model(model)  # raises for an unknown one
        check_names(weights, "auto")
        name, kind = model, weights if weights in ("tiny", "hub", "random") else "folder"
        source = partial / "random" if weights == "random" else native_folder(model, weights)
        if weights == "random":
            save_random(catalog.model(model), source, device)
            _copy_small(native_folder(model, "tiny"), source)
    method = quantized_by(source)
    if method:
        why = f"its weights are quantised already, by {method}"
        raise HelpersError(f"cannot quantise {source.name}", why, "start from the 16-bit checkpoint")
    return Job(name, kind, source, partial, device)


def _copy_rest(job: Job) -> None:
    """Add the tokenizer and the generation settings, as they lie beside the source's weights."""
    source = native_folder(job.model, "tiny") if job.weights == "random" else job.source
    _copy_small(source, job.folder)


def _copy_small(source: Path, target: Path) -> None:
    """Copy a native folder's files but weights, config.json and records of how it was made."""
    from ..native.convert import RECEIPT as CONVERSION

    skipped = {"config.json", CONVERSION, RECEIPT, "evaluation.json"}
    for file in source.iterdir():
        weights = file.suffix in (".safetensors", ".bin", ".pth") or file.name.endswith(".index.json")
        if file.is_file() and not weights and file.name not in skipped:
            shutil.copyfile(file, target / file.name)


def _versions() -> dict[str, str]:
    names = ["torch", "transformers", "bitsandbytes", "gptqmodel", "compressed-tensors", "auto-gptq"]
    installed = {dist.metadata["Name"].lower().replace("_", "-"): dist.version for dist in metadata.distributions()}
    return {name: installed[name] for name in names if name in installed}


def _disk_is_full(error: BaseException | None) -> bool:
    """Look for ENOSPC in an error and in what it was raised from: safetensors and GPTQModel wrap it."""
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
