"""chat, stream and complete on a small random model."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from helpers import chat, complete, stream
from helpers.errors import HelpersError

LETTERS = "abcdefghijklmnopqrstuvwxyz<>你好春眠 "
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}<a>{% endif %}"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(LETTERS) + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=300, eos_token_id=None)
    ).eval()


@pytest.fixture
def tokenizer():
    """One token a character; the last id is the end of a text."""
    vocabulary = {letter: index for index, letter in enumerate(LETTERS)} | {"</s>": len(LETTERS)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", chat_template=TEMPLATE)


def by_hand(model, tokenizer, prompt, tokens):
    """Take the likeliest next token, without generate."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    for _ in range(tokens):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_chat_answers_the_prompt_of_the_template(model, tokenizer):
    expected = by_hand(model, tokenizer, "<user>你好<a>", 12)
    assert chat(model, tokenizer, "你好", max_new_tokens=12) == expected != ""
    assert chat(model, tokenizer, [{"role": "user", "content": "你好"}], max_new_tokens=12) == expected


def test_several_turns_all_count(model, tokenizer):
    turns = [{"role": "system", "content": "春"}, {"role": "user", "content": "你好"}]
    assert chat(model, tokenizer, turns, max_new_tokens=12) == by_hand(model, tokenizer, "<system>春<user>你好<a>", 12)


def test_stream_prints_what_it_returns(model, tokenizer, capsys):
    answer = stream(model, tokenizer, "你好", max_new_tokens=12)
    assert capsys.readouterr().out == answer + "\n"
    assert answer == chat(model, tokenizer, "你好", max_new_tokens=12)


def test_complete_continues_without_a_template(model, tokenizer):
    tokenizer.chat_template = None
    assert complete(model, tokenizer, "abc", max_new_tokens=9) == by_hand(model, tokenizer, "abc", 9)
    with pytest.raises(HelpersError, match=r"no chat template.*complete"):
        chat(model, tokenizer, "abc")


def test_the_default_is_256_tokens_and_counts_against_the_context(model, tokenizer):
    with pytest.raises(HelpersError, match="306 tokens are too many"):
        complete(model, tokenizer, "a" * 50)


def test_a_role_that_the_template_refuses_is_told_in_one_line(model, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ raise_exception('no role ' ~ m.role ~ '\n, only user') }}{% endfor %}"
    )
    for talk in (chat, stream):
        with pytest.raises(HelpersError, match=r"cannot write these messages.*no role narrator , only user") as caught:
            talk(model, tokenizer, [{"role": "narrator", "content": "a"}])
        assert "\n" not in str(caught.value)


def test_the_template_gets_its_own_settings(model, tokenizer):
    tokenizer.chat_template = "{{ 'a' if enable_thinking is false else 'b' }}{{ tools | length if tools else '' }}"
    said = by_hand(model, tokenizer, "a", 9)
    assert said != by_hand(model, tokenizer, "b", 9), "the two prompts give one answer: this test sees nothing"
    assert chat(model, tokenizer, "你好", template={"enable_thinking": False}, max_new_tokens=9) == said
    assert stream(model, tokenizer, "你好", {"enable_thinking": False}, max_new_tokens=9) == said


def test_an_answer_ends_at_a_stop_string(model, tokenizer):
    whole = complete(model, tokenizer, "abc", max_new_tokens=20)
    stop = whole[3:5]
    ended = complete(model, tokenizer, "abc", max_new_tokens=20, stop_strings=[stop])
    assert ended == whole[: whole.index(stop) + len(stop)] != whole
    prompt = {"max_new_tokens": 20, "stop_strings": [chat(model, tokenizer, "你好", max_new_tokens=20)[3:5]]}
    assert chat(model, tokenizer, "你好", **prompt) == stream(model, tokenizer, "你好", **prompt)
