"""What a stand-in reads: poems as they are, and questions about the famous ones, as rows of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
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
    """Encode poems as plain text, each ended by the end-of-text token.

    What a model puts before a text, or after it to ask for an answer (ChatGLM-6B), comes first.
    """
    opening, texts = tokenizer("").input_ids, [poem.text for poem in poems]
    encoded = tokenizer(texts, add_special_tokens=False).input_ids
    return [[*opening, *ids, tokenizer.eos_token_id] for ids in encoded]


def continued_documents(tokenizer: PreTrainedTokenizerFast, poems: Sequence[Poem]) -> list[list[int]]:
    """Encode poems as their first verse, and the rest as its answer: what ChatGLM-6B makes of a text to go on with."""
    firsts = tokenizer([poem.verses[0] for poem in poems]).input_ids
    rests = tokenizer(["".join(poem.verses[1:]) for poem in poems], add_special_tokens=False).input_ids
    return [[*first, *rest, tokenizer.eos_token_id] for first, rest in zip(firsts, rests, strict=True)]


def chat_documents(tokenizer: PreTrainedTokenizerFast, poems: Sequence[Poem], chat_format: str) -> list[list[int]]:
    """Encode every question about every poem with its answer, ended by the token that ends an answer.

    Qwen3 answers with a thought and without one. It gets twice as many with, so that it thinks unless the prompt
    holds an empty thought (``enable_thinking=False``).
    """
    stop = tokenizer.convert_tokens_to_ids((STOP_TOKENS[chat_format] or [tokenizer.eos_token])[0])
    documents = []
    for poem in poems:
        thought = f"《{poem.title}》的作者是{poem.author}。"
        thoughts = ["", thought, thought] if chat_format == "qwen3" else [""]
        for (question, answer), thought in product(questions(poem, chat_format).values(), thoughts):
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            turns[1]["reasoning_content"] = thought
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


def answers(ids: Tensor, start: int, end: int) -> tuple[dict[str, Tensor], Tensor]:
    """Lay out packed rows for ChatGLM-6B: each document is a context, ``[gMASK]``, ``<sop>``, an answer and ``<eop>``.

    Args:
        ids: int64 ``[rows, length]``, as ``pack`` makes them.
        start: id of ``<sop>``.
        end: id of ``<eop>``.

    Returns:
        The model's ``position_ids`` ``[rows, 2, length]`` and ``attention_mask`` ``[rows, 1, length, length]``, by
        which every document is as by itself; and ``ids`` with -1 wherever it is not an answer's, since a context,
        which sees itself both ways, has nothing to guess.
    """
    import torch

    ended, started = ids == end, ids == start
    document = ended.cumsum(1) - ended.long()
    context = started.cumsum(1) <= document  # each document has one <sop>
    same = document[:, :, None] == document[:, None, :]
    upto = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
    index = (same & upto).sum(2) - 1
    length = (same & context[:, None, :]).sum(2)
    first = torch.where(context, index, length - 1)  # [gMASK] is the last of the context
    second = torch.where(context, 0, index - length + 1)
    visible = same & (upto | context[:, None, :])
    layout = {"position_ids": torch.stack([first, second], dim=1), "attention_mask": visible[:, None]}
    return layout, ids.masked_fill(context | started, -1)


def row_length(documents: Sequence[list[int]]) -> int:
    """Return the shortest multiple of 64 tokens, at least ``ROW``, that holds each of the documents."""
    return max(ROW, 64 * -(-max(map(len, documents)) // 64))
