"""Before anything is downloaded or loaded: what the run needs, what this machine has, whether it fits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import catalog
from ..checkpoints.hub import cache_folder
from ..checkpoints.load import TINY, check_names, pick_device, pick_dtype
from ..errors import HelpersError
from ..report.table import Table
from .parts import Setting, memory
from .shapes import Sized
from .speed import kv_values_per_token

if TYPE_CHECKING:
    from ..catalog import Model

GIB = 2**30
MARGIN = 1.10
"""The estimate's allowance for what it does not count: activations, the allocator's rounding, libraries."""

RUNTIME_RAM = 2 * GIB
"""RAM of Python with PyTorch, its CUDA libraries and a CUDA context, beside the model."""

LARGEST_SHARD = 10 * 10**9
"""Largest file of a published checkpoint where the catalogue does not say: transformers' limit when they were saved."""

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


@dataclass(frozen=True)
class Size:
    """What the estimate needs to know of a model.

    Attributes:
        parameters: all of them.
        linear: those that int8 and nf4 quantise; embeddings, output layer and norms stay as they are.
        kv_per_token: elements that one token adds to the KV cache.
        files: bytes of the checkpoint's weight files.
        shard: bytes of the largest of them.
        state: bytes of the state that an RNN keeps of one sequence.
    """

    parameters: int
    linear: int
    kv_per_token: int
    files: int
    shard: int
    state: int = 0


def preflight(
    model: str,
    weights: str = "tiny",
    precision: str = "auto",
    device: str = "auto",
    batch: int = 1,
    tokens: int = 2048,
    strict: bool = True,
) -> Preflight:
    """Compare what a run needs with what this machine has free.

    Args:
        model, weights, precision, device: as ``load``.
        batch: sequences at once.
        tokens: prompt and answer of one sequence.
        strict: raise when it does not fit; False only shows it.

    Returns:
        The rows VRAM, system RAM, largest shard (which passes through RAM while loading) and disk.

    Raises:
        HelpersError: an unknown name, no such device, bf16 on a card without it, or (strict) something is too small;
            the error says what to lower.
    """
    row = catalog.model(model)
    check_names(weights, precision)
    device = pick_device(device)
    element = pick_dtype(precision, row.dtype, device).itemsize
    size = model_size(row, weights)
    vram, ram, on_cpu = free_vram(device), free_ram(), device == "cpu"

    def needed(precision: str = precision, batch: int = batch, tokens: int = tokens) -> float:
        if on_cpu or weights not in ("random", "hub"):
            return estimate(size, precision, element, batch, tokens)
        return vram_need(row, precision, element, batch, tokens)

    total = needed()
    disk = disk_need(row, weights, size)
    shard = 0 if weights == "random" else size.shard
    result = Preflight(
        f"{model}, weights {weights}, precision {precision}, {device}, batch {batch}, {tokens} tokens",
        (
            Need("VRAM", 0 if on_cpu else total, vram),
            Need("system RAM", total if on_cpu else RUNTIME_RAM, ram),
            Need("largest shard", shard, ram if shard else None),
            Need("disk", disk, free_disk() if disk else None),
        ),
    )
    if strict and not result.fits:
        tight = next(need for need in result.needs if need.verdict == TOO_SMALL)
        raise HelpersError(
            f"{model} ({weights}, {precision}, batch {batch}, {tokens} tokens) does not fit",
            f"{tight.what}: {_gib(tight.need)} needed, {_gib(tight.have)} free",
            _what_to_lower(tight, precision, needed),
        )
    return result


def estimate(size: Size, precision: str, element: int, batch: int, tokens: int) -> float:
    """Estimate the bytes of a running model in RAM, or of a folder: weights, KV cache or state, 10 % for the rest.

    A linear layer's weight takes 1 byte in int8 and 0.5 in nf4, which adds an absmax of 4 bytes to every 64 weights
    (bitsandbytes without double quantisation); all other weights, and the KV cache, take ``element`` bytes.
    """
    per_linear = {"int8": 1.0, "nf4": 0.5 + 4 / 64}.get(precision, element)
    weights = size.linear * per_linear + (size.parameters - size.linear) * element
    return MARGIN * (weights + batch * (tokens * size.kv_per_token * element + size.state))


def vram_need(row: Model, precision: str, element: int, batch: int, tokens: int) -> float:
    """Return the bytes that a full-size model takes of a card, as ``helpers.estimate`` counts them.

    All tokens may be the prompt's. What is free on the card is asked with a CUDA context open, and the context counts
    here once more: half a GiB of reserve.
    """
    name = {4: "fp32", 2: row.dtype}[element] if precision == "auto" else precision
    run = Setting(name, "transformers", "default", batch, tokens, tokens, element)
    return sum(part.bytes for part in memory(Sized.of(row), run)[0])


def model_size(row: Model, weights: str) -> Size:
    """Take the sizes from the catalogue; for the stand-in (or a reader's own folder), from its files and config."""
    if weights in ("random", "hub"):
        return Size(
            parameters=row.parameters,
            linear=row.shape.matrices(),
            kv_per_token=row.shape.kv_values_per_token(),
            state=4 * row.shape.state_values(),  # in fp32
            files=row.weight_bytes,
            shard=row.largest_file or min(row.weight_bytes, LARGEST_SHARD),
        )
    return _size_of_folder(TINY / (row.stand_in or row.id) if weights == "tiny" else Path(weights))


def _size_of_folder(folder: Path) -> Size:
    """Read config.json and the sizes of the files; no tensor is touched."""
    from ..native.convert import native_config, read_config, weight_files

    base = folder / "base" if (folder / "base").is_dir() else folder  # a LoRA lies beside its base
    sizes = [file.stat().st_size for file in weight_files(base)]
    config = native_config(read_config(base))
    parameters = sum(sizes) // 2  # published in 16 bit
    return Size(
        parameters=parameters,
        linear=parameters - 2 * config.vocab_size * config.hidden_size,
        kv_per_token=kv_values_per_token(config),
        files=sum(sizes),
        shard=max(sizes),
    )


def disk_need(row: Model, weights: str, size: Size) -> int:
    """Return the bytes that loading will write: the download, and the converted copy that is kept beside it."""
    kinds = {"tiny": "tiny", "hub": "hub"}
    done = weights in kinds and (cache_folder() / "native" / kinds[weights] / row.id).is_dir()
    if weights == "random" or done:
        return 0
    download = size.files if weights == "hub" else 0
    converted = 0 if row.native_config else size.files
    return download + converted


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


def _what_to_lower(tight: Need, precision: str, needed: Callable[..., float]) -> str:
    """Name the change that makes the tight row fit: a smaller precision, less context, or smaller weights."""
    if tight.what == "disk":
        return "free some space, or set LLM_DEPLOY_CACHE to a folder on a larger disk"
    if tight.what == "largest shard":
        return "take a machine with more RAM, or weights='random' to see memory and speed without a checkpoint"
    if tight.need == RUNTIME_RAM:
        return "close other programs, or restart other notebooks' kernels"
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
