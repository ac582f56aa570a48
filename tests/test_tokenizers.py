"""The tokenizers built from original files give the ids of the libraries that made those files.

By hand on 2026-11-24, with files that are too large to keep here:

* the published qwen.tiktoken (151,643 ranks) against tiktoken: 4,533 texts, 1,500 of them random characters, no
  difference in either direction;
* the published tokenizer.model of Chinese-LLaMA-Alpaca-2 (55,296 pieces, 23,555 of them with the same score) against
  sentencepiece: 121 English texts equal, 592 of 654 Chinese ones equal, 205 of 26,913 tokens of these different;
* the ice_text.model of an early ChatGLM-6B (130,000 pieces, in GitHub Jittor/JittorLLMs, models/chatglm) against
  sentencepiece, as 150,528 and as 130,528 tokens: 2,196 Chinese and mixed texts, 1,635 pieces of code and 1,000
  random ones equal in both directions; of 1,000 random Unicode texts 4 encoded differently, all of combining marks;
* the published tokenizer.model of Baichuan-13B (64,000 pieces, 390 user-defined, nmt_nfkc) against sentencepiece:
  4,704 texts, 2,000 of them random characters; different are four that spell out a special token;
* 16 models as below with 1,000 texts each, 800 of them random: equal; 16 with a character map (nmt_nfkc): 0 to 8
  texts of each different; those looked at (30) all hold a combining mark by itself.
"""

from __future__ import annotations

import base64
import io
import json
import random
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import torch
from transformers import AutoTokenizer, GlmConfig, LlamaConfig, Qwen2Config, TextStreamer

from helpers.errors import HelpersError
from helpers.native import register, tokenizers
from helpers.native.own.chatglm1 import ChatGLM1Config

register()

CORPUS = [
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
    "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。",
    "The quick brown fox jumps over the lazy dog; the philosophy of people is to sip.",
    "Tokenizers cut a text into pieces, and models read the numbers of the pieces.",
    "def add(first, second):\n    return first  +  second",
    "问：北京在哪里？答：北京在中国的北方。system user assistant Human Assistant Instruction Response",
] * 4
TEXTS = [
    "",
    " ",
    "a",
    "床前明月光",
    "举头望明月，  the moon\n\n低头思故乡。",
    "  leading and trailing  ",
    "tabs\tand\nnew\r\nlines\n",
    "    if x:\n        return  None",
    "emoji 🌕🐉👨‍👩‍👧, rare 𠮷 龘, accents café",
    "full width ＡＢＣ　１２３，and ▁ itself",
    "philosophy of people: sop eop gMASK",
    "<mark>a<mark> b <mark><m",
    unicodedata.normalize("NFD", "café が"),
]
FLAGS = {
    "as Llama": {},
    "no prefix": {"add_dummy_prefix": False},
    "spaces removed": {"remove_extra_whitespaces": True},
    "spaces removed, no prefix": {"add_dummy_prefix": False, "remove_extra_whitespaces": True},
    "no bytes": {"byte_fallback": False},
    "user-defined pieces": {"user_defined_symbols": ["<mark>", "<m"]},
    "user-defined pieces, no prefix": {"user_defined_symbols": ["<mark>", "<m"], "add_dummy_prefix": False},
    "character map": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "user-defined pieces that the character map would change": {
        "normalization_rule_name": "nmt_nfkc",
        "user_defined_symbols": ["，", "\n", "１２", "１"],
    },
}
QWEN_PATTERN = "|".join(  # as tokenization_qwen.py has it, one part a line
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
MARKS = [f"[UNUSED_TOKEN_{number}]" for number in range(141, 147)]
CHATGLM1_MARKS = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
INTERNLM2_IDS = {"<|plugin|>": -6, "<|interpreter|>": -5, "<|action_end|>": -4, "<|action_start|>": -3}
INTERNLM2_IDS |= {"<|im_end|>": -2, "<|im_start|>": -1}


def train(folder: Path, last: list[str] | None = None, **flags) -> sentencepiece.SentencePieceProcessor:
    """Train a SentencePiece model with Llama's flags unless told otherwise, write it, and load it.

    ``last`` names user-defined pieces that are put at the end of the vocabulary.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    settings = {
        "model_type": "bpe",
        "vocab_size": 520,
        "byte_fallback": True,
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "allow_whitespace_only_pieces": True,
    }
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=written, minloglevel=2, num_threads=1, **settings | flags
    )
    model = ModelProto.FromString(written.getvalue())
    for piece in last or []:
        model.pieces.add(piece=piece, type=ModelProto.SentencePiece.USER_DEFINED)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


class IceText:
    """ChatGLM-6B's own tokenizer around a SentencePiece model: white space written as pieces, images before all."""

    def __init__(self, model: bytes, images: int = 0):
        self.library, self.images = sentencepiece.SentencePieceProcessor(model_proto=model), images

    def get_piece_size(self):
        return self.images + self.library.get_piece_size()

    def encode(self, text):
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        for length in range(80, 1, -1):
            text = text.replace(" " * length, f"<|blank_{length}|>")
        return [self.images + number for number in self.library.encode(text)]

    def decode(self, ids):
        text = self.library.decode([number - self.images for number in ids])
        for length in range(2, 81):
            text = text.replace(f"<|blank_{length}|>", " " * length)
        return text.replace("<n>", "\n").replace("<|tab|>", "\t")


def train_ice(folder: Path, images: int = 0, early: bool = False, **flags) -> IceText:
    """Train an ice_text.model of the two published forms, ending with the text's pieces or with all of them."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    flags = {"byte_fallback": False, "hard_vocab_limit": False, "required_chars": "<>|0123456789x_"} | flags
    train(folder, model_type="unigram", user_defined_symbols=["<pad>", "<n>"], **flags)
    model = ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    (folder / "tokenizer.model").unlink()
    model.pieces[3].type = ModelProto.SentencePiece.CONTROL
    if early:
        (folder / "ice_text.model").write_bytes(model.SerializeToString())
    names = [(mark, 3) for mark in CHATGLM1_MARKS]
    names += [("<|tab|>", 4), *((f"<|blank_{length}|>", 4) for length in range(2, 81))]
    names += [(f"<0x{byte:02X}>", 6) for byte in range(256)]
    for name, kind in names:
        model.pieces.add(piece=name, type=kind, score=0.0)
    model.trainer_spec.byte_fallback = True
    if not early:
        (folder / "ice_text.model").write_bytes(model.SerializeToString())
    if images != 20_000:  # what the code takes where the file says nothing
        (folder / "tokenizer_config.json").write_text(json.dumps({"num_image_tokens": images}))
    return IceText(model.SerializeToString(), images)


def write_ranks(folder: Path) -> tiktoken.Encoding:
    """Write a small qwen.tiktoken, bytes and then common strings, and return Qwen's encoding of it."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for word in ["th", "the", " the", "in", "er", "明", "月", "明月", "  ", "    ", "re", "return", "<|", "12", "Sx"]:
        for end in range(2, len(word.encode()) + 1):
            ranks.setdefault(word.encode()[:end], len(ranks))
    folder.mkdir(parents=True, exist_ok=True)
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205))]
    specials = {name: len(ranks) + number for number, name in enumerate(names)}
    return tiktoken.Encoding("small", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=specials)


