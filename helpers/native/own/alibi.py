"""Llama with ALiBi instead of rotary positions: the network of Baichuan-13B and Baichuan2-13B.

ALiBi (arXiv 2108.12409) adds ``slope * place of the key`` to every score, with one slope a head: the further back a
key lies, the less it counts. (The paper writes ``-slope * distance``; the difference is the same for all keys of a
query, which softmax does not see.) The bias is a product, so it becomes part of the dot product:

    score + slope * place  =  [query, slope] . [key, place]

Queries and keys get eight columns more, and a kernel of plain attention that takes values of another width does the
rest: on a GPU the memory-efficient one, on a CPU so far only the one that writes all scores out. As a tensor that is
added, the bias would have heads x queries x keys numbers (1.3 GB in 16 bits for the 40 heads of a 13B model at 4,096
tokens), and attention with it took 12 times as long on an H100. ``slope * place`` alone, a number a key, is small but
wrong in 16 bits: near 3,000, bf16 has no two numbers less than 16 apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, LlamaModel, initialization
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

from ...errors import HelpersError

COLUMNS = 8
"""Added to the width of a head: two hold numbers, and fast kernels want multiples of eight."""

STEP = 64
"""A place is written as STEP * high + low: 16-bit types hold both exactly, but not every integer up to 4,096."""

PREFIX = "alibi_"
"""Before the name of each of transformers' attention functions used here."""


def slopes(heads: int) -> list[float]:
    """Return the slope of each head: 2 ** (-8 i / n) for i = 1..n, n the largest power of two within ``heads``.

    Any more heads take every second slope of a model with 2 n heads, as the paper's and Baichuan's code do.
    """
    whole = 1 << (heads.bit_length() - 1)
    powers = [8 * (i + 1) / whole for i in range(whole)] + [4 * (2 * i + 1) / whole for i in range(heads - whole)]
    return [2**-power for power in powers]


def columns(config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Return what queries ``[1, heads, 1, COLUMNS]`` and keys ``[1, 1, tokens, COLUMNS]`` get, in fp32.

    Scores are divided by the root of head_dim later, so slopes are multiplied by it here.
    """
    slope = torch.tensor(slopes(config.num_attention_heads), dtype=torch.float32) * config.head_dim**0.5
    place = torch.arange(config.max_position_embeddings, dtype=torch.float32)
    query = torch.stack([slope * STEP, slope], dim=-1)[None, :, None]
    key = torch.stack([place // STEP, place % STEP], dim=-1)[None, None]
    return pad(query, (0, COLUMNS - 2)), pad(key, (0, COLUMNS - 2))


def add_columns(layer: LlamaAttention, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Put the layer's columns behind queries and keys, each ``[batch, heads, tokens, head_dim]``."""
    if key.shape[2] > (limit := layer.places.shape[2]):
        raise HelpersError(f"{key.shape[2]} tokens are too many", f"this model ends at {limit}", "shorten the prompt")
    behind_query = layer.slopes.to(query.dtype).expand(query.shape[0], -1, query.shape[2], -1)
    behind_key = layer.places[:, :, : key.shape[2]].to(key.dtype).expand(*key.shape[:2], -1, -1)
    return torch.cat([query, behind_query], dim=-1), torch.cat([key, behind_key], dim=-1)


def sdpa(
    layer: LlamaAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Do as transformers' ``sdpa_attention_forward``, with ALiBi."""
    return sdpa_attention_forward(layer, *add_columns(layer, query, key), value, mask, **options)


def eager(
    layer: LlamaAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Do as transformers' ``eager_attention_forward``, with ALiBi.

    In fp32, as its scores lie in memory and reach 0.84 * 4,096. (The kernels behind ``sdpa`` add them up in fp32.)
    """
    long = [part.float() for part in (*add_columns(layer, query, key), value)]
    output, weights = eager_attention_forward(layer, *long, mask, **options)
    return output.to(query.dtype), weights


for name, function, mask in (("sdpa", sdpa, sdpa_mask), ("eager", eager, eager_mask)):
    AttentionInterface.register(PREFIX + name, function)
    AttentionMaskInterface.register(PREFIX + name, mask)


class NoRotation(nn.Module):
    """Stands where Llama computes rotary angles, and turns nothing: cos is 1 and sin is 0."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin as ``[1, 1, 1]``, for queries and keys of any shape."""
        return x.new_ones(1, 1, 1), x.new_zeros(1, 1, 1)


class AlibiLlamaConfig(LlamaConfig):
    """LlamaConfig under a name of its own; what it says of rotary positions is not used."""

    model_type = "alibi_llama"
    alibi = True  # vLLM asks: kernels that share a common beginning have no slopes
    base_model_tp_plan = None  # it would share out heads, and leave every slope on every device


class Alibi:
    """What the two model classes share: their config, and the attention they accept."""

    config_class = AlibiLlamaConfig

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Lead every request to a function of this file: any other would leave the positions out without a word.

        Raises:
            HelpersError: an ``attn_implementation`` other than ``sdpa`` and ``eager``.
        """
        name = (requested_attention or "sdpa").removeprefix(PREFIX)
        if name not in ("sdpa", "eager"):
            raise HelpersError(f"no attention {name!r} for this model", "it has no ALiBi here", "take sdpa or eager")
        return PREFIX + super().get_correct_attn_implementation(name, is_init_check)


class AlibiLlamaModel(Alibi, LlamaModel):
    """LlamaModel with ALiBi in the place of rotary positions."""

    def __init__(self, config: AlibiLlamaConfig) -> None:
        """Make a Llama; give each attention layer its columns."""
        super().__init__(config)
        self.rotary_emb = NoRotation()
        for layer in self.layers:
            for name, values in zip(("slopes", "places"), columns(config), strict=True):
                layer.self_attn.register_buffer(name, values, persistent=False)

    def _init_weights(self, module: nn.Module) -> None:
        """Fill in the columns again: loading makes models without values, and no checkpoint holds these."""
        super()._init_weights(module)
        if isinstance(module, LlamaAttention) and hasattr(module, "slopes"):
            for buffer, values in zip((module.slopes, module.places), columns(self.config), strict=True):
                initialization.copy_(buffer, values)


class AlibiLlamaForCausalLM(Alibi, LlamaForCausalLM):
    """LlamaForCausalLM with ALiBi: the class of converted Baichuan-13B and Baichuan2-13B checkpoints."""

    def __init__(self, config: AlibiLlamaConfig) -> None:
        """Make a Llama around an ``AlibiLlamaModel``."""
        super().__init__(config)
        self.model = AlibiLlamaModel(config)
        self.post_init()
