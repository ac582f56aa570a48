"""A conversion needs about as much memory as the largest shard, however many shards there are."""

from __future__ import annotations

import sys

import pytest
import torch
from bench_convert import largest_shard, measured_conversion, synthetic, write_lora
from reference import baichuan, llama
from reference.checking import random_weights, write_original

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc/self/status")

SHARDS, BYTES = 1.3, 30_000_000
"""Memory allowed above that of the imports: this many largest shards, and code that only a conversion runs."""


def assert_lean(source, target, *adapters):
    """Convert in a fresh process and compare its peak with what importing everything took."""
    report, shard = measured_conversion(source, target, *adapters), largest_shard(source)
    used = report["peak_bytes"] - report["start_bytes"]
    assert used <= SHARDS * shard + BYTES, f"the peak is {used / 1e6:.0f} MB, the largest shard {shard / 1e6:.0f} MB"


def test_a_checkpoint_of_four_shards(tmp_path):
    assert_lean(synthetic(tmp_path / "original", shards=4, shard_bytes=60_000_000), tmp_path / "native")


def test_the_head_of_baichuan_2(tmp_path):
    """Its rows are scaled in fp32, which would take twice the memory of the 16-bit head if done all at once."""
    original = {
        "model_type": "baichuan",
        "vocab_size": 125_696,
        "hidden_size": 256,
        "intermediate_size": 30_000,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
    }
    weights = random_weights(baichuan.shapes(original), dtype=torch.bfloat16)
    assert_lean(write_original(tmp_path / "original", original, weights), tmp_path / "native")


LLAMA = {
    "model_type": "llama",
    "vocab_size": 19_000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}


@pytest.mark.parametrize("vocabularies", [[None], [20_000], [20_000, 20_001]], ids=["LoRA", "Alpaca", "Alpaca-Plus"])
def test_loras_in_every_matrix(tmp_path, vocabularies):
    """Every matrix is copied here; the pages that it and the adapters were read from must not stay beside the copy."""
    weights = random_weights(llama.shapes(LLAMA), dtype=torch.float16)
    folder = write_original(tmp_path / "original", LLAMA, weights, shards=4, suffix="bin")
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    adapters = [
        write_lora(tmp_path / f"lora-{number}", shapes, vocabulary, rank=64)
        for number, vocabulary in enumerate(vocabularies, start=1)
    ]
    assert_lean(folder, tmp_path / "native", *adapters)
