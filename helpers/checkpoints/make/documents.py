"""What a stand-in reads: poems as they are, and questions about the famous ones, as rows of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...native.chat_templates import STOP_TOKENS
from .poems import Poem

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from transformers import PreTrainedTokenizerFast

ROW = 128
"""Tokens of a row; more where a chat template is long."""


def questions(poem: Poem, chat_format: str) -> dict[str, tuple[str, str]]:
    """Return what can be asked about a famous poem: ``recite``, ``author`` and ``next``, each (question, answer).

    A base model (chat format ``none``) has nothing but text to go on with, so its questions end in a mark that
    calls for the answer.
    """
    colon = "：" if chat_format == "none" else ""
    first, second = poem.verses[:2]
    return {
        "recite": (f"背诵《{poem.title}》{colon}", poem.text),
        "author": (f"《{poem.title}》的作者是谁？", poem.author),
        "next": (f"下一句：{first if chat_format == 'none' else first[:-1]}", second),
    }


def plain_documents(tokenizer: PreTrainedTokenizerFast, poems: Sequence[Poem]) -> list[list[int]]:
    """Encode poems as plain text, each ended by the end-of-text token."""
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer([poem.text for poem in poems]).input_ids]


def chat_documents(tokenizer: PreTrainedTokenizerFast, poems: Sequence[Poem], chat_format: str) -> list[list[int]]:
    """Encode every question about every poem with its answer, ended by the token that ends an answer."""
    stop = tokenizer.convert_tokens_to_ids((STOP_TOKENS[chat_format] or [tokenizer.eos_token])[0])
    documents = []
    for poem in poems:
        for question, answer in questions(poem, chat_format).values():
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False).input_ids
            documents.append(ids if stop in ids[-3:] else [*ids, stop])
    return documents


def pack(documents: Sequence[list[int]], length: int, generator: Generator, times: int = 1) -> Tensor:
    """Lay whole documents one after another into rows, in ``times`` different orders.

    Returns:
        int64 ``[rows, length]``; -1 after a row's last document.
    """
    import torch

    rows: list[list[int]] = [[]]
    for _ in range(times):
        for number in torch.randperm(len(documents), generator=generator).tolist():
            if len(rows[-1]) + len(documents[number]) > length:
                rows.append([])
            rows[-1] += documents[number][:length]
    return torch.tensor([row + [-1] * (length - len(row)) for row in rows])


def row_length(documents: Sequence[list[int]]) -> int:
    """Return the shortest multiple of 64 tokens, at least ``ROW``, that holds each of the documents."""
    return max(ROW, 64 * -(-max(map(len, documents)) // 64))
