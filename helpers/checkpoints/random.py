"""Full-size weights without a download: memory and speed do not depend on the values."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from ..catalog import Model

NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


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

        The name seeds the generator, so a model is the same whatever the order its tensors are read in.
        """
        import torch

        tensor = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        if tensor.ndim == 1:
            return tensor.fill_(0 if self.name.endswith("bias") else 1)[part]
        seeded = torch.Generator(self.device).manual_seed(zlib.crc32(self.name.encode()))
        return tensor.normal_(0, 0.02, generator=seeded)[part]


def random_state(config: PreTrainedConfig, dtype: torch.dtype, device: str) -> dict[str, RandomTensor]:
    """Return a state dict of ``RandomTensor`` for a native config; a tied head is left to its embedding."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    names = dict(empty.named_parameters())  # names a shared tensor once
    return {name: RandomTensor(name, tuple(tensor.shape), dtype, device) for name, tensor in names.items()}
