"""One call for every family, every kind of weights and every precision."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import catalog
from ..errors import HelpersError, unknown
from ..native.lora import base_and_adapters
from .adapters import base_is_missing, published_parts
from .hub import cache_folder, fetch, fetched
from .quantized import is_native, loading_options, quantized_by, quiet, unpack_quietly
from .random import LOADED

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

TINY = Path(__file__).parent / "tiny"
WEIGHTS = ["tiny", "random", "hub"]
PRECISIONS = ["auto", "fp32", "bf16", "fp16", "int8", "nf4"]


def load(
    model: str, weights: str | Path = "tiny", precision: str = "auto", device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a model and its tokenizer, ready to generate.

    Args:
        model: catalogue id, e.g. ``"chatglm3-6b"``.
        weights: ``"tiny"`` is the trained stand-in shipped here (its own or that of a model like it); ``"random"`` the
            full size with random values and the stand-in's tokenizer; ``"hub"`` the published checkpoint, from Hugging
            Face unless ``fetch`` brought it from ModelScope before. A path is a
            folder with a copy of it; of a model published as LoRA, with its base in ``base/`` and its adapter in
            ``lora/``, or several adapters in ``lora-1/`` and ``lora-2/``, merged in that order. Adapters that are not
            there are fetched. A folder that ``helpers.quantization`` or ``convert`` made is used where it lies.
        precision: ``"auto"`` takes the published 16-bit type on a GPU and fp32 on a CPU. ``"int8"`` and ``"nf4"``
            are quantised by bitsandbytes while loading. A quantised folder has its own, and takes only ``"auto"``.
            Random weights come as GPTQ packs them, too, ``"gptq-int4"`` and ``"gptq-int8"``: the full size needs no
            quantising first.
        device: ``"auto"`` takes the first CUDA device, else the CPU.

    Returns:
        The native transformers model in evaluation mode, and its fast tokenizer with the family's chat template.

    Raises:
        HelpersError: an unknown name (the valid ones are listed), no such device, a type that the card lacks, no
            stand-in of this model, or whatever fetching and converting found wrong.
    """
    import logging
    from contextlib import nullcontext

    import transformers

    from ..native import model_class, register

    register()
    weights = str(weights)
    # On a CPU it warns at every matrix product that int8 computes in fp16, and of an optional kernel it does without.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    row = catalog.model(model)
    check_names(weights, precision)
    device = pick_device(device)
    dtype, packed = pick_dtype(precision, row.dtype, device), precision in LOADED
    options: dict[str, Any] = {"dtype": dtype, "device_map": device}
    if precision in ("int8", "nf4"):
        options["quantization_config"] = bitsandbytes_config(precision, dtype)

    folder = native_folder(model, "tiny" if weights == "random" else weights)
    method = quantized_by(folder)
    if method and precision != "auto":
        why = f"its weights are already quantised, by {method}"
        raise HelpersError(f"cannot load {folder.name} as {precision}", why, "take precision='auto'")
    if method:
        options |= loading_options(folder, dtype, device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.padding_side = "left"  # prompts have to end together; Qwen3's is published with the right side
    bar_was_on = transformers.utils.logging.is_progress_bar_enabled()
    if weights == "tiny" or method:  # loads in an instant: a bar would only clutter the page
        transformers.utils.logging.disable_progress_bar()
    try:
        if weights == "random":
            from .random import full_config, gptq_config, random_state

            config = full_config(row)
            marks = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
            for name in marks:  # the tokenizer is the stand-in's, and ChatGLM-6B looks its marks up in the prompt
                if name.endswith("_token_id"):
                    setattr(config, name, marks[name])
            if packed:
                config.quantization_config = gptq_config(config, precision, device)
            state = random_state(config, dtype, device)
            with quiet() if packed else nullcontext():
                loaded = model_class(row.native_class).from_pretrained(None, config=config, state_dict=state, **options)
            loaded.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        else:
            with quiet() if method else nullcontext():
                loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)
    finally:
        if bar_was_on:
            transformers.utils.logging.enable_progress_bar()
    unpack_quietly(loaded)
    loaded.generation_config = greedy(loaded.generation_config)
    return loaded.eval(), tokenizer