def random_texts(number: int, alphabet: str) -> list[str]:
    chosen = random.Random(0)
    return ["".join(chosen.choices(alphabet, k=chosen.randrange(30))) for _ in range(number)]


def built(family: str, folder: Path):
    """Build a tokenizer of each family with its own chat format, from a model made for it."""
    if family == "qwen":
        write_ranks(folder)
        return tokenizers.qwen(folder, "chatml")
    if family == "chatglm1":
        train_ice(folder)
        return tokenizers.chatglm1(folder, "chatglm")
    pieces = {"baichuan": ["<reserved_106>", "<reserved_107>"], "internlm2": MARKS}.get(family)
    train(folder, last=pieces)
    chat_format = {"baichuan": "baichuan2", "internlm2": "internlm2", "llama": "llama2-chinese"}.get(family, family)
    build = tokenizers.chatglm if family.startswith("chatglm") else getattr(tokenizers, family)
    return build(folder, chat_format)


FAMILIES = {
    "chatglm1": ChatGLM1Config,
    "chatglm2": GlmConfig,
    "chatglm3": GlmConfig,
    "baichuan": LlamaConfig,
    "internlm2": LlamaConfig,
    "llama": LlamaConfig,
    "qwen": Qwen2Config,
}
"""The families, with the native config class whose model_type AutoTokenizer sees beside the tokenizer."""


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
def test_ids_and_text_are_those_of_sentencepiece(tmp_path, flags):
    reference = train(tmp_path, **flags)
    tokenizer = tokenizers.llama(tmp_path, "none")
    for text in TEXTS + CORPUS[:7] + random_texts(300, "the moon \n\t.明月光，。🌕▁<mark>"):
        ids = reference.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        if reference.unk_id() not in ids:  # sentencepiece writes it as a question mark, transformers as <unk>
            assert tokenizer.decode(ids) == reference.decode(ids), text


