"""RWKV 4, 5, 6 and 7 -> our own class; version 4 keeps the config of transformers' ``RwkvForCausalLM``.

Two published forms hold the same tensors: BlinkDL's ``.pth``, one file and no config.json, and folders that remote
code reads, with config.json and names of their own. A ``.pth`` says with its tensors' names which version it is, and
with their shapes how large.

Sources: tensor names of https://github.com/BlinkDL/RWKV-LM; names and config.json of the folders RWKV/rwkv-4-world-7b,
RWKV/v5-Eagle-7B-HF and RWKV/v6-Finch-7B-HF, as https://github.com/BBuf/RWKV-World-HF-Tokenizer makes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HelpersError, unknown
from .chat_templates import CHAT_TEMPLATES, START
from .family import Family, Original, need, refuse_unless
from .rules import Rule, drop, rename

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, RwkvConfig

VERSIONS = {"rwkv": 4, "rwkv5": 5, "rwkv6": 6, "rwkv7": 7}
"""``model_type`` of the published config.json files; ``rwkv7`` has none and is ours."""

VOCABULARY = "rwkv_vocab_v20230424.txt"
"""The World vocabulary's file; every published model of versions 4 to 7 has the same, of 65,536 rows."""

END = 0
"""Id of the token that ends a text; it is in no vocabulary file."""

RAW = "blinkdl"
"""Value of ``tensor_names`` in the settings that ``describe`` makes up."""

MATRICES = ["receptance.weight", "key.weight", "value.weight", "output.weight"]
ATTENTION: dict[int, list[str]] = {
    4: [*MATRICES, "time_decay", "time_first"],
    5: [*MATRICES, "gate.weight", "time_decay", "time_faaaa", "ln_x.weight", "ln_x.bias"],
    6: [*MATRICES, "gate.weight", "time_decay", "time_faaaa", "ln_x.weight", "ln_x.bias"]
    + [f"time_maa_{part}" for part in ("x", "w", "k", "v", "r", "g", "w1", "w2")]
    + ["time_decay_w1", "time_decay_w2"],
    7: [*MATRICES, "ln_x.weight", "ln_x.bias", "k_k", "k_a", "r_k", "w0", "a0", "v0"]
    + [f"x_{letter}" for letter in "rwkvag"]
    + [letter + number for letter in "wavg" for number in "12"],
}
"""Tensors of time mixing that both forms call the same; versions 4 and 5 have ``MIXES`` besides."""

FEED_FORWARD = {
    4: [],
    5: [],
    6: ["time_maa_k", "time_maa_r"],
    7: ["x_k"],
}
MIXES = {"k": "key", "v": "value", "r": "receptance", "g": "gate"}


def describe(folder: Path) -> Original | None:
    """Read the sizes of the one .pth file in a folder from its tensors; None where there is no such file.

    Raises:
        HelpersError: there are several, or what is there is no RWKV model that can be converted.
    """
    from .convert import open_shard, weight_files

    if not any(Path(folder).glob("*.pth")):
        return None
    (file,) = weight_files(folder)
    shapes = {name: tensor.shape for name, tensor in open_shard(file).items()}
    att = "blocks.0.att."
    marks = {7: "r_k", 6: "time_maa_x", 5: "time_faaaa", 4: "time_first"}
    version = next((number for number, mark in marks.items() if att + mark in shapes), None)
    if version is None or "emb.weight" not in shapes:
        why = "its tensors are not those of RWKV 4, 5.2, 6 or 7"
        raise HelpersError(f"cannot convert {file.name}", why, "take a .pth of one of these versions")
    original: Original = {
        "model_type": next(name for name, number in VERSIONS.items() if number == version),
        "vocab_size": shapes["emb.weight"][0],
        "hidden_size": shapes["emb.weight"][1],
        "attention_hidden_size": shapes[att + "key.weight"][0],
        "intermediate_size": shapes["blocks.0.ffn.key.weight"][0],
        "num_hidden_layers": 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
        "tensor_names": RAW,
    }
    if version > 4:
        original["head_size"] = shapes[att + ("r_k" if version == 7 else "time_faaaa")][-1]
    ranks = {6: {"mix": "time_maa_w2", "decay": "time_decay_w2"}, 7: {"decay": "w2", "rate": "a2", "gate": "g2"}}
    original |= {f"{rank}_rank": shapes[att + name][-2] for rank, name in ranks.get(version, {}).items()}
    if version == 7:
        original["value_rank"] = shapes.get("blocks.1.att.v2", (32, 0))[0]
    return original


