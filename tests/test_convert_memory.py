"""A conversion needs about as much memory as the largest shard, however many shards there are."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from bench_convert import largest_shard, measured_conversion, synthetic
from reference import baichuan, llama
from reference.checking import random_weights, write_original
from safetensors.torch import save_file

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


def test_a_lora_in_every_matrix(tmp_path):
    """Every matrix is copied here; the pages it was read from must not stay beside the copy."""
    original = {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    }
    weights = random_weights(llama.shapes(original), dtype=torch.float16)
    folder = write_original(tmp_path / "original", original, weights, shards=2, suffix="bin")
    adapter = write_lora(tmp_path / "lora", weights)
    assert_lean(folder, tmp_path / "native", adapter)


def write_lora(folder, weights, rank=4):
    """Write an adapter with a random pair for every matrix of the layers, as peft lays it out."""
    pairs = {}
    for name, tensor in weights.items():
        if name.endswith("_proj.weight"):
            module = "base_model.model." + name.removesuffix(".weight")
            pairs[module + ".lora_A.weight"] = torch.randn(rank, tensor.shape[1], dtype=tensor.dtype)
            pairs[module + ".lora_B.weight"] = torch.randn(tensor.shape[0], rank, dtype=tensor.dtype)
    folder.mkdir()
    save_file(pairs, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 8}))
    return folder
