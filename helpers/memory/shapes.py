"""What the estimator knows of a model before it is loaded: its shape, from the catalogue or from a config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import catalog
from ..errors import HelpersError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..catalog.models import Model, RwkvShape, TransformerShape

CLASSES = {
    "llama": "LlamaForCausalLM",
    "alibi_llama": "AlibiLlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "glm": "GlmForCausalLM",
    "chatglm1": "ChatGLM1ForCausalLM",
    "rwkv": "Rwkv4ForCausalLM",
    "rwkv_world": "RwkvWorldForCausalLM",
}
"""``model_type`` of a native config.json that can be sized, and its class."""


@dataclass(frozen=True)
class Sized:
    """A model as the estimator sees it.

    Attributes:
        name: as in titles.
        shape: sizes in numbers of values.
        native_class: name of the class that runs it.
        dtype: ``"fp16"`` or ``"bf16"``, its published type.
        context: tokens it was made for.
    """

    name: str
    shape: TransformerShape | RwkvShape
    native_class: str | None
    dtype: str
    context: int

    @classmethod
    def of(cls, row: Model) -> Sized:
        """Take what the catalogue says."""
        return cls(row.name, row.shape, row.native_class, row.dtype, row.context)

    @property
    def fused(self) -> bool:
        """True where gate and up projection of the MLP are one matrix (GLM)."""
        return self.native_class == "GlmForCausalLM"

    def largest_matrix(self) -> int:
        """Count the weights of the largest matrix that is quantised: of the MLP."""
        return self.shape.hidden_size * self.shape.ffn_size * (2 if self.fused else 1)

    def linears(self) -> int:
        """Count the quantised matrices of the whole model."""
        if self.shape.kind == "rwkv":
            return self.shape.layers * {4: 7, 5: 8, 6: 8, 7: 6}[self.shape.version]
        mlp = 2 if self.shape.mlp == "plain" or self.fused else 3
        return self.shape.layers * (mlp + (2 if self.native_class == "ChatGLM1ForCausalLM" else 4))

    def rows_and_columns(self) -> tuple[int, int]:
        """Sum the output rows and the input columns of all quantised matrices; int8 and GPTQ keep something of each."""
        shape = self.shape
        hidden, ffn = shape.hidden_size, shape.ffn_size
        if shape.kind == "rwkv":
            squares = self.linears() - 2 * shape.layers
            return squares * hidden + shape.layers * (ffn + hidden), squares * hidden + shape.layers * (hidden + ffn)
        width, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        wide = (2 if shape.mlp == "gated" else 1) * ffn
        mlp_inputs = (1 if self.fused or shape.mlp == "plain" else 2) * hidden + ffn
        qkv_inputs = (1 if self.native_class == "ChatGLM1ForCausalLM" else 3) * hidden
        return shape.layers * (width + 2 * kv + hidden + wide + hidden), shape.layers * (
            qkv_inputs + width + mlp_inputs
        )


def sized(model: str | Path) -> Sized:
    """Look a model up.

    Args:
        model: a catalogue id; a config.json or a folder with one; or ``owner/name`` on Hugging Face, of which only
            config.json is fetched unless the catalogue has it.

    Raises:
        HelpersError: no such model or file, or a class that cannot be sized (the ones that can are listed).
    """
    rows = catalog.models()
    known = {row.repositories.huggingface: id for id, row in rows.items()}
    id = known.get(str(model), str(model))
    if id in rows:
        return Sized.of(rows[id])
    path = Path(model)
    if not path.exists():
        if str(model).count("/") != 1:
            raise unknown("model", str(model), [*rows, "the path of a config.json", "owner/name on Hugging Face"])
        path = _from_hub(str(model))
    return from_config(path)


def from_config(path: Path) -> Sized:
    """Read a config.json, of a native class or of an original checkpoint that can be converted; no remote code.

    Args:
        path: the file, or its folder; of a raw RWKV the folder of its .pth file, which has no config.json.

    Raises:
        HelpersError: there is none, or its class cannot be sized.
    """
    from ..native import native_config
    from ..native.convert import has_family, read_config

    settings = read_config(path) if path.is_dir() else _read_file(path)
    kind = settings.get("model_type")
    if kind not in CLASSES and not has_family(settings):
        why, known = f"its model_type {kind!r} is of no class known here", ", ".join(CLASSES)
        raise HelpersError(f"cannot size {path}", why, f"take an original checkpoint of the series, or one of {known}")
    config = native_config(settings)
    dtype = str(settings.get("dtype") or settings.get("torch_dtype") or "bfloat16")
    return Sized(
        (path if path.is_dir() else path.parent).name or str(path),
        shape_of(config),
        CLASSES[config.model_type],
        "fp16" if dtype == "float16" else "bf16",
        config.max_position_embeddings,
    )


def _read_file(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = None
    if not isinstance(settings, dict):
        why = "it is not there, not JSON, or holds no settings by name"
        raise HelpersError(f"cannot read {path}", why, "pass the config.json of a checkpoint")
    return settings


def shape_of(config: PreTrainedConfig) -> TransformerShape | RwkvShape:
    """Return the shape of a native config of one of ``CLASSES``."""
    from ..catalog.models import TransformerShape

    kind = config.model_type
    if kind.startswith("rwkv"):
        return _rwkv_shape(config)
    heads = config.num_attention_heads
    biased = bool(getattr(config, "attention_bias", False))
    own: dict[str, Any] = {}
    if kind == "chatglm1":
        own = {"mlp": "plain", "norm": "layer", "mlp_bias": True, "positions": "rope-2d"}
    elif kind == "alibi_llama":
        own = {"positions": "alibi"}
    return TransformerShape(
        kind="transformer",
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        ffn_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        qk_norm=kind == "qwen3",
        qkv_bias=biased or kind in ("qwen2", "chatglm1"),
        output_bias=(biased and kind in ("llama", "qwen3")) or kind == "chatglm1",
        tied=bool(config.tie_word_embeddings),
        rope_theta=None if kind == "alibi_llama" else 10000,  # no size depends on it
        **({"mlp_bias": bool(getattr(config, "mlp_bias", False))} | own),
    )


def _rwkv_shape(config: PreTrainedConfig) -> RwkvShape:
    from ..catalog.models import RwkvShape

    version = getattr(config, "version", 4)
    ranks = {6: ("mix", "decay"), 7: ("decay", "rate", "value", "gate")}.get(version, ())
    return RwkvShape(
        kind="rwkv",
        version=version,
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        head_size=None if version == 4 else config.head_size,
        ffn_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        ranks={rank: getattr(config, f"{rank}_rank") for rank in ranks},
    )


def _from_hub(repository: str) -> Path:
    from httpx import HTTPError
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, "config.json"))
    except (OSError, HTTPError, ValueError) as error:
        why = f"the hub gave no config.json ({type(error).__name__})"
        fix = "check the name and the network, or pass the path of a config.json"
        raise HelpersError(f"cannot size {repository}", why, fix) from None
