"""Small classes of our own for the architectures that transformers has no class of, or one that falls short (RWKV-4).

Once ``register`` ran, ``AutoConfig`` and ``AutoModelForCausalLM`` read a converted folder of theirs like any other.
``load`` and ``convert`` call it; who reads such a folder without them calls it first:

    from helpers.native import register
    register()
    AutoModelForCausalLM.from_pretrained("path/to/native")
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLASSES: dict[str, tuple[str, str]] = {
    "chatglm1": ("ChatGLM1Config", "ChatGLM1ForCausalLM"),
    "alibi": ("AlibiLlamaConfig", "AlibiLlamaForCausalLM"),
    "rwkv": ("RwkvWorldConfig", "RwkvWorldForCausalLM"),
    "rwkv4": ("Rwkv4Config", "Rwkv4ForCausalLM"),
}
"""Module of this package -> names of its config and model classes. The config's ``model_type`` is its own."""

TOKENIZERS: dict[str, tuple[str, str]] = dict.fromkeys(["rwkv", "rwkv4"], ("world_tokenizer", "RwkvWorldTokenizer"))
"""Module of a model above -> module and class of its tokenizer, where that is one of ours too."""


@cache
def register() -> None:
    """Make the classes known to transformers; a second call does nothing."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    for module, (config_name, model_name) in CLASSES.items():
        classes = import_module(f".{module}", __name__)
        config_class, model_class = getattr(classes, config_name), getattr(classes, model_name)
        # exist_ok: transformers has a class for RWKV-4, whose place ours takes
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class)
        if module in TOKENIZERS:
            file, name = TOKENIZERS[module]
            AutoTokenizer.register(config_class, getattr(import_module(f".{file}", __name__), name))


def register_vllm() -> None:
    """Make the classes known to vLLM, and their configs to the transformers beside it.

    vLLM calls this in each of its processes: it is the entry point ``vllm.general_plugins`` of pyproject.toml, found
    where this package is installed. In a process of one's own it can be called by hand, before ``vllm.LLM``.
    """
    from vllm import ModelRegistry

    register()
    ModelRegistry.register_model("AlibiLlamaForCausalLM", f"{__name__}.alibi_vllm:AlibiLlamaForCausalLM")


def model_class(name: str) -> type[PreTrainedModel]:
    """Return the class that a catalogue row calls ``native_class``, of ours or of transformers."""
    import transformers

    for module, (_, model_name) in CLASSES.items():
        if model_name == name:
            return getattr(import_module(f".{module}", __name__), name)
    return getattr(transformers, name)
