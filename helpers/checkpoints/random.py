"""Full-size weights without a download: memory and speed do not depend on the values."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HelpersError
from .quantized import GPTQ_BLOCKS, NO_RWKV, gptq_kernel

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from ..catalog import Model

SHARD = 2 * 10**9
"""Largest weight file written, in bytes: what has to fit into RAM at once where a file is read whole (free Colab)."""

GROUP = 128
"""Weights that share a scale in the formats below: what published 4-bit checkpoints mostly have."""


def _compressed(form: str, kind: str) -> dict[str, Any]:
    """Describe 8-bit weights with a scale a row and 8-bit activations with a scale a token (compressed-tensors)."""
    each = {"num_bits": 8, "type": kind, "symmetric": True}
    inputs, weights = each | {"strategy": "token", "dynamic": True}, each | {"strategy": "channel", "dynamic": False}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": form}}
    about = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
    return about | {"config_groups": groups, "ignore": ["lm_head"]}


def _gptq(bits: int) -> dict[str, Any]:
    """Describe weights as GPTQ packs them: symmetric, a scale for each ``GROUP`` of a column."""
    which = [".layers."]  # what is quantised vLLM else learns from the files, which are not there
    about = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": True, "desc_act": False}
    return about | {"modules_in_block_to_quantize": which}


FORMATS: dict[str, dict[str, Any]] = {
    "gptq-int8": _gptq(8),
    "gptq-int4": _gptq(4),
    "awq-int4": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    "w8a8": _compressed("int-quantized", "int"),
    "fp8": _compressed("float-quantized", "float"),
}
"""``quantization_config`` of a folder in each precision, as helpers.quantization writes it, to the keys vLLM asks for.

With it vLLM makes room for weights in that form and fills them at random: no checkpoint is needed to measure one.
"""

LOADED = ["gptq-int8", "gptq-int4"]
"""Of these what ``load`` takes with random weights, too: the form that transformers computes in as it is packed."""

NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "int32": "I32"}


def full_config(row: Model) -> PreTrainedConfig:
    """Return the native config of a catalogue row at its published size.

    Rows of the older models hold the keys of their original config.json, which the converter translates; rows of
    models born native hold those of the native one.
    """
    from ..native import native_config

    return native_config(dict(row.original_config or row.native_config))


@dataclass(frozen=True)
class RandomTensor:
    """Looks to transformers like a tensor in a checkpoint file, and makes its values when it is read.

    So a random model is loaded, placed and quantised by the very code that loads a real one, one tensor at a time,
    and the full model never lies in RAM.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str

    def get_shape(self) -> list[int]:
        """Return the shape, as safetensors' slices do."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """Return the dtype's name in safetensors' spelling."""
        return NAMES[str(self.dtype).removeprefix("torch.")]

    def __getitem__(self, part: Any) -> torch.Tensor:
        """Make the values: normalisation weights 1, biases 0, everything else normal with deviation 0.02.

        Of packed matrices the codes are any, the zeros near the middle, and the scales as small as weights are.
        The name seeds the generator, so a model is the same whatever the order its tensors are read in.
        """
        import torch

        tensor, kind = torch.empty(self.shape, dtype=self.dtype, device=self.device), self.name.rpartition(".")[2]
        if kind == "g_idx":
            return (torch.arange(self.shape[0], device=self.device, dtype=self.dtype) // GROUP)[part]
        if kind == "qzeros":
            return tensor.fill_(0x77777777)[part]  # eight times 7, which GPTQ reads as 8; or four times 120
        if tensor.ndim == 1:
            return tensor.fill_(0 if kind == "bias" else 1)[part]
        seeded = torch.Generator(self.device).manual_seed(zlib.crc32(self.name.encode()))
        if kind == "qweight":
            return tensor.random_(generator=seeded)[part]
        return tensor.normal_(0, 0.02, generator=seeded)[part]


def random_state(config: PreTrainedConfig, dtype: torch.dtype, device: str) -> dict[str, RandomTensor]:
    """Return a state dict of ``RandomTensor`` for a native config; a tied head is left to its embedding.

    Args:
        config: of the model, full size. With the ``quantization_config`` of ``gptq_config`` the matrices of the layers
            are as GPTQ packs them.
        dtype, device: of what is not packed, and where values are made.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    shapes = {name: (tuple(tensor.shape), dtype) for name, tensor in empty.named_parameters()}  # a shared one once
    packing = getattr(config, "quantization_config", None)
    if packing:
        for name, layer in empty.named_modules():
            if isinstance(layer, torch.nn.Linear) and ".layers." in name:
                del shapes[f"{name}.weight"]
                shapes |= _packed(name, layer.in_features, layer.out_features, dtype, packing["bits"])
    return {name: RandomTensor(name, shape, kind, device) for name, (shape, kind) in shapes.items()}


def _packed(
    name: str, rows: int, columns: int, dtype: torch.dtype, bits: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return names, shapes and types of what GPTQ writes of a matrix; an int32 holds four codes of 8 bits, or eight."""
    import torch

    codes = 32 // bits
    return {
        f"{name}.qweight": ((rows // codes, columns), torch.int32),
        f"{name}.qzeros": ((rows // GROUP, columns // codes), torch.int32),
        f"{name}.scales": ((rows // GROUP, columns), dtype),
        f"{name}.g_idx": ((rows,), torch.int32),
    }


def gptq_config(config: PreTrainedConfig, precision: str, device: str) -> dict[str, Any]:
    """Return the ``quantization_config`` of a random model that is packed by GPTQ, as ``load`` gives it.

    Raises:
        HelpersError: an RWKV, which no GPTQ library quantises.
    """
    kind = config.model_type
    if kind.startswith("rwkv"):
        raise HelpersError(f"no {kind} packed by GPTQ", NO_RWKV, "take nf4 or int8, which do RWKV")
    settings = {name: value for name, value in FORMATS[precision].items() if name != "modules_in_block_to_quantize"}
    if kind in GPTQ_BLOCKS:
        settings["block_name_to_quantize"] = GPTQ_BLOCKS[kind]
    return settings | {"backend": gptq_kernel(settings, config, device)}


def save_random(row: Model, folder: Path, device: str) -> None:
    """Write a model of random weights, full size and in its published type, shard by shard: for what reads files.

    Args:
        row: of the catalogue.
        folder: folder to make, without a tokenizer; it takes as much disk as the model.
        device: where the values are made, ``"cuda:0"`` or ``"cpu"``; the full model lies in no memory.
    """
    from safetensors.torch import save_file
    from tqdm.auto import tqdm

    from .load import pick_dtype

    folder.mkdir(parents=True)
    config = full_config(row)
    config.dtype = pick_dtype(row.dtype, row.dtype, "cpu")
    config.architectures = [row.native_class]
    config.save_pretrained(folder)
    shards: list[list[str]] = [[]]
    state = random_state(config, config.dtype, device)
    room = SHARD
    for name, tensor in state.items():
        size = config.dtype.itemsize * math.prod(tensor.shape)
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD
        shards[-1].append(name)
        room -= size
    weight_map = {}
    for number, names in enumerate(tqdm(shards, "writing random weights", delay=5), start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: state[name][...].cpu() for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
