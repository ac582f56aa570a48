"""Before anything is downloaded or loaded: what the run needs, what this machine has, whether it fits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import catalog
from ..checkpoints.adapters import base_is_missing
from ..checkpoints.hub import cache_folder, fetched
from ..checkpoints.load import check_names, pick_device, pick_dtype, tiny_folder
from ..checkpoints.quantized import quantized_by
from ..errors import HelpersError
from ..report.table import Table
from .parts import CACHED, GIB, Setting, memory
from .shapes import Sized, from_config

if TYPE_CHECKING:
    from ..catalog import Model

RUNTIME_RAM = {"cuda": 2 * GIB, "cpu": GIB // 2}
"""RAM of Python with PyTorch and transformers beside the model; on a GPU with the CUDA libraries and a context.

On a CPU the stand-ins' runs took this much. What the C library keeps of freed blocks is not counted: it was a GiB where
a small model's matrices (of less than 32 MiB, larger ones go back at once) were quantised one after another."""

BY_GPTQMODEL = ("gptq", "awq", "rtn")
"""Methods of helpers.quantization that keep the 16-bit model in RAM and bring it to the GPU block by block."""

LARGEST_SHARD = 10 * 10**9
"""Assumed of a published checkpoint's largest file where the catalogue does not say: transformers' limit until October
2023 (https://github.com/huggingface/transformers/pull/26942). Some were saved whole, and are larger."""

FITS, TOO_SMALL, NOT_NEEDED = "fits", "does not fit", "not needed"


@dataclass(frozen=True)
class Need:
    """One thing a run needs, in bytes; ``have`` is None where nothing is needed."""

    what: str
    need: float
    have: float | None

    @property
    def verdict(self) -> str:
        """``FITS``, ``TOO_SMALL`` or ``NOT_NEEDED``."""
        if self.have is None:
            return NOT_NEEDED
        return FITS if self.need <= self.have else TOO_SMALL