def check_names(weights: str, precision: str) -> None:
    """Raise HelpersError for a kind of weights or a precision that does not exist."""
    if weights not in WEIGHTS and not Path(weights).is_dir():
        raise unknown("weights", weights, [*WEIGHTS, "the path of a folder"])
    valid = [*PRECISIONS, *(LOADED if weights == "random" else [])]
    if precision not in valid:
        raise unknown("precision", precision, valid)


def native_folder(model: str, weights: str = "tiny") -> Path:
    """Return the native checkpoint of a model as a folder, fetching and converting what is not there yet.

    A model born native (Qwen3, GLM-4) is used where it lies, and so is a folder that is native already.

    Args:
        model: catalogue id.
        weights: ``"tiny"``, ``"hub"``, or the path of the checkpoint as published, converted or quantised.

    Raises:
        HelpersError: as ``load``.
    """
    from ..native import convert

    row = catalog.model(model)
    chat_format, published = row.chat_format, row
    if weights == "tiny":
        source = tiny_folder(model)
        target = cache_folder() / "native" / "tiny" / model
        published = catalog.model(source.name)
        chat_format = published.chat_format if chat_format == "own" else chat_format
    elif weights == "hub" and row.adapters:
        raise base_is_missing(row)
    elif weights == "hub":
        source, target = fetched(model) or fetch(model), cache_folder() / "native" / "hub" / model
    elif is_native(Path(weights), row):
        return Path(weights)
    else:
        source = Path(weights)
        target = cache_folder() / "native" / "local" / f"{model}-{source.resolve().name}"
    if published.native_config:  # born native: nothing to convert
        return check_native(source, published)
    own_copy = row.adapters and weights != "tiny"
    base, adapters = published_parts(row, source) if own_copy else base_and_adapters(source)
    return convert(base, target, adapters=adapters, chat_format=chat_format, progress=weights != "tiny")


def check_native(folder: Path, row: catalog.Model) -> Path:
    """Return ``folder`` if it holds a whole checkpoint of the kind that a row born native describes.

    Raises:
        HelpersError: config.json, a weight file or tokenizer.json is missing, or it is a model of another kind.
    """
    from ..native.convert import read_config, weight_files

    found, wanted = read_config(folder).get("model_type"), row.native_config["model_type"]
    weight_files(folder)
    if found != wanted:
        why = f"its config.json says model_type {found!r}, and {row.id} is {wanted!r}"
        raise HelpersError(f"cannot load {folder} as {row.id}", why, "name the model that the folder holds")
    if not (folder / "tokenizer.json").exists():
        raise HelpersError(f"no tokenizer in {folder}", "there is no tokenizer.json", "download it with the weights")
    return folder


def stand_ins() -> list[str]:
    """Return the ids of the models with a shipped stand-in, their own or another's, in the catalogue's order."""
    return [id for id, row in catalog.models().items() if row.stand_in and (TINY / row.stand_in).is_dir()]


def tiny_folder(model: str) -> Path:
    """Return the folder of a model's stand-in, which models of the same form may share.

    Raises:
        HelpersError: there is none.
    """
    if model not in stand_ins():
        raise HelpersError(
            f"no stand-in of {model}", "none is shipped for this model", f"take one of {', '.join(stand_ins())}"
        )
    return TINY / str(catalog.model(model).stand_in)


def greedy(published: GenerationConfig) -> GenerationConfig:
    """Keep of published generation settings the tokens they name: sampling is the caller's choice here."""
    from transformers import GenerationConfig

    stops, pad = published.eos_token_id, published.pad_token_id
    first = stops[0] if isinstance(stops, list) else stops
    return GenerationConfig(
        bos_token_id=published.bos_token_id,
        eos_token_id=stops,
        pad_token_id=first if pad is None else pad,
        do_sample=False,
    )


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
    if precision in ("auto", "int8", "nf4", *LOADED):
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
