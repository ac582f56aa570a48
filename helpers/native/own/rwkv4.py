"""RWKV-4, whose class lies beside those of the later versions; see ``rwkv``."""

from .rwkv import Rwkv4Config, Rwkv4ForCausalLM

__all__ = ["Rwkv4Config", "Rwkv4ForCausalLM"]
