"""How fast a model will be on a card: the time to read what a step needs, or to multiply, and to start its kernels.

The default ``generate`` asks for over a thousand operations a token from Python, one after another (notebook 11 counts
them), so its speed is the host's. In a recorded step nobody asks, but each kernel still takes a moment to begin and
end, and kernels come one after another: that moment times their number is added to the time for reading. vLLM has
fewer kernels in a layer, as they are joined; bitsandbytes' int8 it runs without a graph, from Python too.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import catalog
from ..catalog.gpus import find_gpu
from .parts import BYTES
from .work import UNPACKED_FROM, decode_work, prefill_work

if TYPE_CHECKING:
    from ..catalog.gpus import Gpu
    from .parts import Setting
    from .shapes import Sized

REQUESTS = {
    "LlamaForCausalLM": (38, 16),
    "Qwen2ForCausalLM": (38, 16),
    "Qwen3ForCausalLM": (50, 16),
    "GlmForCausalLM": (41, 16),
    "AlibiLlamaForCausalLM": (40, 12),
    "ChatGLM1ForCausalLM": (26, 59),
    4: (39, 4),
    5: (42, 4),
    6: (67, 4),
    7: (76, -3),  # its first layer has no value to blend in
}
"""Operations that PyTorch is asked for in one decode step: of each layer, and beside. Numbers are RWKV's versions."""

FITTED = {
    # tpot of the 16-bit rows, H100 80GB HBM3, 2026-11; of models that tests/test_estimate.py does not hold out
    "share": 0.867,  # of a copy's bandwidth, at which a step reads; with the next, least squares over the static rows
    "kernel": 2.91e-6,  # seconds for each operation of a recorded step
    "vllm layer": 28e-6,  # seconds for a layer's kernels in vLLM 0.26; at batch 1 to 32 24.7 to 35.3, median 29.1
    "vllm sequence": 4.8e-6,  # seconds for each sequence of a step: sampling, the host; three 16-bit rows at batch 256
    "request": 17.5e-6,  # seconds; median of the default rows at batch 1
    "request, least": 12.5e-6,  # least and most over the rows (14.3, 33.8), a tenth wider: the host's day
    "request, most": 37e-6,
    "nf4 matrix": 26e-6,  # more for each bitsandbytes 4-bit matrix; median of the fitted nf4 rows
    "nf4 pace": 0.41,  # of the share: bitsandbytes' own 4-bit kernel, least squares over seven static rows (0.30-0.52)
    "gptq kernel": 7.4e-6,  # seconds more for each matrix of a recorded step, GPTQModel's Marlin: median of six fitted
    "int8 matrix": 314e-6,  # more for each int8 matrix: the host waits for the outliers; two rows, none held out
}

VLLM_MATRIX = {"fp8": 2.5e-6, "w8a8": 2.5e-6, "gptq-int4": 12e-6, "awq-int4": 12e-6, "nf4": 9e-6, "nf4-double": 9e-6}
"""Seconds more for each of a layer's four matrices in vLLM 0.26 on an H100: what is multiplied is quantised first (8
bit), or Machete, its kernel for 4 bit, is slow for few rows. Rounded from qwen-7b at batch 1, so none is held out:
2.9 and 3.6 microseconds at 8 bit, 12.4 and 13.2 at 4; more at larger batches. Of nf4 (bitsandbytes' kernels, as in
transformers) rounded from the rows of three fitted models: 5 to 7 at batch 1, 6 to 19 at 8 and 32, 32 to 36 at 256."""

COMPILED_KERNELS = 0.37
"""Share of a recorded step's operations that torch.compile leaves; fitted on the compiled rows, H100, 2026-11."""

MATMUL_SHARE = 0.7
"""Share of a plain matrix product's rate that a step of many sequences reaches."""

PREFILL_SHARE = 0.55
"""The same of a long prompt, attention included: median over the rows of 1,984 and 8,128 tokens, 0.55."""

PREFILL_SOURCE = "whole prompt at once; above some hundred tokens bound by compute"

PREFILL_SHARES = {"int8": 0.17, "gptq-int4": 0.33}
"""What PREFILL_SHARE is in transformers where the matrices are in 8 or 4 bits: bitsandbytes looks for outliers and
multiplies twice (in vLLM as well), Marlin unpacks every weight for each tile of rows. At 1,984 tokens; medians of the
fitted models' rows (0.16, 0.17; 0.33 to 0.34)."""

MULTIPLIED_IN = {"fp8": "fp8", "w8a8": "int8"}
"""Precisions whose activations are quantised too, and the number format that tensor cores then multiply. (In vLLM;
transformers unpacks such weights to 16 bit at their first use.)"""


@dataclass(frozen=True)
class Decode:
    """Tokens a second over the whole batch, and what the time goes to."""

    expected: float
    least: float
    most: float
    bound: str


def decode_range(about: Sized, run: Setting, card: Gpu) -> Decode:
    """Predict decode speed; launch-bound speeds come with the range that one host showed."""
    work = decode_work(
        about,
        run.precision,
        run.batch,
        (run.prompt + run.context) / 2,
        unpacks=True,  # nf4, which bitsandbytes computes in vLLM as well
        group_size=run.group_size,
        kv_element=run.kv_element,
    )
    share = FITTED["share"] * bandwidth(card) * 1e9
    reading, kernels = (work.weights + work.unpacking + slowed(about, run)) / share, kernel_seconds(about, run)
    multiplying = work.operations / (matmul_rate(card, _multiplied(run)) * 1e12 * MATMUL_SHARE)
    floor = max(reading, multiplying) + work.cache / share + kernels
    asked = asked_by_host(run)
    launches = {key: launch_seconds(about, run, key) if asked else 0.0 for key in ("", ", least", ", most")}
    speeds = {key: run.batch / max(floor, seconds) for key, seconds in launches.items()}
    device = "compute" if multiplying > reading else "memory"
    bound = "launches" if launches[""] > floor or kernels > floor / 2 else device
    return Decode(speeds[""], speeds[", most"], speeds[", least"], bound)


