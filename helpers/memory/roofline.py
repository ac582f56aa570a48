"""The roofline: whether a step waits for memory or for arithmetic, and how near it comes to what the card can do.

Source: Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore
architectures", CACM 52(4), 2009, https://doi.org/10.1145/1498765.1498785.

What a step has to do is counted in work.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..catalog.gpus import find_gpu
from . import predict
from .bandwidth import _median_seconds
from .parts import BYTES
from .speed import kv_bytes_per_token, weight_bytes_read
from .work import Work, decode_work, prefill_work

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from ..catalog.gpus import Gpu
    from ..catalog.measured import MeasuredRow
    from .shapes import Sized
    from .speed import Speed


@dataclass(frozen=True)
class Roof:
    """What a device does at best: ``bandwidth`` in bytes/s, ``rate`` in operations/s."""

    bandwidth: float
    rate: float

    @property
    def balance(self) -> float:
        """The intensity from which arithmetic is the limit, in operations for each byte."""
        return self.rate / self.bandwidth

    def operations_per_s(self, intensity: float) -> float:
        """Return how high the roof is at an intensity."""
        return min(self.rate, self.bandwidth * intensity)

    def seconds(self, work: Work) -> float:
        """Return the least time of a pass: of its reading or of its arithmetic, whichever is longer."""
        return max(work.bytes / self.bandwidth, work.operations / self.rate)

    def tokens_per_s(self, work: Work) -> float:
        """Return the most tokens a second."""
        return work.tokens / self.seconds(work)


def roof_of(card: Gpu, precision: str = "fp16") -> Roof:
    """Return a card's roof from what a copy and a plain matrix product reach on it.

    Recorded on the card itself; else its datasheet's figures times the shares that were recorded on another. Weights
    that are quantised alone are multiplied in 16 bit; with the activations (``predict.MULTIPLIED_IN``), in 8.
    """
    return Roof(predict.bandwidth(card) * 1e9, predict.matmul_rate(card, precision) * 1e12)


def datasheet_roof(card: Gpu) -> Roof:
    """Return the roof that a card's datasheet states for 16 bit, against which MBU and MFU are usually told."""
    return Roof(card.bandwidth_gb_s * 1e9, card.rates.fp16 * 1e12)


def balance_batch(model: str | Path | Sized, precision: str, roof: Roof, context: float = 0) -> int | None:
    """Return the least batch at which a decode step takes as long for its arithmetic as for its reading.

    None where there is no such batch: every sequence brings its own keys and values, and reading them may take longer
    than all its arithmetic.
    """
    one = decode_work(model, precision, 1, context)
    left = one.operations / roof.rate - one.cache / roof.bandwidth  # what a sequence adds to arithmetic over reading
    return math.ceil(one.weights / roof.bandwidth / left) if left > 0 else None


@dataclass(frozen=True)
class Point:
    """A measured speed under the roof.

    Attributes:
        phase: ``"decode"`` or ``"prefill"``.
        how: the engine; of transformers, with its way of decoding.
        work: of one pass.
        seconds: that the pass took.
        card: where.
        row: the recorded row; None for a speed that was not recorded.
    """

    phase: str
    how: str
    work: Work
    seconds: float
    card: Gpu
    row: MeasuredRow

    @property
    def operations_per_s(self) -> float:
        """Operations a second that were reached."""
        return self.work.operations / self.seconds

    @property
    def mbu(self) -> float:
        """Memory-bandwidth utilisation: bytes moved a second, as a share of the datasheet's."""
        return self.work.bytes / self.seconds / datasheet_roof(self.card).bandwidth

    @property
    def mfu(self) -> float:
        """Model FLOPS utilisation: operations a second, as a share of the datasheet's dense 16-bit rate."""
        return self.operations_per_s / datasheet_roof(self.card).rate

    @property
    def share(self) -> float:
        """The roof's least time as a share of the time taken: how near to the roof the point is, 0 to 1."""
        return roof_of(self.card, self.row.precision).seconds(self.work) / self.seconds


def point_of(row: MeasuredRow) -> Point | None:
    """Return where a recorded ``decode_speed`` or ``prefill_speed`` lies; None for any other row.

    Others are those of a stand-in, of several cards, of a device that the catalogue lacks, of a precision that is not
    sized here, or without lengths.
    """
    card, precision = find_gpu(row.device), row.precision
    spread = row.parallel or row.requests_per_s or row.weights not in ("random", "hub")
    if spread or card is None or precision not in BYTES or not (row.batch and row.prompt_tokens):
        return None
    how = row.engine if row.engine != "transformers" else f"{row.engine}, {row.decoding or 'default'}"
    given = {"batch": row.batch, "unpacks": True}  # nf4 alone, which bitsandbytes computes in vLLM as well
    if row.name == "decode_speed":
        work = decode_work(row.model, precision, context=row.prompt_tokens + (row.new_tokens or 0) / 2, **given)
    elif row.name == "prefill_speed":
        work = prefill_work(row.model, precision, prompt=row.prompt_tokens, **given)
    else:
        return None
    return Point(row.name.removesuffix("_speed"), how, work, work.tokens / row.value, card, row)


def work_of_loaded(model: PreTrainedModel, speed: Speed) -> tuple[Work, Work]:
    """Return the work of prefill and of a decode step of a loaded model, with the lengths of a measured speed."""
    head = model.get_output_embeddings()
    sizes = {
        id(module): module.in_features * module.out_features
        for module in model.modules()
        if hasattr(module, "in_features") and hasattr(module, "out_features")
    }
    last = sizes.pop(id(head), 0)
    config, layers = model.config, sum(sizes.values())
    heads = getattr(config, "num_attention_heads", None) or 0
    width = heads * (getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0))
    looking = 2 * 2 * width * config.num_hidden_layers  # as attention_operations
    weights, kv, batch, prompt = weight_bytes_read(model), kv_bytes_per_token(model), speed.batch, speed.prompt_tokens
    read = 2.0 * (batch * prompt * layers + batch * last) + batch * prompt**2 / 2 * looking
    context = prompt + speed.new_tokens / 2
    return (
        Work(batch * prompt, read, weights, 2.0 * batch * prompt * kv),
        Work(batch, batch * (2.0 * (layers + last) + context * looking), weights, batch * context * kv),
    )


def matrix_under_the_roof(
    batches: Sequence[int], dtype: str = "fp32", size: int | None = None, device: str = "auto"
) -> dict[int, tuple[Work, float]]:
    """Multiply one matrix, as a layer does, with more and more tokens at once: {tokens: (work, seconds)}.

    The matrix is far larger than any cache, so every product reads it from memory.

    Args:
        batches: numbers of tokens.
        dtype: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        size: of its rows and columns; 6144 on a CPU (144 MiB in fp32) and 16384 on a GPU (512 MiB in 16 bit) when None.
        device: as ``load``.
    """
    import torch

    from ..checkpoints.load import pick_device

    device = pick_device(device)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    size = size or (6144 if device == "cpu" else 16384)
    matrix = torch.randn(size, size, dtype=kind, device=device)
    found = {}
    for tokens in batches:
        given = torch.randn(tokens, size, dtype=kind, device=device)
        out = torch.empty_like(given)
        seconds = _median_seconds(lambda given=given, out=out: torch.matmul(given, matrix.T, out=out), device, None)
        work = Work(tokens, 2.0 * tokens * size**2, matrix.nbytes, given.nbytes + out.nbytes)
        found[tokens] = (work, seconds)
    return found
