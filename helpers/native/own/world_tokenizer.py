"""RWKV's World tokenizer: from every place in a text, the longest token of the vocabulary that fits there.

Tokens are strings of bytes, not of characters. transformers wants them as text, so each byte stands for the character
with its number (latin-1).

Source: the PyPI package rwkv, rwkv_tokenizer.py, and its vocabulary file (Apache-2.0).
"""

from __future__ import annotations

import shutil
from ast import literal_eval
from pathlib import Path
from types import MappingProxyType

from transformers import PreTrainedTokenizer

from ...errors import HelpersError
from ..chat_templates import CHAT_TEMPLATES
from ..rwkv import VOCABULARY

END = "<|rwkv_tokenizer_end_of_text|>"
"""Name of token 0, which ends a text and pads; the vocabulary file does not have it."""


class RwkvWorldTokenizer(PreTrainedTokenizer):
    """Greedy longest match over UTF-8, by a trie; every byte is a token, so nothing is ever unknown."""

    vocab_files_names = MappingProxyType({"vocab_file": VOCABULARY})
    model_input_names = ("input_ids", "attention_mask")

    def __init__(self, vocab_file: str, **settings) -> None:
        """Read the vocabulary.

        Args:
            vocab_file: a line for each token: its id, the token as a Python literal of text or bytes, its length.
            settings: of every tokenizer of transformers.

        Raises:
            HelpersError: the file is damaged or lacks a byte.
        """
        self.vocab_file = vocab_file
        self.ids = {END: 0} | read_vocabulary(Path(vocab_file))
        self.names = {number: token for token, number in self.ids.items()}
        self.root: dict = {}
        for token in self.ids.keys() - {END}:
            node = self.root
            for char in token:
                node = node.setdefault(char, {})
            node[""] = token
        settings = {"eos_token": END, "bos_token": END, "pad_token": END, "unk_token": None} | settings
        super().__init__(**settings | {"clean_up_tokenization_spaces": False})

    @property
    def stop_strings(self) -> list[str] | None:
        r"""What ends an answer of a chat, for ``generate``: no token does always, ``。\n\n`` is ``。\n`` and ``\n``."""
        return ["\n\n"] if self.chat_template == CHAT_TEMPLATES["rwkv"] else None

    @property
    def vocab_size(self) -> int:
        """Number of ids up to the highest one."""
        return max(self.names) + 1

    def get_vocab(self) -> dict[str, int]:
        """Return every token with its id."""
        return self.ids | self.added_tokens_encoder

    def _tokenize(self, text: str, **_) -> list[str]:
        text, tokens, place = text.encode().decode("latin-1"), [], 0
        while place < len(text):
            node, end, longest = self.root, place, ""
            while end < len(text) and (node := node.get(text[end])) is not None:
                end += 1
                longest = node.get("", longest)
            tokens.append(longest)  # never empty: every byte is a token
            place += len(longest)
        return tokens

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.names.get(index, "")  # a model has a few more rows than there are tokens

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join tokens; bytes that make no character, such as half of one, become U+FFFD."""
        return "".join(tokens).encode("latin-1").decode(errors="replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy the vocabulary file."""
        target = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}{VOCABULARY}"
        if target.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)


def read_vocabulary(file: Path) -> dict[str, int]:
    """Read tokens, as latin-1 text, with their ids.

    Raises:
        HelpersError: a line is damaged, or one of the 256 bytes is missing.
    """
    ids = {}
    try:
        for line in file.read_text(encoding="utf-8").split("\n"):
            if line:
                number, rest = line.split(" ", 1)
                literal, length = rest.rsplit(" ", 1)
                token = literal_eval(literal)
                token = token.encode() if isinstance(token, str) else token
                if len(token) != int(length):
                    raise ValueError(f"token {number} is {len(token)} bytes long, not {length}")
                ids[token.decode("latin-1")] = int(number)
    except (ValueError, SyntaxError, AttributeError) as error:
        raise HelpersError(f"cannot read {file.name}", f"a line is damaged ({error})", "download it again") from None
    if not set(map(chr, range(256))) <= set(ids):
        raise HelpersError(f"cannot read {file.name}", "not every byte is a token", "download it again")
    return ids