def test_ids_and_text_are_those_of_tiktoken(tmp_path):
    reference = write_ranks(tmp_path)
    tokenizer = tokenizers.qwen(tmp_path, "chatml")
    for text in [*TEXTS, *CORPUS[:7], "1234 5", "I'M'Sx", *random_texts(300, "the in\n\t .,1明月光🌕<|'s")]:
        composed = unicodedata.normalize("NFC", text)
        assert tokenizer.encode(text) == reference.encode(composed), text
        assert tokenizer.decode(tokenizer.encode(text)) == composed
    for name in ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|extra_204|>"]:
        assert tokenizer.encode(name) == reference.encode(name, allowed_special="all")
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"


@pytest.mark.parametrize("family", ["chatglm2", "chatglm3"])
def test_chatglm_appends_its_marks_and_begins_every_text_with_two(tmp_path, family):
    reference = train(tmp_path)
    tokenizer = tokenizers.chatglm(tmp_path, family)
    size = reference.get_piece_size()
    marks = ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>"]
    marks += ["<|observation|>"]
    marks = marks if family == "chatglm3" else marks[:5]
    assert [tokenizer.convert_tokens_to_ids(mark) for mark in marks] == list(range(size, size + len(marks)))
    assert len(tokenizer) == size + len(marks)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token) == (0, 2, None)
    for text in TEXTS:  # among them words that hold "sop" and "eop"
        assert tokenizer.encode(text) == [size + 1, size + 3, *reference.encode(text)]


def test_a_base_model_of_chatglm_begins_a_chat_as_any_text(tmp_path):
    train(tmp_path)
    tokenizer = tokenizers.chatglm(tmp_path, "none")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "明月"}], tokenize=True)
    assert chat["input_ids"] == tokenizer.encode("明月")


def test_chatglm_encodes_each_part_between_marks_by_itself(tmp_path):
    reference = train(tmp_path)
    tokenizer = tokenizers.chatglm(tmp_path, "chatglm3")
    size, text = reference.get_piece_size(), "<|user|>明月<|assistant|> the <|observation|>"
    wanted = [size + 6, *reference.encode("明月"), size + 7, *reference.encode(" the "), size + 8]
    assert tokenizer.encode(text, add_special_tokens=False) == wanted
    assert tokenizer.decode(wanted) == text


ICE_FLAGS = {"as published": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}, "plain": {}}
ICE_FILES = {
    "published": {},
    "early, images first": {"early": True, "images": 20_000},
    "early, without images": {"early": True},
    "whole, a few images": {"images": 7},
}


@pytest.mark.parametrize("flags", ICE_FLAGS.values(), ids=ICE_FLAGS.keys())
@pytest.mark.parametrize("files", ICE_FILES.values(), ids=ICE_FILES.keys())
def test_chatglm1_gives_the_ids_of_its_own_code(tmp_path, files, flags):
    reference = train_ice(tmp_path, **files, **flags)
    size = reference.get_piece_size()
    tokenizer = tokenizers.chatglm1(tmp_path, "chatglm", start=size - 340)
    assert len(tokenizer) == size
    assert [tokenizer.convert_tokens_to_ids(mark) for mark in CHATGLM1_MARKS] == list(range(size - 344, size - 336))
    marks = [size - 343, size - 340]
    composed = [text for text in TEXTS if unicodedata.is_normalized("NFC", text)]
    runs = ["a" + " " * length + "b" for length in (1, 2, 3, 79, 80, 81, 82, 160, 163)] + ["\n\n\t\t", "\t" * 9 + "x"]
    odd = ["<image 5>", "<image_5>", "<0x41>", "a\n<0x41>\nb", "<n>", "<|blank_3|>"]
    for text in composed + runs + odd + CORPUS[:7] + random_texts(300, "the moon \n\t.明月光，。🌕▁<n>"):
        ids = reference.encode(text)
        assert tokenizer.encode(text) == [*ids, *marks], text
        assert tokenizer.decode(ids) == reference.decode(ids), text
    for text in [] if flags else runs + [text for text in composed if "▁" not in text]:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer("", "明").input_ids == [*marks, *reference.encode("明"), *marks]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<sop>", "<eop>", "<pad>")


def test_chatglm1_compares_its_start_with_the_model(tmp_path):
    size = train_ice(tmp_path, images=5).get_piece_size()
    with pytest.raises(HelpersError, match=rf"<sop> is token 130004 in config.json and would be {size - 340}"):
        tokenizers.chatglm1(tmp_path, "chatglm", start=130_004)


