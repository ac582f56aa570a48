"""The World tokenizer gives the ids of the PyPI package rwkv, and every text comes back whole."""

import importlib.util
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, StopStringCriteria

from helpers import HelpersError, chat, complete
from helpers.checkpoints.make import poems
from helpers.native import register, rwkv
from helpers.native.own.world_tokenizer import END, VOCABULARY, RwkvWorldTokenizer

PACKAGE = Path(importlib.util.find_spec("rwkv").submodule_search_locations[0])
TEXTS = [
    "床前明月光，疑是地上霜。",
    "The quick brown fox jumps over the lazy dog.",
    "👨‍👩‍👧‍👦🌕🇨🇳",
    "def f(x):\n\treturn {\n        'a': x ** 2,\n    }  # done\r\n",
    " " * 300 + "\n" * 70 + "\t" * 9 + "　",
    "User: 你好\n\nAssistant:",
    "ÀÉÎõü ñ Ω Ж ß €",
    "\x00\x07\x7f\x80\xff",
    "",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    register()
    return rwkv.tokenizer(tmp_path_factory.mktemp("empty"), {}, "rwkv")


@pytest.fixture(scope="module")
def package():
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    return TRIE_TOKENIZER(str(PACKAGE / VOCABULARY))


def texts() -> list[str]:
    draw = random.Random(0)
    verse = [poem.text for poem in poems.read("held_out")[:300]]
    code = [file.read_text()[:2000] for file in sorted(Path(rwkv.__file__).parent.glob("*.py"))]
    noise = [
        "".join(chr(draw.choice([draw.randrange(1, 0xD800), draw.randrange(32, 127), 10, 32])) for _ in range(60))
        for _ in range(250)
    ]
    return TEXTS + verse + code + noise


def test_ids_equal_the_packages_and_texts_come_back(tokenizer, package):
    several = texts()
    assert len(several) > 560
    for text in several:
        ids = tokenizer(text).input_ids
        assert ids == package.encode(text), text
        assert tokenizer.decode(ids) == text


def test_sizes_and_the_end_of_a_text(tokenizer):
    assert len(tokenizer) == 65530 and len(set(tokenizer.get_vocab().values())) == 65530
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer("a" + END).input_ids == [*tokenizer("a").input_ids, 0]
    assert tokenizer.decode([66, 0, 67], skip_special_tokens=True) == "AB"
    assert tokenizer.decode([65535]) == "" and tokenizer.decode([0x9C + 1]) == "\ufffd"
    batch = tokenizer(["床前", "床前明月光"], padding=True)
    assert batch.attention_mask[0][0] == 0 and batch.input_ids[0][0] == 0, "padding is on the left"


def test_saved_and_read_without_remote_code(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is RwkvWorldTokenizer and again.padding_side == "left"
    assert all(again(text).input_ids == tokenizer(text).input_ids for text in TEXTS)
    assert again.chat_template == tokenizer.chat_template
    again.save_pretrained(tmp_path)  # over itself
    assert AutoTokenizer.from_pretrained(tmp_path)("床").input_ids == tokenizer("床").input_ids


def test_an_answer_ends_at_every_token_that_holds_an_empty_line(tokenizer):
    family = rwkv.FAMILIES[0]
    stops = family.stops(tokenizer, "rwkv")
    assert {0, 261} < set(stops) and len(stops) == 35
    assert all("\n\n" in tokenizer.decode([number]) for number in stops if number)
    assert family.stops(tokenizer, "none") == [0]
    end = StopStringCriteria(tokenizer, tokenizer.stop_strings)
    for answer in ("李白。", "ok", "x\t", "1.\r", "`code`", "好 "):
        ids = tokenizer(answer + "\n\n", return_tensors="pt").input_ids
        assert end(ids, None).item() and not end(tokenizer(answer + "\n", return_tensors="pt").input_ids, None).item()


def test_a_chat_is_told_where_to_stop(tokenizer, tmp_path):
    class Model:
        device, config, given = "cpu", SimpleNamespace(max_position_embeddings=500), None

        def generate(self, input_ids, **settings):
            self.given = settings
            return torch.cat([input_ids, tokenizer(" 李白。\n\n", return_tensors="pt").input_ids], 1)

    model = Model()
    assert chat(model, tokenizer, "谁？") == "李白。"
    assert model.given["stop_strings"] == ["\n\n"] and model.given["tokenizer"] is tokenizer
    complete(model, tokenizer, "床前")
    assert "stop_strings" not in model.given
    assert rwkv.tokenizer(tmp_path, {}, "none").stop_strings is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda lines: lines[1:], "not every byte"),
        (lambda lines: [*lines, "300 'ab' 3"], "is 2 bytes long, not 3"),
        (lambda lines: [*lines, "300 os.getcwd() 3"], "a line is damaged"),
        (lambda lines: [*lines, "300"], "a line is damaged"),
    ],
)
def test_a_damaged_vocabulary_is_refused(tmp_path, change, why):
    lines = (PACKAGE / VOCABULARY).read_text().split("\n")[:300]
    (tmp_path / VOCABULARY).write_text("\n".join(lines))
    RwkvWorldTokenizer(str(tmp_path / VOCABULARY))
    (tmp_path / VOCABULARY).write_text("\n".join(change(lines)))
    with pytest.raises(HelpersError, match=why):
        RwkvWorldTokenizer(str(tmp_path / VOCABULARY))