def config(original: Original) -> RwkvConfig:
    """Translate config.json, or what ``describe`` read; version 4's is that of transformers."""
    from .own.rwkv import Rwkv4Config, RwkvWorldConfig

    refuse_unless(original, "tie_word_embeddings", False, default=False)
    version, width = VERSIONS[original["model_type"]], need(original, "hidden_size")
    usual = 4 * width if version in (4, 7) else int(width * 3.5) // 32 * 32  # the default of the published code
    settings: dict[str, Any] = {
        "vocab_size": need(original, "vocab_size"),
        "hidden_size": width,
        "num_hidden_layers": need(original, "num_hidden_layers"),
        "attention_hidden_size": original.get("attention_hidden_size") or width,
        "intermediate_size": original.get("intermediate_size") or usual,
        "layer_norm_epsilon": original.get("layer_norm_epsilon", 1e-5),
        "context_length": original.get("context_length", 4096),
        "rescale_every": 0,  # halving the weights keeps fp16 from overflowing; our class adds up in fp32 instead
        "bos_token_id": END,
        "eos_token_id": END,
        "pad_token_id": END,
    }
    if version == 4:
        return Rwkv4Config(**settings)
    wide = width >= 4096
    ranks = {"mix_rank": 64 if wide else 32, "decay_rank": 128 if wide else 64} if version == 6 else {}
    ranks |= {name: size for name, size in original.items() if name.endswith("_rank")}
    return RwkvWorldConfig(version=version, head_size=original.get("head_size", 64), **ranks, **settings)


def rules(original: Original) -> list[Rule]:
    """Table of tensors: a .pth file's short names, or those of the published folders, which are ours too."""
    version, raw = VERSIONS[original["model_type"]], original.get("tensor_names") == RAW
    native, layer = "rwkv.", "rwkv.blocks.{i}."
    source, block = ("", "blocks.{i}.") if raw else (native, layer)
    att, ffn = ("att.", "ffn.") if raw else ("attention.", "feed_forward.")
    norms = [("ln0" if raw else "pre_ln", "pre_ln"), ("ln1", "ln1"), ("ln2", "ln2")]
    mixes = [(f"time_mix_{key if raw else name}", f"time_mix_{name}") for key, name in MIXES.items()]
    pairs = [(f"{source}emb.weight" if raw else f"{native}embeddings.weight", f"{native}embeddings.weight")]
    pairs += [(f"{source}ln_out.{kind}", f"{native}ln_out.{kind}") for kind in ("weight", "bias")]
    pairs += [(f"{block}{old}.{kind}", f"{layer}{new}.{kind}") for old, new in norms for kind in ("weight", "bias")]
    shared = [(att, "attention.", ATTENTION[version])]
    shared += [(ffn, "feed_forward.", [*MATRICES[: 3 if version < 7 else 0], *FEED_FORWARD[version]])]
    if version == 7:
        shared += [(ffn, "feed_forward.", MATRICES[1:3])]
    pairs += [(block + old + name, layer + new + name) for old, new, names in shared for name in names]
    if version < 6:
        pairs += [(block + att + old, f"{layer}attention.{new}") for old, new in mixes[: 3 if version == 4 else 4]]
        pairs += [(block + ffn + old, f"{layer}feed_forward.{new}") for old, new in (mixes[0], mixes[2])]
    # Some files hold these for the first layer, which has no values of an earlier one to blend in.
    unused = [drop(f"{block.replace('{i}', '0')}{att}{name}") for name in ("v0", "v1", "v2")] if version == 7 else []
    return [*unused, *(rename(*pair) for pair in pairs), rename("head.weight", "head.weight")]


def tokenizer(folder: Path, original: Original, chat_format: str) -> PreTrainedTokenizerBase:
    """Build the tokenizer of the World vocabulary."""
    from .own.world_tokenizer import RwkvWorldTokenizer

    if chat_format not in CHAT_TEMPLATES:
        raise unknown("chat format", chat_format, list(CHAT_TEMPLATES))
    template = CHAT_TEMPLATES[chat_format].replace(START, "")  # a text starts with nothing
    file = vocabulary_file(folder)
    return RwkvWorldTokenizer(str(file), chat_template=template, padding_side="left")


def vocabulary_file(folder: Path) -> Path:
    """Find the World vocabulary: beside the weights, else in the PyPI package rwkv; all versions share it.

    Raises:
        HelpersError: it is in neither place.
    """
    from importlib.util import find_spec

    package = find_spec("rwkv")
    places = [Path(folder), *map(Path, package.submodule_search_locations if package else [])]
    found = next((place / VOCABULARY for place in places if (place / VOCABULARY).exists()), None)
    if found is None:
        why = f"there is no {VOCABULARY}, and the package rwkv, which has it, is not installed"
        raise HelpersError(f"no tokenizer in {Path(folder).name}", why, "run pip install rwkv")
    return found


class RwkvFamily(Family):
    """A family whose turns end with an empty line; see also ``stop_strings`` of its tokenizer."""

    def stops(self, tokenizer: PreTrainedTokenizerBase, chat_format: str) -> list[int]:
        r"""Return the ids that end an answer: the end of the text, and in a chat every token that holds ``\n\n``."""
        turns = [number for token, number in tokenizer.get_vocab().items() if "\n\n" in token]
        return sorted({END, *(turns if chat_format == "rwkv" else [])})


FAMILIES = [
    RwkvFamily(
        name,
        "Rwkv4ForCausalLM" if number == 4 else "RwkvWorldForCausalLM",
        "rwkv",
        config,
        rules,
        tokenizer,
        (VOCABULARY,),
        shared=65_536,
    )
    for name, number in VERSIONS.items()
]