def test_baichuan_adds_nothing_unless_told_and_finds_its_turn_marks(tmp_path):
    reference = train(tmp_path, user_defined_symbols=["<reserved_106>", "<reserved_107>"])
    tokenizer = tokenizers.baichuan(tmp_path, "baichuan2")
    user, assistant = reference.piece_to_id("<reserved_106>"), reference.piece_to_id("<reserved_107>")
    wanted = [user, *reference.encode("明月"), assistant, *reference.encode("光")]
    assert tokenizer.encode("<reserved_106>明月<reserved_107>光") == wanted
    assert tokenizer.decode(wanted, skip_special_tokens=True) == "明月 光"
    assert tokenizer.pad_token == "<unk>"
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "pad_token": {"content": "</s>"}}')
    tokenizer = tokenizers.baichuan(tmp_path, "none")
    assert tokenizer.encode("光") == [reference.bos_id(), *reference.encode("光")]
    assert tokenizer.pad_token == "</s>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "光"}], tokenize=False) == "<s>光"


def test_baichuan2_needs_the_reserved_pieces(tmp_path):
    train(tmp_path)
    with pytest.raises(HelpersError, match="no pieces <reserved_106>"):
        tokenizers.baichuan(tmp_path, "baichuan2")


@pytest.mark.parametrize("said", ["by the configuration", "by the end of the model", "by the model"])
def test_internlm2_finds_its_marks(tmp_path, said):
    pieces = list(INTERNLM2_IDS) if said == "by the model" else MARKS
    reference = train(tmp_path, last=[*pieces, "after"] if said == "by the configuration" else pieces)
    size = reference.get_piece_size() - (said == "by the configuration")
    ids = {name: size + place for name, place in INTERNLM2_IDS.items()}
    if said == "by the configuration":
        decoder = {str(number): {"content": name} for name, number in ids.items()}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    tokenizer = tokenizers.internlm2(tmp_path, "internlm2")
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in ids} == ids
    assert tokenizer.encode("明月") == [reference.bos_id(), *reference.encode("明月")]
    text = "<|im_start|>user\n明月<|im_end|>"
    wanted = [ids["<|im_start|>"], *reference.encode("user\n明月"), ids["<|im_end|>"]]
    assert tokenizer.encode(text, add_special_tokens=False) == wanted
    assert tokenizer.decode(wanted) == text
    assert tokenizer.decode(wanted, skip_special_tokens=True) == "user\n明月"


def test_internlm2_does_not_guess_its_marks(tmp_path):
    train(tmp_path)
    with pytest.raises(HelpersError, match=r"ids of <\|im_start\|> and the other marks are unknown"):
        tokenizers.internlm2(tmp_path, "internlm2")


def test_marks_that_do_not_fit_the_model_are_refused(tmp_path):
    size = train(tmp_path).get_piece_size()
    decoder = {str(size + 3): {"content": "<|im_start|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    with pytest.raises(HelpersError, match=rf"<\|im_start\|> should be token {size + 3} and would be {size}"):
        tokenizers.internlm2(tmp_path, "internlm2")


def test_llama_takes_its_start_and_padding_from_the_checkpoint(tmp_path):
    reference = train(tmp_path)
    tokenizer = tokenizers.llama(tmp_path, "alpaca")
    assert tokenizer.encode("明月") == [reference.bos_id(), *reference.encode("明月")]
    assert tokenizer.pad_token == "</s>"
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "[PAD]"}')
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    tokenizer = tokenizers.llama(tmp_path, "alpaca")
    assert tokenizer.encode("明月") == reference.encode("明月")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "明月"}], tokenize=False)
    assert chat.startswith("Below is an instruction")
    assert tokenizer.pad_token_id == reference.get_piece_size() == len(tokenizer) - 1


