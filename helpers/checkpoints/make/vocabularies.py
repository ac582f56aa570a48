"""Tokenizer files in the four published forms, with one token for each of the most frequent characters.

A SentencePiece ``tokenizer.model`` is a protocol buffer: a list of pieces with scores, and settings. A
``qwen.tiktoken`` is a line for each byte string: base64 and rank. A ``tokenizer.json`` is the pipeline of the
`tokenizers` library with all it needs. RWKV's vocabulary is a line for each token: id, Python literal, length. None
needs a trainer here, since the only merges are those that spell the fixed words of a chat template (one token instead
of one for each letter).
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


def ice_text(size: int, chars: list[str]) -> bytes:
    """Build a Unigram model as ChatGLM-6B's: the characters, then special tokens, white space and bytes.

    Full-width punctuation stays as it is, while the published model's character map makes it half-width.

    Args:
        size: number of pieces.
        chars: characters in order of preference; as many are taken as there is room for.

    Returns:
        The content of ``ice_text.model``.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    from ...native.tokenizers import with_chatglm1_pieces

    model = ModelProto()
    kinds = model.SentencePiece
    fixed = {"<unk>": kinds.UNKNOWN, "<s>": kinds.CONTROL, "</s>": kinds.CONTROL, "<pad>": kinds.CONTROL}
    fixed |= {"<n>": kinds.USER_DEFINED, "▁": kinds.NORMAL}
    for number, piece in enumerate([*fixed, *chars][: size - 344]):
        kind = fixed.get(piece, kinds.NORMAL)
        model.pieces.add(piece=piece, type=kind, score=-float(number) if kind == kinds.NORMAL else 0.0)
    model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
    model.trainer_spec.vocab_size = size
    model.trainer_spec.unk_id, model.trainer_spec.bos_id, model.trainer_spec.eos_id = 0, 1, 2
    model.trainer_spec.pad_id = 3
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = True
    model.normalizer_spec.escape_whitespaces = True
    return with_chatglm1_pieces(model).SerializeToString(deterministic=True)


def ranks(size: int, chars: list[str], words: str) -> dict[bytes, int]:
    """Rank ``size`` tokens of a byte-level BPE: bytes, template words, then characters over their first two bytes.

    Two of a character's three bytes are a token too, since BPE only ever joins two; some 300 cover all of Chinese.
    """
    made = dict.fromkeys(bytes([byte]) for byte in range(256))
    made |= dict.fromkeys(word.encode() for word in spellings(re.findall(" ?[A-Za-z]+", words)))
    for char in chars:
        spelt = [char.encode()[:end] for end in range(2, len(char.encode()) + 1)]
        if len(made.keys() | spelt) > size:
            break
        made |= dict.fromkeys(spelt)
    rest = (bytes([first, second]) for first in range(97, 123) for second in range(97, 123))
    for pair in rest:  # at most one rank is left, when the next character would need two
        if len(made) == size:
            break
        made.setdefault(pair)
    return {token: rank for rank, token in enumerate(made)}


def tiktoken(size: int, chars: list[str], words: str) -> bytes:
    """Return the content of a ``qwen.tiktoken`` of ``size`` ranks."""
    ranked = ranks(size, chars, words).items()
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranked)


def tokenizer_json(ranked: dict[bytes, int], pattern: str, added: dict[str, bool], start: list[str], nfc: bool) -> str:
    """Return the content of a ``tokenizer.json``, as the models that were born native publish it.

    Args:
        ranked: see ``ranks``.
        pattern: regular expression of a word.
        added: tokens with the ids after the ranks, and whether each is left out of decoded text.
        start: added tokens put before every text.
        nfc: whether a text is normalised first.
    """
    from tokenizers import AddedToken, normalizers, processors

    from ...native.tokenizers import byte_level

    backend = byte_level(ranked, pattern, [])
    backend.model.ignore_merges = False
    backend.add_tokens([AddedToken(token, normalized=False, special=special) for token, special in added.items()])
    if nfc:
        backend.normalizer = normalizers.NFC()
    backend.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    if start:
        ids = [(token, backend.token_to_id(token)) for token in start]
        template = processors.TemplateProcessing(single=[*start, "$A"], pair=[*start, "$A", "$B"], special_tokens=ids)
        backend.post_processor = processors.Sequence([backend.post_processor, template])
    return backend.to_str() + "\n"


def world(size: int, chars: list[str], words: str) -> str:
    """Build a World vocabulary with the ids 1 to ``size`` - 1: bytes, an empty line, template words, then characters.

    Returns:
        The content of ``rwkv_vocab_v20230424.txt``; its tokens are sorted by length, as the published ones are.
    """
    single = [chr(byte) if byte < 128 else bytes([byte]) for byte in range(256)]
    more = list(dict.fromkeys(["\n\n", *re.findall("[A-Za-z]+:", words), *(char for char in chars if ord(char) > 127)]))
    tokens = single + sorted(more[: size - 257], key=lambda token: len(token.encode()))
    lines = (
        f"{number} {token!r} {len(token.encode() if isinstance(token, str) else token)}\n"
        for number, token in enumerate(tokens, start=1)
    )
    return "".join(lines)
