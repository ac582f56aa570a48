"""Tokenizers of today's transformers, built from the tokenizer file of an original checkpoint, without remote code.

    tokenizer.model (SentencePiece)  or  qwen.tiktoken  ->  a `tokenizers` pipeline  ->  PreTrainedTokenizerFast

What comes out gives the ids of the SentencePiece or tiktoken library on the same file. It is saved as one
tokenizer.json, which AutoTokenizer and serving engines read.

Two things differ from the original tokenizers, both because chat templates are text:

* A special token spelt out in a text, such as ``</s>`` or ``<|user|>``, becomes that token; the originals insert
  special tokens as ids and read their names in a text as plain characters. Call the tokenizer with
  ``split_special_tokens=True`` to have it so here.
* ChatGLM's ``sop`` and ``eop`` are named ``<sop>`` and ``<eop>``, as in GLM-4, their ids unchanged: with the bare
  names, "philosophy" and "people" would be cut apart.

Sources: the SentencePiece library's ``normalizer.cc``, ``bpe_model.cc`` and ``sentencepiece_processor.cc``; the
tokenization code of the published checkpoints, named at each function.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HelpersError, unknown
from .chat_templates import CHAT_TEMPLATES, START

if TYPE_CHECKING:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from tokenizers import Tokenizer, decoders, normalizers
    from transformers import PreTrainedTokenizerFast

SPACE = "▁"
"""What SentencePiece writes for a space inside a piece (U+2581)."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of pieces in a SentencePiece model that matter here: ``SentencePiece.Type`` in sentencepiece_model.proto."""

UNREAD = -1e4
"""Score of the pieces of a Unigram model that no text may give: worse than any other way to cut it."""

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen cuts a text into words before merging: digits stand alone. Source: tokenization_qwen.py, ``PAT_STR``."""

INTERNLM2_MARKS = [
    "<|plugin|>",
    "<|interpreter|>",
    "<|action_end|>",
    "<|action_start|>",
    "<|im_end|>",
    "<|im_start|>",
]
"""InternLM2's chat marks by rising id. Source: tokenizer_config.json of internlm/internlm2-chat-7b (92538..92543)."""

CHATGLM1_MARKS = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
CHATGLM1_SPACES = {"\n": "<n>", "\t": "<|tab|>"} | {" " * length: f"<|blank_{length}|>" for length in range(80, 1, -1)}
"""ChatGLM-6B's special tokens by rising id, and how it writes white space; a run of 81 spaces is <|blank_80|> and one.

Source: tokenization_chatglm.py of THUDM/chatglm-6b, ``SPTokenizer``.
"""


def chatglm(folder: Path, chat_format: str) -> PreTrainedTokenizerFast:
    """Build the tokenizer of ChatGLM2 or ChatGLM3 from ``tokenizer.model``.

    The marks follow the model's own pieces, ChatGLM3's roles only where the format is not ``chatglm2``. Every text
    begins with ``[gMASK]<sop>``. The embedding has more rows (65,024) than there are tokens.

    Raises:
        HelpersError: the file is missing or no SentencePiece BPE model, or the chat format is unknown.

    Source: tokenization_chatglm.py of THUDM/chatglm2-6b and THUDM/chatglm3-6b.
    """
    model = _read_sentencepiece(folder)
    marks = ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"]
    if chat_format != "chatglm2":
        marks += ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    backend = _sentencepiece(model, dict(enumerate(marks, start=len(model.pieces))))
    return _finish(backend, chat_format, start=["[gMASK]", "<sop>"], bos_token=None, pad_token="<unk>")