def test_a_special_token_in_a_text_is_that_token_unless_told_otherwise(tmp_path):
    reference = train(tmp_path)
    tokenizer = tokenizers.llama(tmp_path, "none")
    assert tokenizer.encode("</s>", add_special_tokens=False) == [reference.eos_id()]
    plain = tokenizer("a</s>", add_special_tokens=False, split_special_tokens=True).input_ids
    assert plain == reference.encode("a</s>")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_tokenizer_loads_without_remote_code_and_is_the_same(tmp_path, family):
    tokenizer = built(family, tmp_path / "original")
    tokenizer.save_pretrained(tmp_path / "native")
    FAMILIES[family]().save_pretrained(tmp_path / "native")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "native")
    chat = [{"role": "user", "content": "明月"}]
    specials = "".join(token.content for token in tokenizer.added_tokens_decoder.values())
    for text in [*TEXTS, specials, tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)]:
        assert loaded.encode(text) == tokenizer.encode(text), text
        assert loaded.decode(loaded.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    for name in ("pad_token_id", "eos_token_id", "bos_token_id", "unk_token_id", "chat_template", "padding_side"):
        assert getattr(loaded, name) == getattr(tokenizer, name), name
    assert loaded.clean_up_tokenization_spaces is False


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_are_padded_on_the_left(tmp_path, family):
    tokenizer = built(family, tmp_path)
    batch = tokenizer(["明", "明月光 the moon"], padding=True)
    short = tokenizer.encode("明")
    missing = len(batch.input_ids[1]) - len(short)
    assert missing > 0
    assert batch.input_ids[0] == [tokenizer.pad_token_id] * missing + short
    assert batch.attention_mask[0] == [0] * missing + [1] * len(short)


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_and_text_survive_there_and_back(tmp_path, family):
    tokenizer = built(family, tmp_path)
    specials = [token.content for token in tokenizer.added_tokens_decoder.values()]
    text = " a\n".join(["举头", *specials, "🌕  明月"])
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    for special in specials:
        assert len(tokenizer.encode(special, add_special_tokens=False)) == 1
    ids = tokenizer.encode("举头" + "".join(specials), add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "举头"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_can_be_shown_token_by_token(tmp_path, family, capsys):
    tokenizer = built(family, tmp_path)
    text = "龘是汉字 🐉 and 𠮷 too.\n明月"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > len(text)  # rare characters take several tokens each
    streamer = TextStreamer(tokenizer)
    for number in ids:
        streamer.put(torch.tensor([number]))
    streamer.end()
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize("family", ["chatglm", "chatglm1", "baichuan", "internlm2", "llama", "qwen"])
def test_a_missing_file_is_named(tmp_path, family):
    name = {"qwen": "qwen.tiktoken", "chatglm1": "ice_text.model"}.get(family, "tokenizer.model")
    with pytest.raises(HelpersError, match=f"there is no {name}"):
        getattr(tokenizers, family)(tmp_path, "none")


def test_what_is_no_sentencepiece_bpe_model_is_refused(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1018370\n"
    (tmp_path / "tokenizer.model").write_text(pointer)
    with pytest.raises(HelpersError, match="it is no SentencePiece model"):
        tokenizers.llama(tmp_path, "none")
    train(tmp_path, model_type="unigram", vocab_size=390)
    with pytest.raises(HelpersError, match="another kind than BPE"):
        tokenizers.llama(tmp_path, "none")
    train(tmp_path, bos_id=-1)
    with pytest.raises(HelpersError, match="no pieces <unk>, <s> and </s>"):
        tokenizers.llama(tmp_path, "none")
    train(tmp_path, treat_whitespace_as_suffix=True)
    with pytest.raises(HelpersError, match="treats spaces in a way"):
        tokenizers.llama(tmp_path, "none")
    train(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(HelpersError, match=r"tokenizer_config\.json: it is not JSON"):
        tokenizers.llama(tmp_path, "none")


@pytest.mark.parametrize(
    ("content", "why"),
    [("AA== 0\nAQ== 2\n", "without a gap"), ("AA== 0 1\n", "not a token"), ("AA= 0\n", "not a token"), ("x", "not a")],
)
def test_a_damaged_rank_file_is_refused(tmp_path, content, why):
    (tmp_path / "qwen.tiktoken").write_text(content)
    with pytest.raises(HelpersError, match=why):
        tokenizers.qwen(tmp_path, "chatml")


def test_a_changed_rank_file_is_read_again(tmp_path):
    write_ranks(tmp_path)
    before = len(tokenizers.qwen(tmp_path, "chatml"))
    with (tmp_path / "qwen.tiktoken").open("a") as file:
        file.write(base64.b64encode(b"zq").decode() + f" {before - 208}\n")
    after = tokenizers.qwen(tmp_path, "chatml")
    assert len(after) == before + 1
    assert after.convert_tokens_to_ids("<|endoftext|>") == before - 208 + 1


def test_an_unknown_chat_format_lists_the_known_ones(tmp_path):
    train(tmp_path)
    with pytest.raises(HelpersError, match=r"'chatlm3'.*mean chatglm3.*llama2-chinese, alpaca, alpaca2, rwkv, none"):
        tokenizers.chatglm(tmp_path, "chatlm3")
