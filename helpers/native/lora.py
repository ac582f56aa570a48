"""Published LoRA adapters (Chinese-LLaMA-Alpaca), merged into their base while it is converted.

An adapter holds, for some matrices W of its base, a pair A ``[r, in]`` and B ``[out, r]``: the tuned model uses
W + (lora_alpha / r) B A (arXiv 2106.09685, section 4.1). Chinese-LLaMA-Alpaca also replaces the input and output
embeddings whole, since its vocabulary is larger than Llama's (arXiv 2304.08177, section 2). Its Plus and Pro editions
are two adapters: the second was trained on what the first makes of the base, so they are merged in that order.

Which base an adapter belongs to can only partly be known. ``base_model_name_or_path`` in its adapter_config.json is
where the base lay on its author's disk. Names, shapes and vocabularies are compared here, and that finds every base of
another size, and Plus adapters in the wrong order. Another base of the same shapes (Llama 2 for LLaMA) merges without
a word. What the authors publish against that are checksums: SHA256.md of ymcui/Chinese-LLaMA-Alpaca.
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

MODULE = r"base_model\.model\.(?P<module>.+?)(\.base_layer|\.modules_to_save)?"
LOW_RANK = re.compile(MODULE + r"\.lora_(?P<embedding>embedding_)?(?P<half>[AB])(\.default)?(\.weight)?\Z")
WHOLE = re.compile(MODULE + r"(\.default)?\.weight\Z")

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
"""Tensors with a row for each token."""


def folder_names(count: int) -> list[str]:
    """Name the folders of adapters beside their base: ``lora`` for one, or ``lora-1``, ``lora-2`` as they merge."""
    return ["lora"] if count == 1 else [f"lora-{number}" for number in range(1, count + 1)]


def base_and_adapters(folder: Path) -> tuple[Path, list[Path]]:
    """Split a folder into its base (``base/``) and its adapters, in merging order; without ``base/`` it is whole.

    Raises:
        HelpersError: the adapters' folders are not named as ``folder_names`` does.
    """
    if not (folder / "base").is_dir():
        return folder, []
    found = sorted(path.name for path in folder.glob("lora*") if path.is_dir())
    if found != folder_names(len(found)):
        raise HelpersError(
            f"cannot tell the order of the adapters in {folder.name}",
            f"they are in {', '.join(found)}",
            "name one adapter lora, or several lora-1, lora-2 in the order they are merged",
        )
    return folder / "base", [folder / name for name in found]


class Adapter:
    """One peft LoRA folder: adapter_config.json with adapter_model.safetensors or adapter_model.bin."""

    def __init__(self, folder: Path) -> None:
        """Read the folder's settings, and what its tensors are; their values are read when they are merged.

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
        self.file = next((file for file in files if file.exists()), None)
        if self.file is None:
            raise _refuse(folder, "there is no adapter_model.safetensors or adapter_model.bin")

        self.low_rank: dict[str, dict[str, str]] = {}
        self.whole: dict[str, str] = {}
        self.rows: dict[str, int] = {}
        for name, tensor in open_shard(self.file).items():
            if ".original_module." in name or name.endswith("rotary_emb.inv_freq"):
                continue  # the base's own embedding, which peft may save beside the new one; a buffer of old exports
            if found := LOW_RANK.match(name):
                # peft holds an embedding's pair the other way round: A [r, tokens] and B [width, r] add (B A)^T.
                half = {"A": "B", "B": "A"}[found["half"]] if found["embedding"] else found["half"]
                self.low_rank.setdefault(found["module"] + ".weight", {})[half] = name
            elif found := WHOLE.match(name):
                self.whole[found["module"] + ".weight"] = name
                self.rows[found["module"] + ".weight"] = len(tensor)
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
        import torch

        from .convert import open_shard

        if name not in self.whole and name not in self.low_rank:
            return tensor
        stored = open_shard(self.file)  # a map of its own: the pages that are read here go with it
        if name in self.whole:
            whole = stored[self.whole[name]].to(tensor.device, tensor.dtype)
            if whole.shape[1:] != tensor.shape[1:] or whole.shape[0] < tensor.shape[0]:
                raise self._other_base(name, tensor, list(whole.shape))
            tensor = whole
        if name in self.low_rank:
            a, b = (self._half(name, half, stored).to(tensor.device).float() for half in "AB")
            if (b.shape[0], a.shape[1]) != tuple(tensor.shape):
                raise self._other_base(name, tensor, [b.shape[0], a.shape[1]])
            merged, some = torch.empty_like(tensor), 1 + 2**22 // tensor.shape[1]  # all rows in fp32: 0.4 GB more
            for rows, tall, place in zip(tensor.split(some), b.split(some), merged.split(some), strict=True):
                place.copy_(rows.float().addmm(tall, a, alpha=self.scale))
            tensor = merged
        return tensor

    def _half(self, name: str, half: str, stored: dict[str, Tensor]) -> Tensor:
        key = self.low_rank[name][half]
        return stored[key].T if ".lora_embedding_" in key else stored[key]

    def adapt_config(self, original: Original) -> Original:
        """Return the base's config with the adapter's vocabulary size.

        Raises:
            HelpersError: the vocabulary would shrink, or grow on one side only; or the base ties its head to its
                embeddings, and the adapter touches one of them: it does not say whether they stay tied.
        """
        touched = [name for name in EMBEDDINGS if name in self.whole or name in self.low_rank]
        if touched and original.get("tie_word_embeddings", False):
            raise HelpersError(
                f"cannot merge the LoRA in {self.folder.name}",
                f"it changes {' and '.join(touched)}, and the base has one tensor for embeddings and head "
                "(tie_word_embeddings), so what becomes of the other is not said",
                "untie the base first: store lm_head.weight beside the embeddings and set tie_word_embeddings to false",
            )
        rows = {name: self.rows[name] for name in EMBEDDINGS if name in self.rows}
        before = original.get("vocab_size")
        if before is None or not rows:
            return original
        new = rows | {name: before for name in EMBEDDINGS if name not in rows}
        if len(set(new.values())) > 1:
            sizes = ", ".join(f"{name} would have {count} rows" for name, count in new.items())
            raise _refuse(self.folder, f"embeddings and head must have a row for each token, and {sizes}")
        if max(new.values()) < before:
            raise HelpersError(
                f"cannot merge the LoRA in {self.folder.name}",
                f"it has {max(new.values())} tokens, and what it is merged into has {before}; a vocabulary only grows",
                "check the order of the adapters (Chinese-LLaMA-Plus comes before Chinese-Alpaca-Plus or -Pro), and "
                "that this one was made for this base",
            )
        return original | {"vocab_size": max(new.values())}

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
