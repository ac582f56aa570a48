"""Quantise a model: one function a method, all with the same arguments, each leaving an ordinary folder.

from helpers.quantization import bitsandbytes, gptq
folder = gptq("qwen-7b", "build/qwen-4bit", weights="tiny", bits=4, group_size=32)
model, tokenizer = load("qwen-7b", weights=folder)
"""

from ..checkpoints.make.poems import read as poems
from .folder import scratch_folder
from .layers import Layer, quantized_layers
from .legacy import upgrade
from .quality import perplexity, recited
from .with_bitsandbytes import bitsandbytes
from .with_compressed_tensors import fp8, w8a8
from .with_gptqmodel import awq, gptq, rtn

__all__ = [
    "Layer",
    "awq",
    "bitsandbytes",
    "fp8",
    "gptq",
    "perplexity",
    "poems",
    "quantized_layers",
    "recited",
    "rtn",
    "scratch_folder",
    "upgrade",
    "w8a8",
]
