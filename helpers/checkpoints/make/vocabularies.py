"""Tokenizer files in the two original forms, with one token for each of the most frequent characters.

A SentencePiece ``tokenizer.model`` is a protocol buffer: a list of pieces with scores, and settings. A
``qwen.tiktoken`` is a line for each byte string: base64 and rank. Neither needs a trainer here, since the only
merges are those that spell the fixed words of a chat template (one token instead of one for each letter).
"""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Iterable

from ...native.chat_templates import CHAT_TEMPLATES

SPECIAL = re.compile(r"<[^<>\s]+>|\[[a-zA-Z]+\]")
"""How a special token looks in a chat template, e.g. ``<|im_end|>`` or ``[gMASK]``."""


def characters(frequent: Iterable[str], needed: Iterable[str]) -> list[str]:
    """List the characters of two collections of texts: all of ``needed`` first, each part by falling frequency."""
    first, then = Counter("".join(needed)), Counter("".join(frequent))
    by_count = [sorted(count, key=lambda char: (-count[char], char)) for count in (first, then)]
    return list(dict.fromkeys(char for part in by_count for char in part if not char.isspace()))


def template_text(chat_format: str) -> str:
    """Render an empty chat: the words that a format always repeats, its special tokens made line breaks."""
    from jinja2 import Environment

    messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    template = Environment().from_string(CHAT_TEMPLATES[chat_format])
    return SPECIAL.sub("\n", template.render(messages=messages, bos_token=""))


def spellings(words: Iterable[str]) -> list[str]:
    """List the beginnings of each word, shortest first, so that merges from the left lead to the whole word."""
    return list(dict.fromkeys(word[:end] for word in words for end in range(1, len(word) + 1)))


def sentencepiece(
    size: int,
    chars: list[str],
    words: str,
    *,
    dummy_prefix: bool,
    placed: dict[int, str] | None = None,
) -> bytes:
    """Build a SentencePiece BPE model with byte fallback.

    Args:
        size: number of pieces.
        chars: characters in order of preference; as many are taken as there is room for.
        words: text whose words get pieces of their own.
        dummy_prefix: whether the model puts a space before every text.
        placed: pieces that stand at fixed ids, taken literally when they occur in a text.

    Returns:
        The content of ``tokenizer.model``: 0 <unk>, 1 <s>, 2 </s>, then the 256 bytes, words and characters.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    placed = placed or {}
    kinds = ModelProto.SentencePiece
    fixed = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    fixed += [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)]
    segments = re.findall("▁?[^▁\n]+", words.replace(" ", "▁"))
    starts = ["▁" + segment.lstrip("▁") if dummy_prefix else segment for segment in segments]
    normal = dict.fromkeys(["▁", *spellings(starts), *"".join(starts), *chars])
    room = size - len(fixed) - len(placed)
    pieces = iter(fixed + [(piece, kinds.NORMAL) for piece in list(normal)[:room]])

    model = ModelProto()
    for number in range(size):
        piece, kind = (placed[number], kinds.USER_DEFINED) if number in placed else next(pieces)
        score = -float(number) if kind == kinds.NORMAL else 0.0
        model.pieces.add(piece=piece, type=kind, score=score)
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.vocab_size = size
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.unk_id, model.trainer_spec.bos_id, model.trainer_spec.eos_id = 0, 1, 2
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = dummy_prefix
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    return model.SerializeToString(deterministic=True)


def tiktoken(size: int, chars: list[str], words: str) -> bytes:
    """Build a byte-level BPE of ``size`` ranks: bytes, template words, then characters over their first two bytes.

    Two of a character's three bytes are a token too, since BPE only ever joins two; some 300 cover all of Chinese.

    Returns:
        The content of ``qwen.tiktoken``.
    """
    ranks = dict.fromkeys(bytes([byte]) for byte in range(256))
    ranks |= dict.fromkeys(word.encode() for word in spellings(re.findall(" ?[A-Za-z]+", words)))
    for char in chars:
        spelt = [char.encode()[:end] for end in range(2, len(char.encode()) + 1)]
        if len(ranks.keys() | spelt) > size:
            break
        ranks |= dict.fromkeys(spelt)
    rest = (bytes([first, second]) for first in range(97, 123) for second in range(97, 123))
    for pair in rest:  # at most one rank is left, when the next character would need two
        if len(ranks) == size:
            break
        ranks.setdefault(pair)
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))
