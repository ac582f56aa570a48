"""Llama with ALiBi for vLLM: its own Llama with slopes given to its attention, and nothing rotated.

vLLM ran Baichuan until 0.23, with remote code. It finds this class through ``register_vllm``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models import llama

from .alibi import slopes


class AlibiAttention(llama.LlamaAttention):
    """vLLM's Llama attention with ALiBi, which its kernels for CPU and GPU have built in."""

    def __init__(self, *, prefix: str = "", cache_config: Any = None, quant_config: Any = None, **options: Any) -> None:
        """Make Llama's attention, then the inner layer, which takes no slopes from Llama, a second time."""
        super().__init__(prefix=prefix, cache_config=cache_config, quant_config=quant_config, **options)
        first = get_tensor_model_parallel_rank() * self.num_heads  # each rank of several GPUs has some of the heads
        name = f"{prefix}.attn"
        get_current_vllm_config().compilation_config.static_forward_context.pop(name)
        self.attn = Attention(
            self.num_heads,
            self.head_dim,
            self.scaling,
            num_kv_heads=self.num_kv_heads,
            alibi_slopes=slopes(self.total_num_heads)[first : first + self.num_heads],
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=name,
        )

    def _init_rotary_emb(self, config: Any, quant_config: Any) -> None:
        """Make nothing: see ``rotary_emb``."""

    @staticmethod
    def rotary_emb(positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Turn nothing."""
        return query, key


class AlibiDecoderLayer(llama.LlamaDecoderLayer):
    """vLLM's Llama layer around ``AlibiAttention``."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None) -> None:
        """Make the layer."""
        super().__init__(vllm_config, prefix, config, attn_layer_type=AlibiAttention)


class AlibiLlamaForCausalLM(llama.LlamaForCausalLM):
    """vLLM's LlamaForCausalLM with ALiBi; weights, quantisation, LoRA and tensor parallelism are Llama's."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Make the model."""
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=AlibiDecoderLayer)