@dataclass(frozen=True)
class Preflight:
    """The result: displays as a table in a notebook and as text elsewhere.

    Attributes:
        title: the run that was checked.
        needs: VRAM, system RAM, largest shard, disk.
    """

    title: str
    needs: tuple[Need, ...]

    @property
    def fits(self) -> bool:
        """True when nothing is too small."""
        return all(need.verdict != TOO_SMALL for need in self.needs)

    def table(self) -> Table:
        """Return need, have and verdict of each row."""
        rows = [
            (need.what, "-", "-", need.verdict)
            if need.have is None
            else (need.what, _gib(need.need), _gib(need.have), need.verdict)
            for need in self.needs
        ]
        return Table(f"{self.title} (estimated)", ("what", "need", "have", "verdict"), rows)

    def __str__(self) -> str:
        """Return the table as text."""
        return str(self.table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def preflight(
    model: str,
    weights: str = "tiny",
    precision: str = "auto",
    device: str = "auto",
    batch: int = 1,
    tokens: int = 2048,
    strict: bool = True,
    quantize: str | None = None,
) -> Preflight:
    """Compare what a run needs with what this machine has free.

    Args:
        model, weights, precision, device: as ``load``.
        batch: sequences at once.
        tokens: prompt and answer of one sequence.
        strict: raise when it does not fit; False only shows it.
        quantize: method of ``helpers.quantization`` by which the run makes a folder, too; None for none.

    Returns:
        The rows VRAM, system RAM, largest shard (which passes through RAM while loading) and disk.

    Raises:
        HelpersError: an unknown name, no such device, bf16 on a card without it, or (strict) something is too small;
            the error says what to lower. Of a model published as LoRA no hub has the base (strict).
    """
    row = catalog.model(model)
    check_names(weights, precision)
    if strict and weights == "hub" and row.adapters:
        raise base_is_missing(row)
    device = pick_device(device)
    on_cpu = device == "cpu"
    element = pick_dtype(precision, row.dtype, device).itemsize
    about, saved = sized_weights(row, weights), saved_bytes(row, weights)
    files, largest = file_sizes(row, weights)
    vram, ram, runtime = free_vram(device), free_ram(), RUNTIME_RAM["cpu" if on_cpu else "cuda"]
    ram_beside_gpu = runtime + (files if quantize in BY_GPTQMODEL else 0)

    def needed(precision: str = precision, batch: int = batch, tokens: int = tokens) -> float:
        kind = {4: "fp32", 2: row.dtype}[element] if precision == "auto" else precision
        run = Setting(kind, "transformers", "default", batch, tokens, tokens, element, cuda=not on_cpu)
        parts = [part for part in memory(about, run)[0] if part.where != CACHED]  # PyTorch gives that back
        parts = [part for part in parts if not (saved and part.name.startswith("weights"))]
        return (saved or 0) + sum(part.bytes for part in parts) + (runtime if on_cpu else 0)

    disk = disk_need(row, weights, files) + (written(weights, files) if quantize else 0)
    shard = 0 if weights == "random" else largest
    result = Preflight(
        f"{model}, weights {weights}, precision {precision}, {device}, batch {batch}, {tokens} tokens",
        (
            Need("VRAM", 0 if on_cpu else needed(), vram),
            Need("system RAM", needed() if on_cpu else ram_beside_gpu, ram),
            Need("largest shard", shard, ram if shard else None),
            Need("disk", disk, free_disk() if disk else None),
        ),
    )
    if strict and not result.fits:
        tight = next(need for need in result.needs if need.verdict == TOO_SMALL)
        raise HelpersError(
            f"{model} ({weights}, {precision}, batch {batch}, {tokens} tokens) does not fit",
            f"{tight.what}: {_gib(tight.need)} needed, {_gib(tight.have)} free",
            _what_to_lower(tight, precision, needed, on_cpu),
        )
    return result


def sized_weights(row: Model, weights: str) -> Sized:
    """Return the shape of what ``weights`` names: the catalogue's, or that of a stand-in's or a reader's own folder."""
    return Sized.of(row) if weights in ("random", "hub") else from_config(_folder(row, weights))


def file_sizes(row: Model, weights: str) -> tuple[int, int]:
    """Return the bytes of all weight files of ``weights``, and of the largest; no tensor is touched."""
    from ..native.convert import weight_files

    if weights in ("random", "hub"):
        return row.weight_bytes, row.largest_file or min(row.weight_bytes, LARGEST_SHARD)
    sizes = [file.stat().st_size for file in weight_files(_folder(row, weights))]
    return sum(sizes), max(sizes)


def saved_bytes(row: Model, weights: str) -> int | None:
    """Return the bytes of weights that were quantised before they were saved, which stay as they are; else None.

    Those of compressed-tensors do not: transformers unpacks them at their first use.
    """
    if weights in ("tiny", "random", "hub") or quantized_by(_folder(row, weights)) in (None, "compressed-tensors"):
        return None
    return file_sizes(row, weights)[0]


def _folder(row: Model, weights: str) -> Path:
    folder = tiny_folder(row.id) if weights == "tiny" else Path(weights)
    return folder / "base" if (folder / "base").is_dir() else folder  # a LoRA lies beside its base


def disk_need(row: Model, weights: str, files: int) -> int:
    """Return the bytes that loading will write: the download, and the converted copy that is kept beside it."""
    kinds = {"tiny": "tiny", "hub": "hub"}
    done = weights in kinds and (cache_folder() / "native" / kinds[weights] / row.id).is_dir()
    if weights == "random" or done:
        return 0
    download = files if weights == "hub" and not fetched(row.id) else 0
    converted = 0 if row.native_config else files
    return download + converted


def written(weights: str, files: int) -> int:
    """Return the bytes that quantising writes at most: half of 16 bit, and random weights themselves."""
    return files // 2 + (files if weights == "random" else 0)


def free_vram(device: str) -> int | None:
    """Return the bytes that the CUDA driver has free on a card; None for a CPU."""
    import torch

    return None if device == "cpu" else torch.cuda.mem_get_info(device)[0]


def free_ram() -> int:
    """Return the bytes of RAM that can still be taken, a container's limit (cgroup version 2) regarded."""
    import psutil

    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = int((group / "memory.max").read_text()), int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no such files, or the limit is "max"
        return free
    return min(free, max(0, limit - used))


def free_disk() -> int:
    """Return the bytes free where downloads and conversions go."""
    folder = cache_folder()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _what_to_lower(tight: Need, precision: str, needed: Callable[..., float], on_cpu: bool) -> str:
    """Name the change that makes the tight row fit: a smaller precision, less context, or smaller weights."""
    if tight.what == "disk":
        return "free some space, or set LLM_DEPLOY_CACHE to a folder on a larger disk"
    if tight.what == "largest shard":
        return "take a machine with more RAM, or weights='random' to see memory and speed without a checkpoint"
    if tight.what == "system RAM" and not on_cpu:
        less = "" if tight.need in RUNTIME_RAM.values() else ", or quantise by bitsandbytes, which takes less RAM"
        return f"close other programs, or restart other notebooks' kernels{less}"
    for smaller in ("int8", "nf4"):
        if precision not in ("int8", "nf4") or (precision, smaller) == ("int8", "nf4"):
            need = needed(smaller)
            if need <= (tight.have or 0):
                return f"lower precision to {smaller} ({_gib(need)}), or batch or tokens"
    if needed(precision, 1, 256) <= (tight.have or 0):
        return "lower batch or tokens"
    return "take a smaller model, or weights='tiny', which runs anywhere"


def _gib(size: float | None) -> str:
    """Write bytes as GiB; a stand-in's are small, so two decimals and never a bare 0.00 for something."""
    gib = (size or 0) / GIB
    return f"{gib:.2f} GiB" if gib >= 0.01 or not gib else "under 0.01 GiB"