def chatglm1(folder: Path, chat_format: str, start: int | None = None) -> PreTrainedTokenizerFast:
    """Build the tokenizer of ChatGLM-6B, the first one, from ``ice_text.model``; texts end in ``[gMASK]<sop>``.

    In the vocabulary of 150,528 tokens, 20,000 images come first (``num_image_tokens``, which the published
    tokenizer_config.json sets to 0). The files that go with it end before the special tokens.

    Args:
        folder: original checkpoint.
        chat_format: name of the chat template to store.
        start: id of ``<sop>`` in config.json; not compared when None.

    Raises:
        HelpersError: the file is missing or no SentencePiece model, it gives ``<sop>`` another id than config.json,
            or the chat format is unknown.

    Source: tokenization_chatglm.py and tokenizer_config.json of THUDM/chatglm-6b.
    """
    from tokenizers import decoders, normalizers

    model = with_chatglm1_pieces(_read_sentencepiece(folder, "ice_text.model", kind="UNIGRAM"))
    images = [
        # No text can spell their names: its spaces have become ▁ when it is read.
        {"piece": f"<image {number}>", "type": UNUSED}
        for number in range(_settings(folder).get("num_image_tokens", 20_000))
    ]
    pieces = list(model.pieces)
    del model.pieces[:]
    model.pieces.extend([*(model.SentencePiece(**image) for image in images), *pieces])
    ids = {piece.piece: number for number, piece in enumerate(model.pieces)}
    if start not in (None, ids["<sop>"]):
        raise HelpersError(
            "cannot build the tokenizer",
            f"<sop> is token {start} in config.json and would be {ids['<sop>']}",
            "take tokenizer_config.json, config.json and ice_text.model of the same revision",
        )
    backend = _sentencepiece(model, {ids[mark]: mark for mark in CHATGLM1_MARKS})
    written = [normalizers.Replace(space, piece) for space, piece in CHATGLM1_SPACES.items()]
    backend.normalizer = normalizers.Sequence([*written, backend.normalizer])
    read = [decoders.Replace(piece, space) for space, piece in CHATGLM1_SPACES.items()]
    backend.decoder = decoders.Sequence([backend.decoder, *read])
    end = ["[gMASK]", "<sop>"]
    return _finish(backend, chat_format, [], end, bos_token="<sop>", eos_token="<eop>", pad_token="<pad>")


def with_chatglm1_pieces(model: ModelProto) -> ModelProto:
    """Append to a model what early copies of ChatGLM-6B append when they load it, and later files hold."""
    if model.pieces[-1].type != BYTE:
        kinds = dict.fromkeys(CHATGLM1_MARKS, CONTROL)
        kinds |= {f"<|{name}|>": USER_DEFINED for name in ["tab", *(f"blank_{length}" for length in range(2, 81))]}
        kinds |= {f"<0x{byte:02X}>": BYTE for byte in range(256)}
        for piece, kind in kinds.items():
            model.pieces.add(piece=piece, type=kind, score=0.0)
        model.trainer_spec.byte_fallback = True
    return model


def baichuan(folder: Path, chat_format: str) -> PreTrainedTokenizerFast:
    """Build the tokenizer of Baichuan or Baichuan 2 from ``tokenizer.model``; it starts a text with nothing.

    The chat models mark turns with two reserved pieces of the model itself, ids 195 and 196, which the formats
    ``baichuan`` (``<reserved_102>`` and ``<reserved_103>``) and ``baichuan2`` (106 and 107) make special tokens.

    Raises:
        HelpersError: the file is missing or no SentencePiece BPE model, it lacks the reserved pieces, or the chat
            format is unknown.

    Source: tokenization_baichuan.py and tokenizer_config.json of baichuan-inc/Baichuan2-7B-Chat.
    """
    model, settings = _read_sentencepiece(folder), _settings(folder)
    marks: dict[int, str] = {}
    if chat_format in ("baichuan", "baichuan2"):
        ids = {piece.piece: number for number, piece in enumerate(model.pieces)}
        names = [f"<reserved_{number}>" for number in ((102, 103) if chat_format == "baichuan" else (106, 107))]
        marks = {ids.get(name, -1): name for name in names}
        if -1 in marks:
            raise HelpersError(
                f"cannot use the chat format {chat_format!r}",
                f"{folder.name}/tokenizer.model has no pieces {' and '.join(names)}",
                "take the tokenizer of that chat model, or the chat format 'none'",
            )
    start = ["<s>"] if settings.get("add_bos_token", False) else []
    return _finish(_sentencepiece(model, marks), chat_format, start, pad_token=_pad(settings, "<unk>"))


