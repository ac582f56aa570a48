"""How much memory and time a conversion takes, beside a plain copy of the same files.

    python tests/bench_convert.py [--gb 4] [--shards 4] [--adapters 2]

Not a test: times belong to a machine. ``test_convert_memory.py`` asserts on the memory part, on a smaller scale.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LAYERS_A_SHARD = 2
MEMORY_LIMIT = "1.3 x the largest shard + 0.5 GB"
SPEED_LIMIT = 0.5
"""Least speed of a conversion, as a part of a copy's."""


def synthetic(folder: Path, shards: int, shard_bytes: int) -> Path:
    """Write an InternLM2 checkpoint of random bytes in bf16: its fused projection has to be rearranged in memory.

    Args:
        folder: made here.
        shards: number of weight files, of two layers each; the embeddings are small and in the last.
        shard_bytes: approximate size of one file.
    """
    import torch
    from safetensors.torch import save_file

    hidden = 4096 if shard_bytes > 500e6 else 1024
    heads, groups, vocabulary = hidden // 128, hidden // 512, 256
    attention = 2 * hidden * hidden + 2 * hidden * groups * 128
    ffn = (shard_bytes // 2 // LAYERS_A_SHARD - attention) // (3 * hidden)
    original = {
        "model_type": "internlm2",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": shards * LAYERS_A_SHARD,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000,
        "bias": False,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(original))
    sizes = {
        "attention.wqkv": (hidden + 2 * groups * 128, hidden),
        "attention.wo": (hidden, hidden),
        "feed_forward.w1": (ffn, hidden),
        "feed_forward.w3": (ffn, hidden),
        "feed_forward.w2": (hidden, ffn),
        "attention_norm": (hidden,),
        "ffn_norm": (hidden,),
    }
    ends = {
        "model.tok_embeddings.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "output.weight": (vocabulary, hidden),
    }
    weight_map = {}
    for shard in range(shards):
        layers = range(shard * LAYERS_A_SHARD, (shard + 1) * LAYERS_A_SHARD)
        named = {f"model.layers.{i}.{name}.weight": size for i in layers for name, size in sizes.items()}
        named |= ends if shard == shards - 1 else {}
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file(
            {name: torch.empty(size, dtype=torch.int16).random_().view(torch.bfloat16) for name, size in named.items()},
            folder / file,
        )
        weight_map |= dict.fromkeys(named, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_lora(folder: Path, shapes: dict[str, tuple[int, ...]], vocabulary: int | None = None, rank: int = 8) -> Path:
    """Write an adapter in fp16 as peft published it in 2023: a random pair for every matrix of the layers.

    Args:
        folder: made here.
        shapes: of the base's tensors, by name.
        vocabulary: tokens of its own embeddings and head; it has none of its own when None.
        rank: of the pairs.
    """
    import torch

    tensors = {}
    for name, shape in shapes.items():
        module = "base_model.model." + name.removesuffix(".weight")
        if len(shape) == 1:
            continue
        if ".layers." in name:
            tensors[module + ".lora_A.weight"] = torch.randn(rank, shape[1], dtype=torch.float16)
            tensors[module + ".lora_B.weight"] = torch.randn(shape[0], rank, dtype=torch.float16)
        elif vocabulary:
            tensors[module + ".weight"] = torch.randn(vocabulary, shape[1], dtype=torch.float16)
    folder.mkdir()
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 32}))
    return folder


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of a checkpoint's tensors from the headers of its safetensors files."""
    from safetensors import safe_open

    shapes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return shapes


def measured_conversion(source: Path, target: Path, *adapters: Path) -> dict[str, float]:
    """Convert in a fresh process, merging ``adapters`` into it (Linux only).

    glibc keeps freed blocks below 32 MB at hand, for which only a small checkpoint has use; here it gives them back.

    Returns:
        ``start_bytes``: resident memory (RSS) when a very small checkpoint has been converted, so that everything is
        imported; ``peak_bytes``: peak RSS from there on, pages of mapped files included; ``seconds``: this conversion.
    """
    command = [sys.executable, __file__, "--convert", *map(str, (source, target, *adapters))]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(run.stdout.splitlines()[-1])


def convert_and_report(source: Path, target: Path, *adapters: Path) -> None:
    """Do the fresh process's part of ``measured_conversion``."""
    from helpers import native

    with tempfile.TemporaryDirectory() as folder:
        small = synthetic(Path(folder) / "original", shards=1, shard_bytes=12_000_000)
        native.convert(small, Path(folder) / "native")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    report: dict[str, Any] = {"start_bytes": resident("VmRSS")}
    start = time.perf_counter()
    native.convert(source, target, adapters=adapters)
    report |= {"seconds": time.perf_counter() - start, "peak_bytes": resident("VmHWM")}
    print(json.dumps(report))


def resident(key: str) -> int:
    """Return this process's resident memory in bytes: now (``VmRSS``) or at its peak (``VmHWM``)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{key}:")[1].split()[0])


def largest_shard(folder: Path) -> int:
    """Return the size of the largest file in bytes: a weight file, all others being small."""
    return max(file.stat().st_size for file in folder.iterdir())


def main() -> None:
    """Measure and print; exit with 1 when a limit is broken."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--gb", type=float, default=4, help="size of the checkpoint in GB (default: 4)")
    arguments.add_argument("--shards", type=int, default=4, help="number of weight files (default: 4)")
    arguments.add_argument("--adapters", type=int, default=0, help="number of LoRAs to merge (default: none)")
    arguments.add_argument("--convert", nargs="+", type=Path, help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    if chosen.convert:
        convert_and_report(*chosen.convert)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = synthetic(Path(folder) / "original", chosen.shards, int(chosen.gb * 1e9 / chosen.shards))
        os.sync()
        start = time.perf_counter()
        shutil.copytree(source, Path(folder) / "copy")
        copying = time.perf_counter() - start
        shutil.rmtree(Path(folder) / "copy")
        os.sync()
        shapes = shapes_of(source)
        adapters = [write_lora(Path(folder) / f"lora-{number}", shapes) for number in range(chosen.adapters)]
        report, shard = measured_conversion(source, Path(folder) / "native", *adapters), largest_shard(source)
    size = chosen.gb
    limit = 1.3 * shard + 0.5e9
    speed = copying / report["seconds"]
    rows = {
        "checkpoint": f"{size:.2f} GB in {chosen.shards} shards, the largest {shard / 1e9:.2f} GB",
        "adapters": f"{len(adapters)}",
        "copy": f"{copying:.1f} s, {size / copying:.2f} GB/s",
        "conversion": f"{report['seconds']:.1f} s, {size / report['seconds']:.2f} GB/s, {speed:.2f} of a copy's speed",
        "RSS": f"{report['start_bytes'] / 1e9:.2f} GB before, {report['peak_bytes'] / 1e9:.2f} GB at its peak",
        "peak RSS / shard": f"{report['peak_bytes'] / shard:.2f}; limit {MEMORY_LIMIT} = {limit / 1e9:.2f} GB",
    }
    for name, text in rows.items():
        print(f"{name:<17} {text}")
    if report["peak_bytes"] > limit or (speed < SPEED_LIMIT and not adapters):  # a merge computes as well
        sys.exit("a limit is broken")


if __name__ == "__main__":
    main()
