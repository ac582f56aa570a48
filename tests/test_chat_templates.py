"""Rendered chats are the originals' word for word, and their ids are those that the originals' code puts together."""

from __future__ import annotations

import functools
import json

import pytest
from jinja2.exceptions import TemplateError
from test_tokenizers import MARKS, train, write_ranks

from helpers.native import tokenizers
from helpers.native.chat_templates import CHAT_TEMPLATES, STOP_TOKENS

BUILDERS = {
    "chatglm2": "chatglm",
    "chatglm3": "chatglm",
    "chatml": "qwen",
    "internlm2": "internlm2",
    "baichuan2": "baichuan",
    "llama2-chinese": "llama",
    "alpaca": "llama",
    "none": "llama",
}
CHAT = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
]
SYSTEM = {"role": "system", "content": "s"}
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
RENDERED = {
    "chatglm2": "[gMASK]<sop>[Round 1]\n\n问：q1\n\n答：a1\n\n[Round 2]\n\n问：q2\n\n答：",
    "chatglm3": "[gMASK]<sop><|user|>\n q1<|assistant|>\n a1<|user|>\n q2<|assistant|>",
    "chatml": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n"
    "<|im_start|>assistant\na1<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n",
    "internlm2": "<s><|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
    "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n",
    "baichuan2": "<reserved_106>q1<reserved_107>a1<reserved_106>q2<reserved_107>",
    "llama2-chinese": "<s>Human: q1\n</s><s>Assistant: a1\n</s><s>Human: q2\n</s><s>Assistant: ",
    "alpaca": f"<s>{ALPACA}\n\n### Instruction:\n\nq1\n\n### Response:\n\na1\n\n### Instruction:\n\nq2\n\n"
    "### Response:\n\n",
    "none": "<s>q1a1q2",
}
WITH_SYSTEM = {
    "chatglm3": "[gMASK]<sop><|system|>\n s<|user|>\n q1",
    "chatml": "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq1",
    "internlm2": "<s><|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq1",
    "baichuan2": "s<reserved_106>q1",
    "llama2-chinese": "<s>System: s\n</s><s>Human: q1",
    "none": "<s>sq1",
}
CONTENTS = ["q1", "床前明月光", "  two  spaces ", "", "a\n\nb", "\tx = 1", "🌕 moon"]
"""What is said in the chats whose ids are compared; none begins with a line break, see ``CHATML``."""