def internlm2(folder: Path, chat_format: str) -> PreTrainedTokenizerFast:
    """Build the tokenizer of InternLM2 from ``tokenizer.model``; it starts a text with ``<s>``.

    Its six chat marks are other names for pieces of the model: those that tokenizer_config.json gives under
    ``added_tokens_decoder``, and without that the last six, which the model calls ``[UNUSED_TOKEN_...]``.

    Raises:
        HelpersError: the file is missing or no SentencePiece BPE model, nothing says which ids the marks have, or
            the chat format is unknown.

    Source: tokenizer_config.json of internlm/internlm2-chat-7b.
    """
    model, settings = _read_sentencepiece(folder), _settings(folder)
    pieces = [piece.piece for piece in model.pieces]
    marks = {int(number): token["content"] for number, token in settings.get("added_tokens_decoder", {}).items()}
    if not marks and set(INTERNLM2_MARKS) <= set(pieces):
        marks = {pieces.index(mark): mark for mark in INTERNLM2_MARKS}
    elif not marks:
        tail = range(len(pieces) - len(INTERNLM2_MARKS), len(pieces))
        if not all(pieces[number].startswith("[UNUSED_TOKEN_") for number in tail):
            raise HelpersError(
                f"cannot build the tokenizer of {folder.name}",
                "tokenizer_config.json has no added_tokens_decoder and tokenizer.model does not end in unused pieces, "
                "so the ids of <|im_start|> and the other marks are unknown",
                "put the checkpoint's tokenizer_config.json beside tokenizer.model",
            )
        marks = dict(zip(tail, INTERNLM2_MARKS, strict=True))
    start = ["<s>"] if settings.get("add_bos_token", True) else []
    return _finish(_sentencepiece(model, marks), chat_format, start, pad_token=_pad(settings, "</s>"))


def llama(folder: Path, chat_format: str) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a Llama model from ``tokenizer.model``; it starts a text with ``<s>``.

    tokenizer_config.json and special_tokens_map.json, where they are there, say whether it does (``add_bos_token``)
    and which token pads; a padding token that the model lacks, such as Chinese-Alpaca's ``[PAD]``, is appended.

    Raises:
        HelpersError: the file is missing or no SentencePiece BPE model, or the chat format is unknown.

    Source: tokenizer files of FlagAlpha/Llama2-Chinese-7b-Chat, FlagAlpha/Atom-7B and hfl/chinese-alpaca-lora-7b.
    """
    model, settings = _read_sentencepiece(folder), _settings(folder)
    start = ["<s>"] if settings.get("add_bos_token", True) else []
    return _finish(_sentencepiece(model, {}), chat_format, start, pad_token=_pad(settings, "</s>"))


def qwen(folder: Path, chat_format: str) -> PreTrainedTokenizerFast:
    """Build the tokenizer of Qwen v1 from ``qwen.tiktoken``; it starts a text with nothing.

    The special tokens follow the last rank of the file: ``<|endoftext|>`` (which also pads), ``<|im_start|>``,
    ``<|im_end|>`` and ``<|extra_0|>`` to ``<|extra_204|>``; 151,643 to 151,850 in the published models.

    Raises:
        HelpersError: the file is missing or damaged, or the chat format is unknown.

    Source: tokenization_qwen.py of Qwen/Qwen-7B.
    """
    from tokenizers import normalizers

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205))]
    backend = byte_level(_read_ranks(folder), QWEN_PATTERN, specials)
    backend.normalizer = normalizers.NFC()
    end = "<|endoftext|>"
    return _finish(backend, chat_format, [], unk_token=None, bos_token=None, eos_token=end, pad_token=end)


def byte_level(ranks: Mapping[bytes, int], pattern: str, specials: Sequence[str]) -> Tokenizer:
    """Build the pipeline of a tiktoken encoding: tokens by rank, the pattern that cuts out words, special tokens."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        # The stock reader keeps copies of files in a temporary folder by their path, and would go on returning the
        # copy after the file has changed.
        load_tiktoken_bpe = staticmethod(lambda _: ranks)

    return Converter("ranks", pattern=pattern, extra_special_tokens=specials).converted()


