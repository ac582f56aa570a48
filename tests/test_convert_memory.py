"""A conversion needs about as much memory as the largest shard, however many shards there are."""

from __future__ import annotations

import sys

import pytest
import torch
from bench_convert import largest_shard, measured_conversion, synthetic
from reference import baichuan
from reference.checking import random_weights, write_original

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc/self/status")

ALLOWED = 1.3
"""Peak memory above that of the imports, in largest shards."""


def assert_lean(source, target):
    """Convert in a fresh process and compare its peak with what importing everything took."""
    report = measured_conversion(source, target)
    used = (report["peak_bytes"] - report["import_bytes"]) / largest_shard(source)
    assert used <= ALLOWED, f"the peak is {used:.2f} largest shards above the imports"
    assert used > 0.05, "the peak lies in the imports: this test sees nothing"


def test_a_checkpoint_of_four_shards(tmp_path):
    assert_lean(synthetic(tmp_path / "original", shards=4, shard_bytes=60_000_000), tmp_path / "native")


def test_the_head_of_baichuan_2(tmp_path):
    """Its rows are scaled in fp32, which takes more than one copy of the largest tensor if done all at once."""
    original = {
        "model_type": "baichuan",
        "vocab_size": 125_696,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
    }
    weights = random_weights(baichuan.shapes(original), dtype=torch.bfloat16)
    assert_lean(write_original(tmp_path / "original", original, weights, shards=2), tmp_path / "native")
