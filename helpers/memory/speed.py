"""How fast a loaded model reads a prompt (prefill) and writes an answer (decode)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import HelpersError, unknown
from ..report.record import record

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

REPEATS = 3

DECODING = {"default": "generate", "static": "FastDecoder", "compiled": "a compiled FastDecoder"}
"""Ways to write an answer, and who does it: as it comes, by a recorded step, and that with its kernels fused."""


@dataclass(frozen=True)
class Speed:
    """Speed of one model at one batch size; times in seconds, medians of ``REPEATS`` runs after a warm-up.

    Attributes:
        batch: sequences at once.
        prompt_tokens: tokens of each prompt.
        new_tokens: tokens written to each answer.
        prefill_seconds: one forward pass over the prompts, which fills the KV cache.
        ttft_s: time to first token: an answer of one token.
        tpot_s: time per output token after the first: the rest of a whole answer by ``new_tokens - 1``.
        bytes_per_step: what one decode step has to read: every weight once (of a separate input embedding only the
            rows in use, which are not counted) and the KV cache at its average length. A static cache is read to its
            end, but what lies behind the last token is no use and not counted.
        decoding: a key of ``DECODING``.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    ttft_s: float
    tpot_s: float
    bytes_per_step: int
    decoding: str = "default"

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens read a second, over the whole batch."""
        return self.batch * self.prompt_tokens / self.prefill_seconds

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens written a second after the first ones, over the whole batch."""
        return self.batch / self.tpot_s

    def mbu(self, bandwidth_gb_s: float) -> float:
        """Memory-bandwidth utilisation of decoding, 0 to 1: bytes read a step / time of a step / peak bandwidth.

        Args:
            bandwidth_gb_s: the device's bandwidth in GB/s; say beside the result whether it is the datasheet's or
                one measured by ``copy_bandwidth``.

        Source: https://www.databricks.com/blog/llm-inference-performance-engineering-best-practices
        """
        return self.bytes_per_step / self.tpot_s / (bandwidth_gb_s * 1e9)

    def figures(self, prefix: str = "") -> list[dict[str, Any]]:
        """Return speeds and times with batch and lengths, as arguments of ``record``; named ``<prefix>_<figure>``."""
        prefix = f"{prefix}_" if prefix else ""
        about = {name: getattr(self, name) for name in ("decoding", "batch", "prompt_tokens", "new_tokens")}
        how = DECODING[self.decoding]
        median = f"median of {REPEATS} runs after a warm-up"
        figures = (
            ("prefill_speed", self.prefill_tokens_per_s, "tokens/s", "prompt tokens by one forward pass"),
            ("decode_speed", self.decode_tokens_per_s, "tokens/s", f"new tokens after the first, by {how}, greedy"),
            ("ttft", self.ttft_s, "s", f"time to first token: {how} of one token"),
            ("tpot", self.tpot_s, "s", "time per output token after the first, greedy"),
        )
        return [
            {"name": prefix + name, "value": value, "unit": unit, "definition": f"{what}; {median}", "machine": True}
            | about
            for name, value, unit, what in figures
        ]

    def record(self, prefix: str = "", **about: Any) -> None:
        """Record the figures; ``about`` as for ``helpers.report.record``."""
        for one in self.figures(prefix):
            record(**(one | about))


def generation_speed(
    model: PreTrainedModel,
    prompt_tokens: int = 128,
    new_tokens: int = 128,
    batch: int = 1,
    decoding: str = "default",
) -> Speed:
    """Measure prefill and greedy decoding with random token ids, whatever the model would say.

    The answer is forced to its full length; sampling, stop tokens and the tokenizer have no part in the time.

    Args:
        model: a causal language model, on a CPU or on GPUs.
        prompt_tokens: tokens of each prompt.
        new_tokens: tokens of each answer, at least 2.
        batch: sequences at once.
        decoding: ``"default"`` is ``model.generate``, ``"static"`` and ``"compiled"`` are ``FastDecoder``, whose
            recording and compiling are not counted.

    Raises:
        HelpersError: fewer than 2 new tokens, more tokens than the model's context holds, an unknown decoding, or
            a model that ``FastDecoder`` refuses.
    """
    import torch

    from ..decode import FastDecoder
    from ..native import check_length

    if new_tokens < 2 or prompt_tokens < 1 or batch < 1:
        why = f"prompt_tokens={prompt_tokens}, new_tokens={new_tokens}, batch={batch} leave nothing to time"
        raise HelpersError("cannot measure the speed", why, "take at least 1 prompt token, 2 new tokens and batch 1")
    if decoding not in DECODING:
        raise unknown("decoding", decoding, list(DECODING))
    check_length(model, prompt_tokens + new_tokens)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch, prompt_tokens), generator=draw).to(model.device)
    mask = torch.ones_like(ids)
    decoder = None
    if decoding != "default":
        decoder = FastDecoder(model, prompt_tokens + new_tokens, batch, compiled=decoding == "compiled")

    def prefill() -> None:
        if decoder:
            decoder.prefill(ids, mask)
        else:
            model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1)

    def generate(tokens: int) -> None:
        if decoder:
            out = decoder.generate(ids, mask, tokens, stop=[])
        else:
            lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
            out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, **lengths)
        assert out.shape[1] == prompt_tokens + tokens, "the answer was cut short"

    with torch.inference_mode():
        prefill_seconds = _median_seconds(prefill)
        first = _median_seconds(lambda: generate(1))
        whole = _median_seconds(lambda: generate(new_tokens))
    return Speed(
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        prefill_seconds=prefill_seconds,
        ttft_s=first,
        tpot_s=(whole - first) / (new_tokens - 1),
        bytes_per_step=weight_bytes_read(model) + batch * (prompt_tokens + new_tokens // 2) * kv_bytes_per_token(model),
        decoding=decoding,
    )


def weight_bytes_read(model: PreTrainedModel) -> int:
    """Return the bytes of weights that one decode step reads, quantised ones at their packed size.

    An input embedding that is not also the output layer is looked up row by row and left out.
    """
    total = sum(weight.nbytes for weight in model.parameters())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    return total if tied else total - embedding.weight.nbytes


def kv_bytes_per_token(model: PreTrainedModel) -> int:
    """Return the bytes that one token adds to the KV cache: keys and values of every layer in the model's dtype."""
    return kv_values_per_token(model.config) * model.dtype.itemsize


def kv_values_per_token(config: PreTrainedConfig) -> int:
    """Count the numbers that one token adds to the KV cache; a model without attention heads (RWKV) has none."""
    if not getattr(config, "num_attention_heads", None):
        return 0
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width


def _median_seconds(step: Callable[[], None]) -> float:
    """Run a step once unmeasured, then return the median time of ``REPEATS`` runs, the GPU's work finished."""
    import torch

    def synchronise() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    step()
    times = []
    for _ in range(REPEATS):
        synchronise()
        start = time.perf_counter()
        step()
        synchronise()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