def _finish(
    backend: Tokenizer, chat_format: str, start: Sequence[str], end: Sequence[str] = (), **names: str | None
) -> PreTrainedTokenizerFast:
    """Wrap a pipeline for transformers.

    Args:
        backend: the pipeline from text to ids.
        chat_format: name of the chat template to store.
        start: special tokens put before every text.
        end: special tokens put after every text.
        names: ``unk_token``, ``bos_token``, ``eos_token`` and ``pad_token`` where not SentencePiece's usual ones.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    if chat_format not in CHAT_TEMPLATES:
        raise unknown("chat format", chat_format, list(CHAT_TEMPLATES))
    if start or end:
        backend.post_processor = processors.TemplateProcessing(
            single=[*start, "$A", *end],
            pair=[*start, "$A", *end, *start, "$B", *end],
            special_tokens=[(token, backend.token_to_id(token)) for token in [*start, *end]],
        )
    opening = "{{- '" + "".join(start) + "' }}"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | names,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATES[chat_format].replace(START, opening),
    )


def _sentencepiece(model: ModelProto, marks: Mapping[int, str]) -> Tokenizer:
    """Build the pipeline that encodes and decodes as SentencePiece does with ``model``.

    Two things cannot be had. Where pieces share a score, SentencePiece merges the leftmost pair of any of them, and a
    list of merges has to put one piece before the other (here the one with the lower id): models that were merged
    from two, such as Chinese-LLaMA-Alpaca's, have thousands of those and cut 1 token of 130 in Chinese text
    differently. And a character map takes a combining mark after a space as part of it here, and by itself there.

    Args:
        model: a BPE or Unigram model.
        marks: special tokens by id; they rename pieces of the model, or follow them.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

    kinds = {number: CONTROL if number in marks else piece.type for number, piece in enumerate(model.pieces)}
    names = [marks.get(number, piece.piece) for number, piece in enumerate(model.pieces)]
    bytes_for_rare = model.trainer_spec.byte_fallback
    if model.trainer_spec.model_type == model.trainer_spec.UNIGRAM:
        scores = [piece.score if kinds[i] in (NORMAL, USER_DEFINED) else UNREAD for i, piece in enumerate(model.pieces)]
        vocabulary = list(zip(names, scores, strict=True))
        backend = Tokenizer(models.Unigram(vocabulary, names.index("<unk>"), bytes_for_rare))
    else:
        backend = Tokenizer(
            models.BPE(
                vocab={name: number for number, name in enumerate(names)},
                merges=_merges(model, kinds),
                unk_token="<unk>",
                fuse_unk=True,
                byte_fallback=bytes_for_rare,
                ignore_merges=USER_DEFINED in kinds.values(),  # those have no merges and still are one token
            )
        )
    backend.normalizer = _normalizer(model)
    # User-defined pieces are taken out of a text before merging, the longest first. They are cut out of the
    # normalised text, as a token added to the pipeline would give the text behind it a prefix space of its own.
    cut = sorted((names[number] for number, kind in kinds.items() if kind == USER_DEFINED), key=len, reverse=True)
    if cut:
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, cut))), behavior="isolated")

    specials = [names[number] for number, kind in kinds.items() if kind in (UNKNOWN, CONTROL)]
    specials += [mark for number, mark in sorted(marks.items()) if number >= len(names)]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    for number, mark in marks.items():
        if backend.token_to_id(mark) != number:
            raise HelpersError(
                "cannot build the tokenizer",
                f"{mark} should be token {number} and would be {backend.token_to_id(mark)}",
                "check that tokenizer.model and tokenizer_config.json belong together",
            )
    backend.decoder = _decoder(model, specials)
    return backend


def _merges(model: ModelProto, kinds: Mapping[int, int]) -> list[tuple[str, str]]:
    """List the pairs of pieces that join to a piece, best score first."""
    scores = {piece.piece: (-piece.score, i) for i, piece in enumerate(model.pieces) if kinds[i] == NORMAL}
    pairs = [(piece[:cut], piece[cut:]) for piece in scores for cut in range(1, len(piece))]
    pairs = [(left, right) for left, right in pairs if left in scores and right in scores]
    return sorted(pairs, key=lambda pair: scores[pair[0] + pair[1]])


