"""The allocator's trace as two lines: by hand, and what an H100 recorded."""

from __future__ import annotations

import pytest
import torch

from helpers.errors import HelpersError
from helpers.memory.allocations import SPANS, Allocations, read_trace, watch_allocations
from helpers.memory.estimate import estimate
from helpers.memory.parts import MIB


def event(action, mib):
    return {"action": action, "size": mib * MIB, "addr": 0}


def test_a_trace_by_hand(tmp_path):
    trace = [
        event("segment_alloc", 20),
        event("alloc", 4),
        event("alloc", 3),
        event("free_requested", 4),  # asked for, not done yet
        event("free_completed", 4),
        event("segment_free", 20),
    ]
    found = read_trace(trace, "a test")
    assert found.most == found.least == [0, 4, 7, 3, 3] and found.reserved == [20, 20, 20, 20, 0]
    found.save(tmp_path / "new" / "trace.json")
    assert Allocations.read(tmp_path / "new" / "trace.json") == found
    assert read_trace([], "nothing") == Allocations("nothing", [], [], [])


def test_a_long_trace_becomes_spans_that_hide_no_peak():
    trace = [event("alloc", 1), event("free_completed", 1)] * SPANS
    trace.insert(301, event("alloc", 9))
    found = read_trace(trace, "long")
    assert len(found.most) == len(found.least) == len(found.reserved) == SPANS
    assert max(found.most) == 10 and min(found.least) == 0


def test_what_the_h100_recorded_is_what_is_estimated():
    """The cache, whole at the end; and of freed blocks about as many as the estimator says."""
    kept = Allocations.read()
    run = estimate("qwen-7b", "bf16", context=160, prompt_tokens=128, gpu="h100-sxm")
    parts = {part.name: part.bytes / MIB for part in run.components}
    assert kept.what.startswith("Qwen-7B") and "H100" in kept.what and len(kept.most) == SPANS
    assert max(kept.most) == pytest.approx(parts["KV cache"], rel=0.05) and parts["KV cache"] == 80
    assert max(kept.reserved) == kept.reserved[-1] > 1.4 * max(kept.most)
    freed = max(kept.reserved) - max(kept.most)
    assert freed == pytest.approx(parts["freed blocks of the growing cache"], rel=0.25)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can be watched")
def test_without_a_gpu_it_says_so():
    with pytest.raises(HelpersError, match="PyTorch keeps a trace of a GPU's memory only"):
        watch_allocations(list, "nothing")
