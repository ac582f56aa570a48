"""bitsandbytes: no calibration; int8 with outliers kept in 16 bit, or 4-bit codes for blocks of 64 weights.

Sources: LLM.int8() arXiv 2208.07339, NF4 and double quantisation arXiv 2305.14314.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import unknown
from .folder import quantizing

KINDS = ["int8", "nf4", "fp4"]


def bitsandbytes(
    model: str,
    target: Path | str,
    *,
    weights: str | Path = "tiny",
    precision: str = "nf4",
    double_quant: bool = False,
    threshold: float = 6.0,
    device: str = "auto",
    replace: bool = False,
) -> Path:
    """Quantise a model with bitsandbytes and save it.

    Args:
        model: catalogue id, or the path of a native folder.
        target: folder to make.
        weights: ``"tiny"``, ``"hub"``, ``"random"``, or the path of a published or native folder.
        precision: ``"int8"``, ``"nf4"`` or ``"fp4"``.
        double_quant: of nf4 and fp4, quantise the scales too (saves about 0.4 bit a weight).
        threshold: of int8, inputs beyond it are multiplied in 16 bit; 0 for none.
        device: as ``load``.
        replace: overwrite the result of an earlier run.

    Returns:
        ``target``, which ``load(model, weights=target)`` reads.

    Raises:
        HelpersError: unknown precision, or as ``quantizing``.
    """
    import logging

    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if precision not in KINDS:
        raise unknown("precision", precision, KINDS)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # see load
    if precision == "int8":
        settings = {"precision": precision, "threshold": threshold}
    else:
        settings = {"precision": precision, "double_quant": double_quant}
    with quantizing("bitsandbytes", model, target, weights, device, replace, settings) as job:
        if precision == "int8":
            config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
        else:
            config = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=precision,
                bnb_4bit_use_double_quant=double_quant,
                bnb_4bit_compute_dtype=job.compute_dtype,
            )
        loaded = AutoModelForCausalLM.from_pretrained(
            job.source, local_files_only=True, dtype=job.dtype, device_map=job.device, quantization_config=config
        )
        job.save(loaded)
    return Path(target)
