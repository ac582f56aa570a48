"""A native folder becomes a GGUF file, by llama.cpp's own converter and our tokenizer.

The converter is convert_hf_to_gguf.py of https://github.com/ggml-org/llama.cpp, which the package
``convert-hf-to-gguf`` carries.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, ClassVar

from .. import catalog
from ..errors import HelpersError, unknown

SUPER_BLOCK = 256
"""Weights of one row that a K-quant packs together (QK_K in ggml-common.h); Q8_0, Q5_0 and Q4_0 take 32."""

TYPES = {"f32": 0, "f16": 1, "bf16": 32}
"""The types of weights to convert to, with their numbers in llama.h (enum llama_ftype)."""


def to_gguf(folder: str | Path, file: str | Path, kind: str = "f16") -> Path:
    """Convert a native folder with llama.cpp's converter, and write the tokenizer that the folder has.

    The converter knows a tokenizer by a hash of what it makes of one text. Every other it refuses, or takes for
    Llama's, which has a space and ``<s>`` before every text. So the tokenizer is written here, from tokenizer.json.

    Args:
        folder: a native checkpoint of a class the converter knows: Llama, Qwen2, Qwen3, GLM, or RWKV 6 or 7.
        file: the GGUF file to write.
        kind: ``"f32"``, ``"f16"`` or ``"bf16"``.

    Returns:
        The file.

    Raises:
        HelpersError: the folder names remote code, which the converter would run; the converter does not know the
            class; or the tokenizer is of a kind that llama.cpp has no counterpart of.
    """
    import torch
    from gguf import LlamaFileType

    if kind not in TYPES:
        raise unknown("kind of GGUF file", kind, list(TYPES))
    folder, file = Path(folder), Path(file)
    sizes = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "auto_map" in sizes:
        why = "its config.json names code of its own, and llama.cpp's converter runs it unasked"
        raise HelpersError(f"cannot convert {folder.name} to GGUF", why, "convert it to the native class first")
    sizes = as_the_converter_reads(sizes)
    converter = _with_our_tokenizer(folder, sizes)
    file.parent.mkdir(parents=True, exist_ok=True)
    writing = file.with_name(file.name + ".writing")
    with torch.inference_mode(), _quiet():
        converter(folder, LlamaFileType(TYPES[kind]), writing, model_name=folder.name, hparams=sizes).write()
    os.replace(writing, file)
    return file


def as_the_converter_reads(config: dict[str, Any]) -> dict[str, Any]:
    """Add to a native config.json the keys of the original one that the converter reads.

    Of a GLM it would take the hidden size for the context and fixed numbers for the other two, without a word; the
    class of RWKV it knows by the version, and ranks by names of their own.
    """
    if config["architectures"] == ["GlmForCausalLM"]:
        return config | {
            "seq_length": config["max_position_embeddings"],
            "layernorm_epsilon": config["rms_norm_eps"],
            "rope_ratio": config["rope_parameters"]["rope_theta"] / 10_000,
        }
    if config["architectures"] == ["RwkvWorldForCausalLM"] and config["version"] in (6, 7):
        names = {"decay": "decay", "iclr": "rate", "value_residual_mix": "value", "gate": "gate"}
        ranks = {f"lora_rank_{theirs}": config[f"{ours}_rank"] for theirs, ours in names.items()}
        return config | ranks | {"architectures": [f"Rwkv{config['version']}ForCausalLM"]}
    return config


def _with_our_tokenizer(folder: Path, sizes: dict[str, Any]) -> type:
    """Return the converter's class for an architecture, with our tokenizer in place of its guess.

    Raises:
        HelpersError: it has no such class.
    """
    from conversion import get_model_class

    name = sizes["architectures"][0]
    try:
        base = get_model_class(name)
    except NotImplementedError:
        why = f"llama.cpp's converter does not know {name}"
        fix = "take one that becomes a Llama, Qwen2, Qwen3, GLM or RWKV 6 or 7"
        raise HelpersError(f"cannot convert {folder.name} to GGUF", why, fix) from None

    class Converter(base):
        model_arch = base.model_arch
        lerp_weights: ClassVar[dict] = {}  # RWKV's gathers tensors here, and would keep those of other files

        @classmethod
        def filter_tensors(cls, item: tuple[str, Any]) -> tuple[str, Any] | None:
            tensor, read = item
            if name == "Rwkv7ForCausalLM":  # our folder keeps the names of version 6
                tensor = tensor.replace("rwkv.", "model.", 1).replace("blocks.0.pre_ln", "pre_ln")
            return super().filter_tensors((tensor, read))

        def set_vocab(self) -> None:
            if name.startswith("Rwkv"):
                super().set_vocab()
                # It takes 261, the empty line of the World vocabulary, for the end of a turn.
                self.gguf_writer.kv_data[0]["tokenizer.ggml.eot_token_id"].value = _stops(folder)[-1]
            else:
                write_tokenizer(self.gguf_writer, folder, sizes["vocab_size"])

    return Converter


def _stops(folder: Path) -> list[int]:
    """Return the tokens that end an answer, the end of the text first."""
    from transformers import GenerationConfig

    found = GenerationConfig.from_pretrained(folder).eos_token_id
    return found if isinstance(found, list) else [found]


def write_tokenizer(writer: Any, folder: Path, size: int) -> None:
    """Write the tokenizer of a native folder into a GGUF file.

    Args:
        writer: a ``gguf.GGUFWriter``.
        folder: with tokenizer.json: a BPE over bytes (Qwen), or over characters with bytes as the last resort, which
            is how the SentencePiece models of the others are stored.
        size: rows of the embedding; those without a token are marked as unused.

    Raises:
        HelpersError: it is neither.
    """
    from gguf import TokenType
    from transformers import AutoTokenizer

    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model, added = tokenizer["model"], {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    over_bytes = "ByteLevel" in json.dumps(tokenizer["pre_tokenizer"])
    if model["type"] != "BPE" or over_bytes == bool(model["byte_fallback"]):
        why = "it is neither a byte-level BPE nor a SentencePiece BPE"
        raise HelpersError(f"cannot write the tokenizer of {folder.name}", why, "take another model")
    texts = {id: text for text, id in model["vocab"].items()} | added
    kinds = {id: TokenType.NORMAL for id in texts} | dict.fromkeys(added, TokenType.CONTROL)
    if not over_bytes:
        kinds |= {model["vocab"][f"<0x{byte:02X}>"]: TokenType.BYTE for byte in range(256)}
        kinds[model["vocab"][model["unk_token"]]] = TokenType.UNKNOWN
    writer.add_tokenizer_model("gpt2" if over_bytes else "llama")
    writer.add_tokenizer_pre("qwen2" if over_bytes else "default")  # how a text is cut before the BPE
    writer.add_token_list([texts.get(id, f"[PAD{id}]") for id in range(size)])
    writer.add_token_types([kinds.get(id, TokenType.UNUSED) for id in range(size)])
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    if over_bytes:
        writer.add_token_merges([" ".join(pair) for pair in pairs])
    else:  # llama.cpp joins what has the highest score first, tokenizer.json what stands first
        scores = [0.0] * size
        for rank, pair in reversed(list(enumerate(pairs))):
            scores[model["vocab"]["".join(pair)]] = -1.0 - rank
        writer.add_token_scores(scores)
        writer.add_add_space_prefix("Prepend" in json.dumps(tokenizer["normalizer"]))
    fast, stops = AutoTokenizer.from_pretrained(folder, local_files_only=True), _stops(folder)
    if fast.bos_token_id is not None:
        writer.add_bos_token_id(fast.bos_token_id)
    writer.add_add_bos_token(fast("").input_ids == [fast.bos_token_id])
    writer.add_eos_token_id(stops[0])
    writer.add_eot_token_id(stops[-1])  # the end of a turn, e.g. Qwen's <|im_end|>
    if fast.chat_template:
        # The server tries a template out with names missing, and its own Jinja looks up nothing but strings.
        writer.add_chat_template(fast.chat_template.replace(".get(name, name)", ".get(name ~ '', name)"))


def widen(folder: str | Path, target: str | Path, multiple: int = SUPER_BLOCK) -> Path:
    """Copy a native folder with rows filled up with zeros to a multiple of ``multiple``; it computes the same.

    K-quants pack 256 weights of a row together, and a stand-in's rows are 128 or 384 long. Zeros add nothing to a
    product. A norm divides by the width, so its weight and epsilon make up for the larger one; whole heads of zeros
    write nothing, as the output matrix has zeros for them.

    Args:
        folder: a native checkpoint of the class Llama, Qwen2 or GLM.
        target: the folder to write.
        multiple: what the hidden and the intermediate size become multiples of.

    Raises:
        HelpersError: another class, or its hidden size does not divide what it becomes.
    """
    from safetensors.torch import save_file
    from torch.nn.functional import pad
    from transformers import AutoModelForCausalLM

    folder, target = Path(folder), Path(target)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    wide, deep = (math.ceil(size / multiple) * multiple for size in (hidden, inner))
    if config["model_type"] not in ("llama", "qwen2", "glm") or wide % hidden:
        why = f"it is a {config['model_type']} {hidden} wide"
        raise HelpersError(f"cannot widen {folder.name}", why, f"take one {multiple} wide already")
    times = wide // hidden
    with _quiet():
        state = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", local_files_only=True).state_dict()
    for name, tensor in state.items():
        part = name.split(".")[-2]
        rows = tensor.shape[0] * times if part in ("q_proj", "k_proj", "v_proj") else tensor.shape[0]
        rows = {"o_proj": wide, "down_proj": wide, "gate_proj": deep, "up_proj": deep}.get(part, rows)
        if part.endswith("norm") or "norm" in part:
            state[name] = pad(tensor, (0, wide - hidden)) / math.sqrt(times)
        elif part == "gate_up_proj":  # two matrices, one above the other
            state[name] = pad(tensor.view(2, inner, hidden), (0, wide - hidden, 0, deep - inner)).flatten(0, 1)
        else:
            columns = {hidden: wide, inner: deep}[tensor.shape[-1]] if tensor.dim() == 2 else rows
            more = (0, columns - tensor.shape[-1]) + ((0, rows - tensor.shape[0]) if tensor.dim() == 2 else ())
            state[name] = pad(tensor, more)
    heads = {name: config[name] * times for name in ("num_attention_heads", "num_key_value_heads")}
    sizes = {"hidden_size": wide, "intermediate_size": deep, "rms_norm_eps": config["rms_norm_eps"] / times}
    target.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, target)
    (target / "config.json").write_text(json.dumps(config | heads | sizes | {"dtype": "float32"}), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, target / "model.safetensors")
    return target


def write_empty(model: str, file: Path) -> Path:
    """Write a GGUF file with the sizes of a full-size model and no content: it takes some kilobytes on the disk.

    Args:
        model: catalogue id of a model that becomes a Llama, a Qwen2 or a GLM.
        file: what to write; it looks as large as the model in 16 bit.

    Raises:
        HelpersError: the model is of another class.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

    row = catalog.model(model)
    forms = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "GlmForCausalLM": "chatglm"}
    if row.native_class not in forms:
        raise HelpersError(f"no sizes of {model}", f"it is a {row.native_class}", "take a Llama, a Qwen2 or a GLM")
    shape = row.shape
    hidden, inner, keys = shape.hidden_size, shape.ffn_size, shape.kv_heads * shape.head_dim
    layer = {"attn_q": (hidden, hidden), "attn_k": (keys, hidden), "attn_v": (keys, hidden)}
    layer |= {"attn_output": (hidden, hidden), "ffn_down": (hidden, inner)}
    one = forms[row.native_class] == "chatglm"  # gate and up in one matrix
    layer |= {"ffn_up": (2 * inner, hidden)} if one else {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden)}
    layer |= {"attn_norm": (hidden,), "ffn_norm": (hidden,)}
    sizes = {"token_embd": (shape.vocab_size, hidden), "output_norm": (hidden,), "output": (shape.vocab_size, hidden)}
    sizes |= {f"blk.{place}.{name}": size for place in range(shape.layers) for name, size in layer.items()}

    writer = GGUFWriter(file, forms[row.native_class])
    writer.add_block_count(shape.layers)
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab_size)
    total = 0
    for name, size in sizes.items():
        kind = GGMLQuantizationType.F16 if len(size) == 2 else GGMLQuantizationType.F32
        count = math.prod(size) * (2 if len(size) == 2 else 4)
        writer.add_tensor_info(f"{name}.weight", size, np.dtype(np.float16), count, raw_dtype=kind)
        total += math.ceil(count / 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(file, math.ceil(file.stat().st_size / 32) * 32 + total)
    return file


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the converter's progress off the page."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as nothing, redirect_stderr(nothing):
            yield
    finally:
        logging.disable(before)
