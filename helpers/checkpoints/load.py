"""One call for every family, every kind of weights and every precision."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import catalog
from ..errors import HelpersError, unknown
from .hub import cache_folder, fetch

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TINY = Path(__file__).parent / "tiny"
WEIGHTS = ["tiny", "random", "hub"]
PRECISIONS = ["auto", "fp32", "bf16", "fp16", "int8", "nf4"]


def load(
    model: str, weights: str = "tiny", precision: str = "auto", device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a model and its tokenizer, ready to generate.

    Args:
        model: catalogue id, e.g. ``"chatglm3-6b"``.
        weights: ``"tiny"`` is the trained stand-in shipped here; ``"random"`` the full size with random values and
            the stand-in's tokenizer; ``"hub"`` the published checkpoint. A path is a folder with a copy of it.
        precision: ``"auto"`` takes the published 16-bit type on a GPU and fp32 on a CPU. ``"int8"`` and ``"nf4"``
            are quantised by bitsandbytes while loading.
        device: ``"auto"`` takes the first CUDA device, else the CPU.

    Returns:
        The native transformers model in evaluation mode, and its fast tokenizer with the family's chat template.

    Raises:
        HelpersError: an unknown name (the valid ones are listed), no such device, a type that the card lacks, no
            stand-in of this model, or whatever fetching and converting found wrong.
    """
    import logging

    import transformers

    # On a CPU it warns at every matrix product that int8 computes in fp16, and of an optional kernel it does without.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    row = catalog.model(model)
    check_names(weights, precision)
    device = pick_device(device)
    dtype = pick_dtype(precision, row.dtype, device)
    options: dict[str, Any] = {"dtype": dtype, "device_map": device}
    if precision in ("int8", "nf4"):
        options["quantization_config"] = bitsandbytes_config(precision, dtype)

    folder = native_folder(model, "tiny" if weights == "random" else weights)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    bar_was_on = transformers.utils.logging.is_progress_bar_enabled()
    if weights == "tiny":  # loads in an instant: a bar would only clutter the page
        transformers.utils.logging.disable_progress_bar()
    try:
        if weights == "random":
            from .random import full_config, random_state

            config = full_config(row)
            state = random_state(config, dtype, device)
            native_class = getattr(transformers, row.native_class)
            loaded = native_class.from_pretrained(None, config=config, state_dict=state, **options)
            loaded.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        else:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)
    finally:
        if bar_was_on:
            transformers.utils.logging.enable_progress_bar()
    return loaded.eval(), tokenizer


def check_names(weights: str, precision: str) -> None:
    """Raise HelpersError for a kind of weights or a precision that does not exist."""
    if weights not in WEIGHTS and not Path(weights).is_dir():
        raise unknown("weights", weights, [*WEIGHTS, "the path of a folder"])
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)


def native_folder(model: str, weights: str = "tiny") -> Path:
    """Return the native checkpoint of a model as a folder, fetching and converting what is not there yet.

    Args:
        model: catalogue id.
        weights: ``"tiny"``, ``"hub"``, or the path of an original checkpoint.

    Raises:
        HelpersError: as ``load``.
    """
    from ..native import convert

    row = catalog.model(model)
    if weights == "tiny":
        source = TINY / model
        if not source.is_dir():
            raise HelpersError(
                f"no stand-in of {model}", "none is shipped for this model", f"take one of {', '.join(stand_ins())}"
            )
        target = cache_folder() / "native" / "tiny" / model
    elif weights == "hub" and row.adapters:
        adapters = ", then ".join(step.repository for step in row.adapters.steps)
        raise HelpersError(
            f"cannot load {model} from a hub",
            f"only its adapter is published; its base is {row.adapters.base}, under terms of its own",
            f"put the base into DIR/base and {adapters} into DIR/lora, and pass weights='DIR'",
        )
    elif weights == "hub":
        source, target = fetch(model), cache_folder() / "native" / "hub" / model
    else:
        source = Path(weights)
        target = cache_folder() / "native" / "local" / f"{model}-{source.resolve().name}"
    if row.native_config:  # born native: nothing to convert
        return source
    # An adapter and its base lie side by side, as base/ and lora/ (Chinese-LLaMA-Alpaca).
    base, adapters = (source / "base", [source / "lora"]) if (source / "base").is_dir() else (source, [])
    return convert(base, target, adapters=adapters, chat_format=row.chat_format, progress=weights != "tiny")


def stand_ins() -> list[str]:
    """Return the ids of the models with a shipped stand-in, in the catalogue's order."""
    return [model for model in catalog.models() if (TINY / model).is_dir()]


def pick_device(device: str = "auto") -> str:
    """Turn ``"auto"`` into ``"cuda:0"`` or ``"cpu"``, and refuse what this machine does not have."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    valid = ["auto", "cpu", *(["cuda"] if count else []), *(f"cuda:{index}" for index in range(count))]
    if device not in valid:
        if str(device).startswith("cuda"):
            why = f"PyTorch sees {count} CUDA devices on this machine"
            raise HelpersError(f"no device {device!r}", why, f"take one of {', '.join(valid)}")
        raise unknown("device", device, valid)
    if device == "auto":
        device = "cuda:0" if count else "cpu"
    return "cuda:0" if device == "cuda" else device


def pick_dtype(precision: str, published: str, device: str) -> torch.dtype:
    """Return the floating-point type of the weights that stay unquantised.

    On a GPU that is the published type, on a CPU fp32 (16-bit arithmetic is slow or missing on most). Cards before
    Ampere (compute capability 8.0) have no bf16: there ``"auto"`` takes fp16, and asking for bf16 is refused.
    """
    import torch

    native_bf16 = device == "cpu" or torch.cuda.get_device_capability(device)[0] >= 8
    if precision in ("auto", "int8", "nf4"):
        precision = "fp32" if device == "cpu" else published
        if precision == "bf16" and not native_bf16:
            precision = "fp16"
    if precision == "bf16" and not native_bf16:
        name = torch.cuda.get_device_name(device)
        raise HelpersError("cannot load in bf16", f"{name} is older than Ampere and has no bf16", "take fp16 or auto")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def bitsandbytes_config(precision: str, dtype: torch.dtype) -> Any:
    """Return transformers' description of int8 (arXiv 2208.07339) or NF4 (arXiv 2305.14314) with ``dtype`` inside."""
    from transformers import BitsAndBytesConfig

    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
