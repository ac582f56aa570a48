"""PyTorch's allocator over time: what lived in tensors while something ran, and what the allocator held for it.

Its trace has every block that was given out and taken back
(https://docs.pytorch.org/docs/stable/torch_cuda_memory.html); here it becomes two lines of a picture.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from ..errors import HelpersError
from .parts import MIB

SPANS = 500
"""Points of the picture: a trace has over a thousand blocks for every token."""

RECORDED = Path(__file__).parents[1] / "catalog" / "measured" / "h100-allocations.json"
"""Qwen-7B at random in bf16 on an H100: default ``generate``, 128 tokens of prompt and 32 of an answer."""


@dataclass(frozen=True)
class Allocations:
    """VRAM in MiB beyond what was there before, in ``SPANS`` (or fewer) parts of equally many events.

    Attributes:
        what: what ran, and where.
        least, most: in live tensors, at least and at most in each part.
        reserved: what the allocator held when the part ended: live tensors and blocks that were freed.
    """

    what: str
    least: list[float]
    most: list[float]
    reserved: list[float]

    def save(self, path: Path) -> None:
        """Write the lines as JSON, which ``read`` takes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path = RECORDED) -> Allocations:
        """Read what ``save`` wrote; without a path, what was recorded on an H100."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def watch_allocations(function: Callable[[], Any], what: str) -> Allocations:
    """Run a function on the current GPU and return what PyTorch's allocator did meanwhile.

    Args:
        function: what to run; what it returns is dropped.
        what: what it is, for the picture's title.

    Raises:
        HelpersError: there is no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise HelpersError("cannot watch allocations", "PyTorch keeps a trace of a GPU's memory only", "use a GPU")
    torch.cuda.memory._record_memory_history(context=None)  # without the stack of every call, which takes 100 MB
    try:
        function()
        torch.cuda.synchronize()
        trace = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    return read_trace(trace, what)


def read_trace(trace: Iterable[Mapping[str, Any]], what: str) -> Allocations:
    """Sum a trace up.

    Args:
        trace: events in order, of which ``action`` and ``size`` (bytes) are read.
        what: as ``watch_allocations``.
    """
    live = {"alloc": 1, "free_completed": -1}
    held = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}
    events = [event for event in trace if event["action"] in live or event["action"] in held]
    lives = list(accumulate(live.get(event["action"], 0) * event["size"] / MIB for event in events))
    holds = list(accumulate(held.get(event["action"], 0) * event["size"] / MIB for event in events))
    parts = min(SPANS, len(events))
    edges = [part * len(events) // max(parts, 1) for part in range(parts + 1)]
    spans = [slice(begin, end) for begin, end in pairwise(edges)]
    return Allocations(
        what,
        [round(min(lives[span]), 1) for span in spans],
        [round(max(lives[span]), 1) for span in spans],
        [round(holds[span][-1], 1) for span in spans],
    )
