"""How one tensor of an original checkpoint becomes tensors of a native one, and back.

A family describes itself as a short table of rules. Each rule takes ONE original tensor to one or more native
tensors, so a checkpoint can be converted tensor by tensor, in whatever order its files hold them. The same table
read backwards writes a native model in the original layout; the makers of the tiny stand-ins use that.

``{i}`` in a name stands for the layer number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """One row of a family's table.

    Attributes:
        source: name in the original checkpoint, e.g. ``"model.layers.{i}.self_attn.W_pack.weight"``.
        targets: names in the native checkpoint, in the order ``split`` returns them; none drops the tensor.
        split: original tensor -> list of native tensors. It must not read values when given a meta tensor.
        join: list of native tensors -> original tensor.
    """

    source: str
    targets: tuple[str, ...]
    split: Callable[[Tensor], list[Tensor]]
    join: Callable[[list[Tensor]], Tensor]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.source).replace(r"\{i\}", r"(?P<i>\d+)") + r"\Z")

    def match(self, name: str) -> tuple[str, ...] | None:
        """Return the native names for an original name, or None when the rule is not about it."""
        found = self._pattern.match(name)
        if found is None:
            return None
        layer = found.groupdict().get("i")
        return tuple(target.replace("{i}", layer or "") for target in self.targets)


def rename(source: str, target: str) -> Rule:
    """Give a tensor another name; its values stay."""
    return Rule(source, (target,), lambda tensor: [tensor], lambda parts: parts[0])


def keep(*names: str) -> list[Rule]:
    """Take over tensors under the names they have."""
    return [rename(name, name) for name in names]


def drop(source: str) -> Rule:
    """Leave a tensor out: the native class computes it (rotary frequencies, causal masks)."""
    return Rule(source, (), lambda tensor: [], lambda parts: None)


def split_rows(source: str, targets: Sequence[str], sizes: Sequence[int]) -> Rule:
    """Cut a fused projection ``[sum(sizes), in]`` (or its bias ``[sum(sizes)]``) into consecutive blocks of rows."""
    import torch

    return Rule(source, tuple(targets), lambda tensor: list(torch.split(tensor, list(sizes))), torch.cat)


def split_grouped(source: str, targets: Sequence[str], heads: int, kv_heads: int, head_dim: int) -> Rule:
    """Cut a fused projection stored group by group, as InternLM2 does.

    Rows lie as ``[kv_heads, heads / kv_heads + 2, head_dim]``: for every key-value head its query heads, then the
    key, then the value.
    """
    import torch

    queries = heads // kv_heads

    def split(tensor: Tensor) -> list[Tensor]:
        groups = tensor.reshape(kv_heads, queries + 2, head_dim, *tensor.shape[1:])
        parts = groups[:, :queries], groups[:, queries], groups[:, queries + 1]
        return [part.reshape(-1, *tensor.shape[1:]) for part in parts]

    def join(parts: list[Tensor]) -> Tensor:
        query, key, value = (part.reshape(kv_heads, -1, head_dim, *part.shape[1:]) for part in parts)
        return torch.cat([query, key, value], dim=1).reshape(-1, *parts[0].shape[1:])

    return Rule(source, tuple(targets), split, join)


def unit_rows(source: str, target: str) -> Rule:
    """Scale every row to length 1 once, in fp32: Baichuan 2 does so in every forward pass (its NormHead)."""
    import torch

    def split(tensor: Tensor) -> list[Tensor]:
        scaled = torch.empty_like(tensor)
        for rows, place in zip(tensor.split(4096), scaled.split(4096), strict=True):  # all at once in fp32: 4 GB more
            place.copy_(torch.nn.functional.normalize(rows.float(), dim=-1))
        return [scaled]

    return Rule(source, (target,), split, lambda parts: parts[0])
