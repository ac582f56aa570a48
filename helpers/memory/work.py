"""What a forward pass has to do at least: bytes to move, operations to compute.

Counted is what no program can do without: every weight, key and value read once a step, and the multiplications and
additions of matrix products. Activations between two layers are left out, as they need not leave the chip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .parts import weight_bytes
from .shapes import Sized, sized

if TYPE_CHECKING:
    from pathlib import Path

    from ..catalog.models import RwkvShape, TransformerShape

UNPACKED_FROM = 5
"""Tokens in a step from which bitsandbytes unpacks a 4-bit matrix to 16 bit (0.50.2: its own kernel up to 4)."""


@dataclass(frozen=True)
class Work:
    """What one forward pass has to do at least.

    Attributes:
        tokens: that it writes (decode: one a sequence) or reads (prefill).
        operations: multiplications and additions.
        weights: bytes of weights that are read.
        cache: bytes of keys and values (RWKV: of its state) that are read or written.
        unpacking: bytes of 16-bit matrices written and read again because the weights are packed.
    """

    tokens: int
    operations: float
    weights: float
    cache: float = 0.0
    unpacking: float = 0.0

    @property
    def bytes(self) -> float:
        """All bytes that are moved."""
        return self.weights + self.cache + self.unpacking

    @property
    def intensity(self) -> float:
        """Arithmetic intensity: operations for each byte moved."""
        return self.operations / self.bytes


def decode_work(
    model: str | Path | Sized,
    precision: str = "fp16",
    batch: int = 1,
    context: float = 0,
    unpacks: bool = False,
    *,
    group_size: int = 128,
    kv_element: int | None = None,
) -> Work:
    """Return the work of one decode step: one token for each sequence.

    Args:
        model: catalogue id, path of a config.json, or what ``sized`` returned.
        precision: a key of ``parts.BYTES``.
        batch: sequences at once.
        context: tokens of each in the KV cache, the average over an answer.
        unpacks: True for bitsandbytes, in transformers or vLLM, which from ``UNPACKED_FROM`` tokens on writes each nf4
            matrix out in 16 bit before it multiplies.
        group_size: weights that share a scale, of GPTQ and AWQ.
        kv_element: bytes of a number in the KV cache; None for that of what is not quantised.

    Raises:
        HelpersError: no such model.
    """
    about = model if isinstance(model, Sized) else sized(model)
    shape, element = about.shape, 4 if precision == "fp32" else 2
    kept = shape.kv_values_per_token() * (kv_element or element)
    return Work(
        tokens=batch,
        operations=batch * (2.0 * parameters_used(about) + context * attention_operations(shape)),
        weights=weights_read(about, precision, group_size),
        cache=batch * (context * kept + 2 * 4 * shape.state_values()),
        unpacking=2 * shape.matrices() * element if unpacks and _unpacked(precision, batch) else 0.0,
    )


def prefill_work(
    model: str | Path | Sized, precision: str = "fp16", batch: int = 1, prompt: int = 128, unpacks: bool = False
) -> Work:
    """Return the work of reading ``batch`` prompts of ``prompt`` tokens in one pass; else as ``decode_work``.

    Attention is causal, so a token looks at half of the prompt on average. Only the last token of each prompt goes
    through the output layer. Keys and values are written once and read once.
    """
    about = model if isinstance(model, Sized) else sized(model)
    shape, element, tokens = about.shape, 4 if precision == "fp32" else 2, batch * prompt
    head = shape.vocab_size * shape.hidden_size
    return Work(
        tokens=tokens,
        operations=2.0 * (tokens * shape.matrices() + batch * head) + tokens * prompt / 2 * attention_operations(shape),
        weights=weights_read(about, precision),
        cache=2 * (tokens * shape.kv_values_per_token() * element + batch * 4 * shape.state_values()),
        unpacking=2 * shape.matrices() * element if unpacks and _unpacked(precision, tokens) else 0.0,
    )


def attention_operations(shape: TransformerShape | RwkvShape) -> int:
    """Count the operations of one token for each token it looks at: its score, and its share of the result.

    Every query head does both, whether or not it shares its keys and values with others. RWKV looks at none; the few
    operations on its state are not counted.
    """
    return 0 if shape.kind == "rwkv" else 2 * 2 * shape.heads * shape.head_dim * shape.layers


def parameters_used(about: Sized) -> int:
    """Count the weights one token is multiplied with: the layers' matrices and the output layer."""
    return about.shape.matrices() + about.shape.vocab_size * about.shape.hidden_size


def weights_read(about: Sized, precision: str, group_size: int = 128) -> float:
    """Return the bytes of weights a pass reads: all but the input embedding, where that is not the output layer too."""
    shape, element = about.shape, 4 if precision == "fp32" else 2
    lookup = 0 if getattr(shape, "tied", False) else shape.vocab_size * shape.hidden_size * element
    return weight_bytes(about, precision, group_size, element) - lookup


def _unpacked(precision: str, tokens: int) -> bool:
    return precision.startswith("nf4") and tokens >= UNPACKED_FROM