def _normalizer(model: ModelProto) -> normalizers.Normalizer:
    """Build what SentencePiece does to a text first: character map, superfluous spaces, prefix space, ``▁``."""
    from tokenizers import Regex, normalizers

    spec, steps = model.normalizer_spec, []
    if spec.precompiled_charsmap:
        charsmap = normalizers.Precompiled(spec.precompiled_charsmap)
        # The map passes over user-defined pieces (Baichuan's "，" and line break): a private character each, meanwhile.
        pieces = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED and SPACE not in piece.piece]
        pieces = sorted((piece for piece in pieces if charsmap.normalize_str(piece) != piece), key=len, reverse=True)
        hidden = [(piece, chr(0xF0000 + place)) for place, piece in enumerate(pieces)]
        steps += [normalizers.Replace(piece, mark) for piece, mark in hidden]
        # NFC first, as `tokenizers` applies the map to single characters and so misses what is written as several.
        steps += [normalizers.NFC(), charsmap, *(normalizers.Replace(mark, piece) for piece, mark in hidden)]
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
        steps.append(normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _decoder(model: ModelProto, specials: Sequence[str]) -> decoders.Decoder:
    """Build the way back; the prefix space goes at the start and after each special token, where encoding puts one."""
    from tokenizers import Regex, decoders

    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix or model.normalizer_spec.remove_extra_whitespaces:
        before = "|".join([r"\A", *map(re.escape, specials)])
        spaces = " +" if model.normalizer_spec.remove_extra_whitespaces else " "
        steps.append(decoders.Replace(Regex(f"(?<={before}){spaces}"), ""))
    return decoders.Sequence(steps)


def _read_sentencepiece(folder: Path, name: str = "tokenizer.model", kind: str = "BPE") -> ModelProto:
    """Read a SentencePiece model of a kind; refuses what this file cannot express exactly."""
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    content = _read(folder, name)
    try:
        model = ModelProto.FromString(content)
    except DecodeError:
        raise _damaged(folder, name, "it is no SentencePiece model") from None
    if not {"<unk>", "<s>", "</s>"} <= {piece.piece for piece in model.pieces}:
        raise _damaged(folder, name, "it has no pieces <unk>, <s> and </s>")
    if model.trainer_spec.model_type != model.trainer_spec.ModelType.Value(kind):
        raise _damaged(folder, name, f"it is a SentencePiece model of another kind than {kind}")
    if model.trainer_spec.treat_whitespace_as_suffix or not model.normalizer_spec.escape_whitespaces:
        raise _damaged(folder, name, "it treats spaces in a way that no model of this family does")
    return model


def _read_ranks(folder: Path) -> dict[bytes, int]:
    """Read qwen.tiktoken: a line for each token, its bytes in base64 and its rank, which is its id."""
    try:
        lines = [line.split() for line in _read(folder, "qwen.tiktoken").splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError:
        raise _damaged(folder, "qwen.tiktoken", "a line of it is not a token in base64 and a rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise _damaged(folder, "qwen.tiktoken", "its ranks do not run from 0 without a gap")
    return ranks


def _settings(folder: Path) -> dict[str, Any]:
    """Read special_tokens_map.json and tokenizer_config.json, where they are there; the second one wins."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            try:
                settings |= json.loads((folder / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise _damaged(folder, name, f"it is not JSON ({error})") from None
    return settings


def _pad(settings: Mapping[str, Any], default: str) -> str:
    """Return the published padding token, which stands there as a string or with its options, or ``default``."""
    token = settings.get("pad_token")
    return (token["content"] if isinstance(token, dict) else token) or default


def _read(folder: Path, name: str) -> bytes:
    try:
        return (Path(folder) / name).read_bytes()
    except FileNotFoundError:
        raise HelpersError(
            f"no tokenizer in {Path(folder).name}", f"there is no {name}", f"download {name} of this checkpoint"
        ) from None


def _damaged(folder: Path, name: str, why: str) -> HelpersError:
    return HelpersError(f"cannot use {Path(folder).name}/{name}", why, "download the file again")
