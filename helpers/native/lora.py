"""Published LoRA adapters (Chinese-LLaMA-Alpaca), merged into their base while it is converted.

An adapter holds, for some matrices W of its base, a pair A ``[r, in]`` and B ``[out, r]``: the tuned model uses
W + (lora_alpha / r) B A (arXiv 2106.09685, section 4.1). Chinese-LLaMA-Alpaca also replaces the input and output
embeddings whole, since its vocabulary is larger than Llama's (arXiv 2304.08177, section 2).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import HelpersError
from .family import Original

if TYPE_CHECKING:
    from torch import Tensor

LOW_RANK = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])(\.default)?\.weight\Z")
WHOLE = re.compile(r"base_model\.model\.(?P<module>.+?)(\.modules_to_save)?(\.default)?\.weight\Z")


class Adapter:
    """One peft LoRA folder: adapter_config.json with adapter_model.safetensors or adapter_model.bin."""

    def __init__(self, folder: Path) -> None:
        """Read the folder; tensors stay mapped to the file.

        Raises:
            HelpersError: files missing or damaged, not a plain LoRA, or half of an A, B pair missing.
        """
        from .convert import open_shard

        self.folder = folder
        try:
            self.settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _refuse(folder, f"adapter_config.json cannot be read ({type(error).__name__})") from None
        wanted = {"peft_type": "LORA", "fan_in_fan_out": False, "bias": "none", "use_dora": False, "use_rslora": False}
        wanted |= {"rank_pattern": {}, "alpha_pattern": {}}  # another scale for some matrices
        for key, value in wanted.items():
            if (self.settings.get(key) or value) != value:
                raise _refuse(folder, f"{key}={self.settings[key]!r} is not a plain LoRA")
        self.scale = self.settings["lora_alpha"] / self.settings["r"]
        files = [folder / f"adapter_model.{suffix}" for suffix in ("safetensors", "bin")]
        file = next((file for file in files if file.exists()), None)
        if file is None:
            raise _refuse(folder, "there is no adapter_model.safetensors or adapter_model.bin")

        self.low_rank: dict[str, dict[str, Tensor]] = {}
        self.whole: dict[str, Tensor] = {}
        for name, tensor in open_shard(file).items():
            if ".original_module." in name or name.endswith("rotary_emb.inv_freq"):
                continue  # the base's own embedding, which peft may save beside the new one; a buffer of old exports
            if found := LOW_RANK.match(name):
                self.low_rank.setdefault(found["module"] + ".weight", {})[found["half"]] = tensor
            elif found := WHOLE.match(name):
                self.whole[found["module"] + ".weight"] = tensor
            else:
                raise _refuse(folder, f"{name!r} is neither half of a low-rank pair nor a replaced tensor")
        for name, pair in self.low_rank.items():
            if set(pair) != {"A", "B"}:
                raise _refuse(folder, f"{name!r} has only one of lora_A and lora_B")

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """Return the tuned form of the base tensor ``name``; in fp32 inside, in the base's dtype outside.

        Raises:
            HelpersError: the shapes do not belong together, so this adapter was made for another base.
        """
        if name in self.whole:
            whole = self.whole[name].to(tensor.device, tensor.dtype)
            if whole.shape[1:] != tensor.shape[1:] or whole.shape[0] < tensor.shape[0]:
                raise self._other_base(name, tensor, list(whole.shape))
            return whole
        if name in self.low_rank:
            a, b = (self.low_rank[name][half].to(tensor.device).float() for half in "AB")
            if (b.shape[0], a.shape[1]) != tuple(tensor.shape):
                raise self._other_base(name, tensor, [b.shape[0], a.shape[1]])
            return tensor.float().addmm(b, a, alpha=self.scale).to(tensor.dtype)
        return tensor

    def adapt_config(self, original: Original) -> Original:
        """Return the base's config with the adapter's vocabulary size."""
        embedding = self.whole.get("model.embed_tokens.weight")
        return original if embedding is None else original | {"vocab_size": embedding.shape[0]}

    def check_complete(self, names: set[str]) -> None:
        """Raise HelpersError when the adapter tunes a tensor that the base does not have."""
        for name in [*self.low_rank, *self.whole]:
            if name not in names:
                raise _refuse(self.folder, f"it tunes {name!r}, which the base does not have")

    def _other_base(self, name: str, tensor: Tensor, shape: list[int]) -> HelpersError:
        return _refuse(self.folder, f"{name!r} is {list(tensor.shape)} in the base and {shape} in the adapter")


def _refuse(folder: Path, why: str) -> HelpersError:
    return HelpersError(
        f"cannot merge the LoRA in {folder.name}", why, "check that the adapter is whole and was made for this base"
    )
