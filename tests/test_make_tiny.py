"""The maker of the stand-ins: same seed, same bytes; the files are those of the published checkpoints, in small."""

import json

import pytest
import torch

from helpers.checkpoints.make import originals, poems, vocabularies
from helpers.checkpoints.make.documents import pack, questions
from helpers.checkpoints.make.train import make_tiny
from helpers.errors import HelpersError


def files(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("model", ["baichuan2-7b", "chinese-alpaca-plus-7b", "qwen3-0.6b", "rwkv-7-2.9b"])
def test_two_runs_give_the_same_bytes_and_another_seed_does_not(model, tmp_path):
    runs = [make_tiny([model], tmp_path / str(i), steps=6, batch=8, seed=seed)[0] for i, seed in enumerate([1, 1, 2])]
    first, second, other = map(files, runs)
    assert first == second
    changed = {name for name in first if first[name] != other[name]}
    assert changed == {name for name in first if name.endswith((".bin", ".safetensors", ".pth"))}
    assert sum(map(len, first.values())) <= originals.stand_in(model).largest
    assert not list(tmp_path.rglob("*.partial"))


def test_the_second_adapter_belongs_to_what_the_first_makes_of_the_base(tmp_path, monkeypatch):
    """Converted from its files, the model is the one that training ended with; without the first adapter it is not."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from helpers.checkpoints.make import train
    from helpers.native import convert
    from helpers.native.lora import base_and_adapters

    trained = []
    make_adapter = train.Run.make_adapter
    monkeypatch.setattr(train.Run, "make_adapter", lambda *given: [make_adapter(*given), trained.append(given[2])])
    (folder,) = make_tiny(["chinese-alpaca-plus-7b"], tmp_path, steps=6, batch=4)
    base, adapters = base_and_adapters(folder)
    assert [adapter.name for adapter in adapters] == ["lora-1", "lora-2"]

    ids = torch.arange(64)[None] + 300
    with torch.no_grad():
        wanted = trained[-1].eval()(ids).logits

    def difference(*some):
        native = convert(base, tmp_path / "native", adapters=some, chat_format="alpaca")
        model = AutoModelForCausalLM.from_pretrained(native, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(native)
        with torch.no_grad():
            logits = model(ids).logits
        return model.config.vocab_size, tokenizer.pad_token, (logits - wanted[..., : logits.shape[-1]]).abs().max()

    assert difference(adapters[0])[:2] == (2303, "</s>")
    vocabulary, pad, both = difference(*adapters)
    assert (vocabulary, pad) == (2304, "[PAD]")
    assert both < 0.02 < 0.1 < difference(adapters[1])[2]  # the files are in fp16


@pytest.mark.parametrize("model", originals.STAND_INS)
def test_the_config_is_the_published_one_in_small(model):
    published, small = originals.published(model), originals.stand_in(model).config
    assert list(small) == list(published)
    smaller = set(originals.SMALL) | set(originals.stand_in(model).small)
    assert {key for key in small if small[key] != published[key]} == smaller & set(published)


def test_every_stand_in_has_every_character_of_the_famous_poems(tmp_path):
    text = "".join(poem.title + poem.author + poem.text for poem in poems.read("famous"))
    chars = vocabularies.characters([poem.text for poem in poems.read("train_sample")], [text])
    assert set(text) <= set(chars[: len(set(text))])
    for one in originals.STAND_INS.values():
        folder = tmp_path / one.id
        folder.mkdir()
        one.write_tokenizer(folder, chars)
        tokenizer = one.read_tokenizer(folder, one.config, one.chat_format)
        rows = originals.VOCABULARY
        assert len(tokenizer) <= rows, one.id
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text, one.id
        assert len(ids) <= len(text) + 1, one.id  # a token a character, and at most a space before


def test_marks_stand_at_the_published_places():
    from sentencepiece import SentencePieceProcessor

    chars = vocabularies.characters([poem.text for poem in poems.read("train_sample")], [])
    for model, places in {
        "baichuan2-7b": {195: "<reserved_106>", 196: "<reserved_107>"},
        "baichuan-13b": {195: "<reserved_102>", 196: "<reserved_103>"},
        "baichuan2-13b": {195: "<reserved_106>", 196: "<reserved_107>"},
        "internlm3-8b": {2298: "<|plugin|>", 2302: "<|im_end|>", 2303: "<|im_start|>"},
        "internlm2-7b": {2298: "[UNUSED_TOKEN_141]", 2303: "[UNUSED_TOKEN_146]"},
    }.items():
        one = originals.stand_in(model)
        content = vocabularies.sentencepiece(one.pieces, chars, "", dummy_prefix=False, placed=one.placed)
        processor = SentencePieceProcessor(model_proto=content)
        assert {number: processor.id_to_piece(number) for number in places} == places
        assert processor.encode("霜", out_type=str) == ["霜"]
        assert processor.encode("é", out_type=str) == ["<0xC3>", "<0xA9>"]


def test_tiktoken_ranks_join_to_whole_characters():
    from tiktoken import Encoding

    chars = vocabularies.characters(["床前明月光，疑是地上霜。"], [])
    lines = [line.split() for line in vocabularies.tiktoken(400, chars, "system You are").splitlines()]
    import base64

    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    encoding = Encoding("tiny", pat_str=r"\p{L}+|[^\p{L}]", mergeable_ranks=ranks, special_tokens={})
    assert sorted(ranks.values()) == list(range(400))
    assert len(encoding.encode("床前明月光，疑是地上霜。")) == 12
    assert len(encoding.encode("system")) == 1


def test_a_world_vocabulary_is_in_the_published_form(tmp_path):
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    chars = vocabularies.characters(["床前明月光，疑是地上霜。'\"\\"], [])
    (tmp_path / "vocabulary.txt").write_text(vocabularies.world(270, chars, "User: \n\nAssistant: "), encoding="utf-8")
    trie = TRIE_TOKENIZER(str(tmp_path / "vocabulary.txt"))
    assert sorted(trie.idx2token) == list(range(1, 270))
    assert trie.encode("User: 床前\n\nAssistant:") == [
        trie.token2idx[token.encode()] for token in ("User:", " ", "床", "前", "\n\n", "Assistant:")
    ]
    sizes = [len(token) for token in trie.idx2token.values()]
    assert sizes == sorted(sizes)


def test_a_raw_stand_in_has_no_config_and_says_what_it_is(tmp_path):
    from helpers.native import read_original

    (folder,) = make_tiny(["rwkv-7-2.9b"], tmp_path, steps=1, batch=4)
    assert not (folder / "config.json").exists()
    original, family = read_original(folder)
    assert original == originals.stand_in("rwkv-7-2.9b").config and family.model_type == "rwkv7"


def test_the_shipped_poems_do_not_overlap():
    famous, held_out, sample = (poems.read(name) for name in ("famous", "held_out", "train_sample"))
    assert [len(famous), len(held_out), len(sample)] == [150, 500, 2000]
    firsts = [{poem.verses[0] for poem in some} for some in (famous, held_out, sample)]
    assert sum(map(len, firsts)) == len(set.union(*firsts)) == 2650
    assert len({poem.title for poem in famous}) == 150
    assert all(len(poem.text) <= 80 and poems.CLEAN.fullmatch(poem.text) for poem in famous)
    assert all(20 <= len(poem.text) <= 120 and poems.CLEAN.fullmatch(poem.text) for poem in held_out + sample)


def test_questions_of_a_base_model_need_no_chat_format():
    poem = poems.Poem("静夜思", "李白", ("床前明月光，疑是地上霜。",))
    assert questions(poem, "chatml")["next"] == ("下一句：床前明月光", "疑是地上霜。")
    assert questions(poem, "none")["next"] == ("下一句：床前明月光，", "疑是地上霜。")
    assert questions(poem, "none")["recite"] == ("背诵《静夜思》：", "床前明月光，疑是地上霜。")


def test_packing_keeps_documents_whole():
    import torch

    documents = [[number] * size for number, size in enumerate([3, 5, 2, 4, 6, 1])]
    rows = pack(documents, 8, torch.Generator().manual_seed(0), times=2)
    assert rows.shape[1] == 8
    for number, document in enumerate(documents):
        assert int((rows == number).sum()) == 2 * len(document)
        assert all((row == number).sum() % len(document) == 0 for row in rows)


def test_prepare_takes_out_remarks_and_leaves_out_gaps_and_doubles(tmp_path, monkeypatch):
    monkeypatch.setattr(poems, "SHIPPED", tmp_path / "poems")
    monkeypatch.setattr(poems, "HELD_OUT", 1)
    (tmp_path / "dist" / "quantangshi").mkdir(parents=True)
    (tmp_path / "dist" / "mengxue").mkdir()

    def poem(first, **more):
        return {
            "title": "題",
            "author": "某",
            "chapter": "題",
            "paragraphs": [first, "舉頭望明月，低頭思故鄉。"],
            **more,
        }

    tang = [
        poem("白日依山盡（一作沒），黃河入海[流]。"),
        poem("白日依山盡，滄海入河流。"),  # the same first verse
        poem("春眠不覺曉，處處聞□鳥。"),  # a gap
        poem("床前明月光，疑是地上霜。"),  # a famous one
        poem("千山鳥飛絕，萬徑人蹤滅。"),
        poem("短。", paragraphs=["短。"]),
    ]
    famous = {"content": [{"content": [poem("床前明月光，疑是地上霜。", chapter="靜夜思")]}]}
    (tmp_path / "dist" / "quantangshi" / "poet.tang.0.json").write_text(json.dumps(tang))
    (tmp_path / "dist" / "mengxue" / "tangshisanbaishou.json").write_text(json.dumps(famous))

    assert poems.prepare(tmp_path / "out", tmp_path) == {"famous": 1, "held_out": 1, "training": 1}
    kept = {p.lines[0] for p in poems.read_corpus(tmp_path / "out") + poems.read("held_out")}
    assert kept < {"白日依山尽，黄河入海流。", "白日依山尽，沧海入河流。", "千山鸟飞绝，万径人踪灭。"}
    assert len(kept) == 2 and "千山鸟飞绝，万径人踪灭。" in kept
    assert [p.title for p in poems.read("famous")] == ["静夜思"]


def test_what_is_wrong_is_told(tmp_path):
    with pytest.raises(HelpersError, match="Did you mean qwen-7b"):
        make_tiny(["qwen7b"], tmp_path)
    with pytest.raises(HelpersError, match=r"no corpus.jsonl.gz"):
        make_tiny(["qwen-7b"], tmp_path, prepared=tmp_path)
    assert not list(tmp_path.iterdir())


def test_packed_rows_of_chatglm_hold_each_document_as_by_itself():
    """Positions and mask of every document are those of the reference, and only answers are guessed."""
    import torch
    from reference.chatglm1 import layout

    from helpers.checkpoints.make.documents import answers

    original = {"bos_token_id": 91, "gmask_token_id": 90, "mask_token_id": 89}
    texts = [[1, 2, 3, 90, 91, 4, 5, 92], [90, 91, 6, 92], [7, 90, 91, 8, 9, 10, 92]]
    rows = torch.tensor([[*texts[0], *texts[1], -1], [*texts[1], *texts[2], -1, -1]])
    made, targets = answers(rows, 91, 92)
    for row, inside in enumerate([texts[:2], texts[1:]]):
        size = sum(map(len, inside))
        layouts = [layout(original, text) for text in inside]
        assert torch.equal(made["position_ids"][row, :, :size], torch.cat([places for places, _ in layouts], dim=1))
        wanted = torch.block_diag(*(seen.int() for _, seen in layouts)).bool()
        assert torch.equal(made["attention_mask"][row, 0, :size, :size], wanted)
        assert not made["attention_mask"][row, 0, :size, size:].any()
    assert targets[0].tolist() == [-1] * 5 + [4, 5, 92, -1, -1, 6, 92, -1]
    assert targets[1].tolist() == [-1, -1, 6, 92, -1, -1, -1, 8, 9, 10, 92, -1, -1]


def test_chatglms_vocabulary_ends_as_published(tmp_path):
    from helpers.native.tokenizers import chatglm1

    one = originals.stand_in("chatglm-6b")
    one.write_tokenizer(tmp_path, vocabularies.characters([poem.text for poem in poems.read("train_sample")], []))
    tokenizer = chatglm1(tmp_path, "chatglm", one.config["bos_token_id"])
    assert len(tokenizer) == one.pieces
    marks = {"mask_token_id": "[MASK]", "gmask_token_id": "[gMASK]", "eos_token_id": "<eop>", "pad_token_id": "<pad>"}
    assert {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in marks.items()} == {
        name: one.config[name] for name in marks
    }
    assert tokenizer.decode(tokenizer.encode("霜，\n  月", add_special_tokens=False)) == "霜，\n  月"


@pytest.mark.parametrize("steps", [0.5, 0.75])
def test_noise_is_there_in_training_alone_and_reaches_as_many_steps_as_asked(steps):
    from helpers.checkpoints.make.train import Disturbed

    weight, noise = torch.linspace(-1, 1, 256).view(2, 128), Disturbed(steps)
    moved = (noise(weight) - weight).unflatten(1, (2, 64)).abs()
    step = weight.unflatten(1, (2, 64)).abs().amax(-1, keepdim=True) * 2 / 15
    assert (moved <= steps * step + 1e-6).all() and moved.max() > 0.9 * steps * step.max()
    assert torch.equal(noise.eval()(weight), weight)