def slowed(about: Sized, run: Setting) -> float:
    """Return the bytes that could be read beside the packed ones while bitsandbytes' kernel looks up each 4-bit code.

    From ``UNPACKED_FROM`` sequences on the matrices are unpacked first, by another kernel, and nothing is added.
    """
    if not run.precision.startswith("nf4") or run.batch >= UNPACKED_FROM:
        return 0.0
    return BYTES["nf4"] * about.shape.matrices() * (1 / FITTED["nf4 pace"] - 1)


def asked_by_host(run: Setting) -> bool:
    """Tell whether Python asks for one operation of a step after another, so that the host's speed counts.

    vLLM does so for bitsandbytes' int8, of which it records no CUDA graph (vllm/config/model.py, _verify_bnb_config).
    """
    if run.engine == "vllm":
        return run.precision == "int8"
    return run.decoding == "default"


def kernel_seconds(about: Sized, run: Setting) -> float:
    """Return the seconds that the kernels of one step take to begin and end, when the device need not wait for them."""
    layers = about.shape.layers
    if asked_by_host(run):  # the device waits for the host, and then all this is hidden
        return 0.0
    if run.engine == "vllm":
        each_layer = FITTED["vllm layer"] + 4 * VLLM_MATRIX.get(run.precision, 0.0)
        return layers * each_layer + run.batch * FITTED["vllm sequence"]
    each, beside = requests(about)
    packed = FITTED["gptq kernel"] * about.linears() if run.precision.startswith("gptq") else 0.0
    asked = (each * layers + beside) * (COMPILED_KERNELS if run.decoding == "compiled" else 1)
    return asked * FITTED["kernel"] + packed


def requests(about: Sized) -> tuple[int, int]:
    """Return how many operations a layer of the model is, and how many come beside; of ``REQUESTS``."""
    version = about.shape.version if about.shape.kind == "rwkv" else about.native_class
    return REQUESTS.get(version, REQUESTS["LlamaForCausalLM"])


def prefill_tokens_per_s(about: Sized, run: Setting, card: Gpu) -> float | None:
    """Predict how many prompt tokens a second one forward pass reads; None for RWKV.

    Its time goes into chunks of tokens, one after another (helpers/native/own/rwkv.py), which is not modelled.
    """
    if about.shape.kind == "rwkv":
        return None
    work = prefill_work(about, run.precision, run.batch, run.prompt)
    own = run.engine == "transformers" or asked_by_host(run)
    share = PREFILL_SHARES.get(run.precision, PREFILL_SHARE) if own else PREFILL_SHARE
    seconds = work.operations / (matmul_rate(card, _multiplied(run)) * 1e12 * share)
    if own:
        seconds = max(seconds, launch_seconds(about, run))
    return work.tokens / seconds


def launch_seconds(about: Sized, run: Setting, which: str = "") -> float:
    """Return the seconds that asking for one step's operations takes, or the least or most; ``which`` as in FITTED."""
    each, beside = requests(about)
    more = FITTED.get(f"{run.precision.removesuffix('-double')} matrix", 0.0) * about.linears()
    return (
        ((each * about.shape.layers + beside) * FITTED["request"] + more)
        * FITTED[f"request{which}"]
        / FITTED["request"]
    )


def bandwidth(card: Gpu) -> float:
    """Return the GB/s that a copy reaches: recorded, else the datasheet's times the share recorded elsewhere."""
    return _reached("bandwidth", card, lambda one: one.bandwidth_gb_s)


def matmul_rate(card: Gpu, precision: str) -> float:
    """Return the TFLOPS that a matrix product reaches: recorded, else the datasheet's times that share.

    In 8 bit, none of which is recorded: the 16-bit rate times what the datasheet has more for that format; nothing on
    a card that lacks it.
    """
    if precision == "fp32":
        return _reached("matmul_rate_fp32", card, lambda one: one.rates.fp32)
    if precision == "bf16" and card.rates.bf16 is None:
        return card.rates.fp32 * 0.8  # emulated, without tensor cores
    eight_bit = getattr(card.rates, MULTIPLIED_IN[precision]) if precision in MULTIPLIED_IN else None
    more = eight_bit / card.rates.fp16 if eight_bit else 1.0
    return more * _reached("matmul_rate_bf16", card, lambda one: one.rates.fp16)


def _multiplied(run: Setting) -> str:
    """Return the precision that the matrices are multiplied in."""
    return "fp16" if run.engine == "transformers" and run.precision in MULTIPLIED_IN else run.precision


def _reached(name: str, card: Gpu, datasheet: Callable[[Gpu], float]) -> float:
    rows = [(find_gpu(row.device), row.value) for row in catalog.measured(name=name, engine="torch")]
    rows = [(one, value) for one, value in rows if one is not None]
    own = [value for one, value in rows if one.id == card.id]
    if own:
        return statistics.median(own)
    return datasheet(card) * statistics.median([value / datasheet(one) for one, value in rows] or [0.8])
