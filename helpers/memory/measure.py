"""What a step used: each figure named by which memory it is, because they differ by gigabytes.

The allocator's figures are defined in PyTorch's memory-management notes
(https://docs.pytorch.org/docs/stable/notes/cuda.html#memory-management), NVML's in its API reference
(https://docs.nvidia.com/deploy/nvml-api/), RSS in psutil's (https://psutil.readthedocs.io/).
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..report.record import format_value, record
from ..report.table import Table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GIB = 2**30
SAMPLE_SECONDS = 0.02

FIGURES = {
    "allocated": ("GiB", "VRAM in live tensors when the block ended (torch.cuda.memory_allocated)"),
    "allocated_peak": ("GiB", "most VRAM in live tensors during the block (torch.cuda.max_memory_allocated)"),
    "reserved_peak": (
        "GiB",
        "most VRAM that PyTorch's allocator held during the block: live tensors and its cache of freed ones "
        "(torch.cuda.max_memory_reserved)",
    ),
    "nvml_process": (
        "GiB",
        "VRAM of this process when the block ended, as the driver counts it: the allocator's, the CUDA context, "
        "libraries (NVML; unknown inside most containers)",
    ),
    "nvml_device": ("GiB", "VRAM of all processes on the card when the block ended, what nvidia-smi shows (NVML)"),
    "rss": ("GiB", "RAM of this process when the block ended, mapped file pages included (resident set size)"),
    "rss_peak": ("GiB", "most RAM of this process during the block (resident set size)"),
    "seconds": ("s", "wall time of the block, the GPU's work finished"),
}
"""The figures of ``Used``: unit and definition. On several GPUs, VRAM is the sum over the cards torch sees."""


@dataclass
class Used:
    """What a measured block used: sizes in GiB, filled when the block ends; None where this machine cannot tell.

    The attributes are defined in ``FIGURES``.
    """

    label: str
    allocated: float | None = None
    allocated_peak: float | None = None
    reserved_peak: float | None = None
    nvml_process: float | None = None
    nvml_device: float | None = None
    rss: float | None = None
    rss_peak: float | None = None
    seconds: float | None = None

    @property
    def peak(self) -> float | None:
        """GiB at the peak of the memory that limits the run: VRAM in live tensors, without a GPU resident RAM."""
        return self.rss_peak if self.allocated_peak is None else self.allocated_peak

    def table(self) -> Table:
        """Return every figure with its definition, to be displayed."""
        rows = [
            (name, f"{format_value(getattr(self, name))} {unit}", definition)
            for name, (unit, definition) in FIGURES.items()
        ]
        return Table(f"Used by: {self.label}", ("figure", "value", "definition"), rows)

    def figures(self, prefix: str = "") -> list[dict[str, Any]]:
        """Return every figure this machine could tell, as arguments of ``record``; named ``<prefix>_<figure>``."""
        prefix = f"{prefix}_" if prefix else ""
        return [
            {
                "name": prefix + name,
                "value": getattr(self, name),
                "unit": unit,
                "definition": definition,
                "machine": True,
            }
            for name, (unit, definition) in FIGURES.items()
            if getattr(self, name) is not None
        ]

    def record(self, prefix: str = "", **about: Any) -> None:
        """Record the figures; ``about`` as for ``helpers.report.record``."""
        for one in self.figures(prefix):
            record(**(one | about))


@contextmanager
def measure(label: str) -> Iterator[Used]:
    """Measure memory and time of a block: ``with measure("generate") as used: ...``, then ``used.table()``.

    VRAM peaks are PyTorch's own counters, reset at the start (so blocks must not be nested). The RAM peak is the
    largest of samples taken every 20 ms; where the process grew past its highest size so far, the kernel's
    high-water mark replaces them and is exact. Only a peak shorter than 20 ms below an earlier one can be missed.

    When the block raises, the figures are filled all the same and the exception goes on.

    Args:
        label: names the step in the table and in records.
    """
    import torch  # before the clock starts: its import belongs to no block

    used = Used(label)
    cards = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    if cards:
        torch.cuda.init()
    for card in cards:
        torch.cuda.synchronize(card)
        torch.cuda.reset_peak_memory_stats(card)
    ram = _RamPeak()
    start = time.perf_counter()
    try:
        yield used
    finally:
        for card in cards:
            torch.cuda.synchronize(card)
        used.seconds = time.perf_counter() - start
        used.rss, used.rss_peak = (size / GIB for size in ram.stop())
        if cards:
            used.allocated = sum(map(torch.cuda.memory_allocated, cards)) / GIB
            used.allocated_peak = sum(map(torch.cuda.max_memory_allocated, cards)) / GIB
            used.reserved_peak = sum(map(torch.cuda.max_memory_reserved, cards)) / GIB
            used.nvml_process, used.nvml_device = _nvml(cards)


def memory_parts(model: PreTrainedModel, used: Used, tokens: int, batch: int = 1) -> dict[str, float]:
    """Split the peak of a measured block into weights, KV cache and everything else, in GiB, for ``memory_bar``.

    On a GPU the rest is activations and working space; on a CPU, where the peak is the process's RAM, it is mostly
    Python and its libraries.

    Args:
        model: the model that ran; quantised weights count at their packed size.
        used: what ``measure`` filled.
        tokens: prompt and answer of one sequence.
        batch: sequences at once.
    """
    from .speed import kv_bytes_per_token

    weights = model.get_memory_footprint() / GIB
    cache = batch * tokens * kv_bytes_per_token(model) / GIB
    return {"weights": weights, "KV cache": cache, "rest of the peak": max(0.0, (used.peak or 0) - weights - cache)}


def free() -> None:
    """Give memory back after ``del model``: collect cycles, and return PyTorch's cached VRAM to the driver."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _RamPeak:
    """Watches this process's resident set size from a thread until stopped."""

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()
        self._peak = self._process.memory_info().rss
        self._mark = _high_water_mark()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ram-peak", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def stop(self) -> tuple[int, int]:
        """End the thread; return bytes now and at the peak."""
        self._stopped.set()
        self._thread.join()
        now, mark = self._process.memory_info().rss, _high_water_mark()
        return now, max(self._peak, now, mark if mark > self._mark else 0)


def _high_water_mark() -> int:
    """Return the largest resident set size of this process so far, in bytes; 0 where the system keeps none."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _nvml(cards: range) -> tuple[float | None, float | None]:
    """Return GiB of (this process, all processes) on the cards; None for what the driver does not tell."""
    import pynvml
    import torch

    try:
        device = sum(map(torch.cuda.device_memory_used, cards)) / GIB  # torch knows which NVML card is its card 0
    except (pynvml.NVMLError, RuntimeError):
        return None, None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        processes = [process for card in handles for process in pynvml.nvmlDeviceGetComputeRunningProcesses(card)]
    except pynvml.NVMLError:
        return None, device
    sizes = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
    known = [size for size in sizes if size is not None]
    return (sum(known) / GIB if known else None), device