WEATHER = {"name": "get_weather", "description": "查天气", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function from chat format to (tokenizer, the library's own encoding of the same file)."""

    @functools.cache
    def make(chat_format):
        folder, family = tmp_path_factory.mktemp(chat_format), BUILDERS[chat_format]
        pieces = {"baichuan": ["<reserved_106>", "<reserved_107>"], "internlm2": MARKS}.get(family)
        reference = write_ranks(folder) if family == "qwen" else train(folder, last=pieces)
        return getattr(tokenizers, family)(folder, chat_format), reference

    return make


def render(tokenizer, messages, **options):
    """Return a chat as text, waiting for an answer unless told otherwise."""
    options = {"add_generation_prompt": True} | options
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def encode(tokenizer, messages, **options):
    """Return the ids of a chat that waits for an answer."""
    encoded = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, **options)
    return encoded["input_ids"]


def chatglm2_ids(reference, size, contents):
    """Follow ``build_prompt``: one text after the two marks that begin every text."""
    text = ""
    for number, (question, answer) in enumerate(zip(contents[::2], [*contents[1::2], ""], strict=True), start=1):
        text += f"[Round {number}]\n\n问：{question}\n\n答：{answer}\n\n"
    return [size + 1, size + 3, *reference.encode(text.removesuffix("\n\n"))]


def chatglm3_ids(reference, size, contents):
    """Follow ``build_chat_input``: role, ``metadata\\n`` and content, each encoded by itself."""
    made = [size + 1, size + 3]
    for place, content in enumerate(contents):
        made += [size + 6 + place % 2, *reference.encode("\n"), *reference.encode(content)]
    return [*made, size + 7]


def chatml_ids(reference, size, contents):
    """Follow ``make_context``: role, line break and content, each encoded by itself."""
    start, end = size + 1, size + 2
    newline, made = reference.encode("\n"), []
    for place, content in enumerate(["You are a helpful assistant.", *contents]):
        role = "system" if place == 0 else ("assistant", "user")[place % 2]
        made += [start, *reference.encode(role), *newline, *reference.encode(content), end, *newline]
    return [*made, start, *reference.encode("assistant"), *newline]


def internlm2_ids(reference, size, contents):
    """Follow ``build_inputs``: text between marks, each part encoded by itself."""
    made = [reference.bos_id()]
    for place, content in enumerate(contents):
        role = ("user", "assistant")[place % 2]
        made += [size - 1, *reference.encode(f"{role}\n{content}"), size - 2, *reference.encode("\n")]
    return [*made, size - 1, *reference.encode("assistant\n")]


def baichuan2_ids(reference, size, contents):
    """Follow ``build_chat_input``: the id of who speaks, then the content."""
    made = []
    for place, content in enumerate(contents):
        made += [size - 2 + place % 2, *reference.encode(content)]
    return [*made, size - 1]


def llama2_chinese_ids(reference, size, contents):
    """Follow the README: each turn is a text from <s> to </s>."""
    made = []
    for place, content in enumerate(contents):
        text = f"{('Human', 'Assistant')[place % 2]}: {content}\n"
        made += [reference.bos_id(), *reference.encode(text), reference.eos_id()]
    return [*made, reference.bos_id(), *reference.encode("Assistant: ")]


def alpaca_ids(reference, size, contents):
    """Follow ``generate_prompt``: one text after <s>."""
    names = ("### Instruction:", "### Response:")
    text = "".join(f"\n\n{names[place % 2]}\n\n{content}" for place, content in enumerate([*contents, ""]))
    return [reference.bos_id(), *reference.encode(ALPACA + text)]


def none_ids(reference, size, contents):
    """Encode the contents as one text."""
    return [reference.bos_id(), *reference.encode("".join(contents))]


@pytest.mark.parametrize("chat_format", CHAT_TEMPLATES)
def test_a_chat_of_two_turns_is_rendered_as_its_docstring_says(made, chat_format):
    tokenizer, _ = made(chat_format)
    assert render(tokenizer, CHAT) == RENDERED[chat_format]


@pytest.mark.parametrize("chat_format", CHAT_TEMPLATES)
@pytest.mark.parametrize("content", CONTENTS)
def test_the_ids_of_a_chat_are_those_of_the_original_code(made, chat_format, content):
    tokenizer, reference = made(chat_format)
    follow = globals()[chat_format.replace("-", "_") + "_ids"]
    size = len(tokenizer) - 208 if chat_format == "chatml" else reference.get_piece_size()
    for contents in ([content], [content, "好的 yes", content], ["明月", content, "why?"]):
        messages = [{"role": ("user", "assistant")[i % 2], "content": said} for i, said in enumerate(contents)]
        assert encode(tokenizer, messages) == follow(reference, size, contents), contents


@pytest.mark.parametrize("chat_format", CHAT_TEMPLATES)
def test_a_chat_starts_once(made, chat_format):
    tokenizer, _ = made(chat_format)
    start = tokenizer.encode("")  # what the tokenizer puts before any text
    assert start == tokenizer.encode("明")[: len(start)]
    encoded = encode(tokenizer, CHAT)
    assert encoded[: len(start)] == start
    assert not start or encoded[len(start) : 2 * len(start)] != start
    assert encoded == tokenizer.encode(render(tokenizer, CHAT), add_special_tokens=False)


@pytest.mark.parametrize("chat_format", CHAT_TEMPLATES)
def test_a_prompt_is_the_beginning_of_the_chat_with_its_answer(made, chat_format):
    tokenizer, _ = made(chat_format)
    prompt = render(tokenizer, CHAT[:1])
    answered = render(tokenizer, CHAT[:2], add_generation_prompt=False)
    gap = "\n " if chat_format == "chatglm3" else ""  # ChatGLM3 says these two itself
    assert answered.startswith(prompt + gap + "a1")


@pytest.mark.parametrize("chat_format", CHAT_TEMPLATES)
def test_a_system_message_is_rendered_or_refused(made, chat_format):
    tokenizer, _ = made(chat_format)
    if chat_format in WITH_SYSTEM:
        assert render(tokenizer, [SYSTEM, *CHAT]).startswith(WITH_SYSTEM[chat_format])
    else:
        with pytest.raises(TemplateError, match=f"the chat format {chat_format} has no role system"):
            render(tokenizer, [SYSTEM, *CHAT])


@pytest.mark.parametrize("chat_format", sorted(set(CHAT_TEMPLATES) - {"none"}))
def test_an_unknown_role_is_refused_by_name(made, chat_format):
    tokenizer, _ = made(chat_format)
    with pytest.raises(TemplateError, match=f"the chat format {chat_format} has no role narrator, only .*user"):
        render(tokenizer, [*CHAT, {"role": "narrator", "content": "x"}])


@pytest.mark.parametrize("chat_format", ["baichuan2", "llama2-chinese"])
def test_a_late_system_message_is_refused(made, chat_format):
    tokenizer, _ = made(chat_format)
    with pytest.raises(TemplateError, match=r"has no role system, only system \(first\), user, assistant"):
        render(tokenizer, [*CHAT, SYSTEM])


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("given", ["as an argument", "in the system message"])
def test_chatglm3_lists_tools_as_its_repository_shows(made, wrapped, given):
    tokenizer, _ = made("chatglm3")
    tool = {"type": "function", "function": WEATHER} if wrapped else WEATHER
    task = "Answer the following questions as best as you can. You have access to the following tools:"
    wanted = f"[gMASK]<sop><|system|>\n {task}\n{json.dumps([WEATHER], indent=4, ensure_ascii=False)}<|user|>\n q1"
    if given == "as an argument":
        rendered = render(tokenizer, CHAT, tools=[tool])
        own = render(tokenizer, [SYSTEM, *CHAT], tools=[tool])
        assert own == rendered.replace(task, SYSTEM["content"])
    else:
        rendered = render(tokenizer, [{"role": "system", "content": task, "tools": [tool]}, *CHAT])
    assert rendered.startswith(wanted)


def test_chatglm3_calls_a_tool_and_reads_its_result(made):
    tokenizer, reference = made("chatglm3")
    code = '```python\ntool_call(city="北京", days=2, now=True)\n```'
    arguments = {"city": "北京", "days": 2, "now": True}
    as_openai = [
        {"role": "user", "content": "天气？"},
        {"role": "assistant", "content": "好的", "tool_calls": [{"function": WEATHER | {"arguments": arguments}}]},
        {"role": "tool", "content": "22"},
    ]
    as_original = [
        {"role": "user", "content": "天气？"},
        {"role": "assistant", "content": "好的"},
        {"role": "assistant", "metadata": "get_weather", "content": code},
        {"role": "observation", "content": "22"},
    ]
    rendered = render(tokenizer, as_original)
    said = f"<|user|>\n 天气？<|assistant|>\n 好的<|assistant|>get_weather\n {code}<|observation|>\n 22<|assistant|>"
    assert rendered == "[gMASK]<sop>" + said
    assert render(tokenizer, as_openai) == rendered

    size = reference.get_piece_size()
    wanted = [size + 1, size + 3]
    for role, metadata, content in ((6, "", "天气？"), (7, "", "好的"), (7, "get_weather", code), (8, "", "22")):
        wanted += [size + role, *reference.encode(metadata + "\n"), *reference.encode(content)]
    assert encode(tokenizer, as_original) == [*wanted, size + 7]


def test_chatglm3_call_without_words_has_no_empty_answer(made):
    tokenizer, _ = made("chatglm3")
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "now", "arguments": {}}]}
    assert render(tokenizer, [*CHAT[:1], call]).count("<|assistant|>") == 2  # the call and the prompt for an answer


@pytest.mark.parametrize("chat_format", CHAT_TEMPLATES)
def test_what_stops_an_answer_are_single_tokens_of_the_model(made, chat_format):
    tokenizer, _ = made(chat_format)
    for token in STOP_TOKENS[chat_format]:
        assert tokenizer.encode(token, add_special_tokens=False) == [tokenizer.convert_tokens_to_ids(token)]
        assert tokenizer.decode(tokenizer.convert_tokens_to_ids(token), skip_special_tokens=True) == ""
    assert STOP_TOKENS.keys() == CHAT_TEMPLATES.keys()
