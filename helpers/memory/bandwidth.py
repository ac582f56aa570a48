"""Three numbers that explain speed: how fast a device moves memory (decode) and multiplies matrices (prefill), and how
long the host takes to ask for one operation (default decoding)."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import unknown

if TYPE_CHECKING:
    import torch

WARM_UP = 3


def copy_bandwidth(device: str = "auto", repeats: int | None = None) -> float:
    """Measure memory bandwidth in GB/s (10**9 bytes): bytes read plus bytes written by a copy, over its time.

    A tensor far larger than any cache (1 GiB on a GPU, 256 MiB on a CPU) is copied to another; the median of the
    repeats counts. It is the bandwidth a program can reach, some 10 % below the datasheet's, which is the pins' rate.

    Args:
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``. A CPU uses torch's current number of threads.
        repeats: 20 on a GPU and 5 on a CPU when None.

    Raises:
        HelpersError: no such device.
    """
    import torch

    from ..checkpoints.load import pick_device

    device = pick_device(device)
    size = 2**28 if device == "cpu" else 2**30
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _median_seconds(lambda: target.copy_(source), device, repeats)
    return 2 * size / seconds / 1e9


def matmul_rate(
    dtype: str = "bf16", size: int | None = None, device: str = "auto", repeats: int | None = None
) -> float:
    """Measure the rate of a dense matrix product in TFLOPS (10**12 operations a second).

    ``[size, size] @ [size, size]`` counts as ``2 * size**3`` operations; the median of the repeats counts. Datasheets
    often print twice the dense rate ("with sparsity"), which no language model reaches.

    Args:
        dtype: ``"fp32"``, ``"bf16"`` or ``"fp16"``. fp32 is true fp32 (no TF32) unless torch was told otherwise.
        size: 8192 on a GPU and 1024 on a CPU when None.
        device: as ``copy_bandwidth``.
        repeats: 20 on a GPU and 5 on a CPU when None.

    Raises:
        HelpersError: no such device or type.
    """
    import torch

    from ..checkpoints.load import pick_device

    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype not in types:
        raise unknown("dtype", dtype, list(types))
    device = pick_device(device)
    size = size or (1024 if device == "cpu" else 8192)
    left = torch.randn(size, size, device=device).to(types[dtype])
    right = torch.randn(size, size, device=device).to(types[dtype])
    out: torch.Tensor = torch.empty_like(left)
    seconds = _median_seconds(lambda: torch.matmul(left, right, out=out), device, repeats)
    return 2 * size**3 / seconds / 1e12


def request_seconds(device: str = "auto", repeats: int | None = None) -> float:
    """Measure how many seconds the host takes to ask for one small operation: what default ``generate`` is made of.

    A hundred layers, each a product by a matrix of 64 x 64 and a sum, are asked for from Python one after another, as
    a model's are; the device has less to do than the host. The median of the repeats counts, by 200 operations.

    Args:
        device: as ``copy_bandwidth``.
        repeats: 20 on a GPU and 5 on a CPU when None.

    Raises:
        HelpersError: no such device.
    """
    import torch

    from ..checkpoints.load import pick_device

    device = pick_device(device)
    layers = [torch.nn.Linear(64, 64, bias=False, device=device) for _ in range(100)]
    state = torch.zeros(1, 64, device=device)

    @torch.inference_mode()
    def step() -> None:
        moving = state
        for layer in layers:
            moving = moving + layer(moving)

    return _median_seconds(step, device, repeats) / (2 * len(layers))


def _median_seconds(step: Callable[[], object], device: str, repeats: int | None) -> float:
    """Run a step a few times unmeasured, then return the median time of the repeats."""
    import torch

    repeats = repeats or (5 if device == "cpu" else 20)
    for _ in range(WARM_UP):
        step()
    if device == "cpu":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    with torch.cuda.device(device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(events))
