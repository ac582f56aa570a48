r"""How each model was taught to tell turns apart: a Jinja template a chat format, and the tokens that end a turn.

Every template begins with what its model expects at the start of a chat (``<s>``, ``[gMASK]<sop>``), because
``tokenizer.apply_chat_template(..., tokenize=True)`` and serving engines add no special tokens of their own. So
whoever renders to text first must encode it with ``add_special_tokens=False``, or the start is there twice.

A template is text, while the originals are code that joins token ids. Where that can make a difference, it is said
beside the template. One difference is common to all: the originals encode what a user wrote as plain text, while
here a special token spelt out in a message, such as ``<|im_end|>``, becomes that token. Check untrusted input.

The line *renders* shows the prompt for the user's ``q1``, the assistant's ``a1``, the user's ``q2`` and
``add_generation_prompt=True``.
"""

from __future__ import annotations


def _unknown_role(chat_format: str, *roles: str) -> str:
    """Return the Jinja expression that refuses a role the format does not have, naming those it has."""
    text = f"the chat format {chat_format} has no role ' ~ message['role'] ~ ', only {', '.join(roles)}"
    return "{{- raise_exception('" + text + "') }}"


START = "{{- bos_token }}"
"""Where a format leaves the start of a chat to the model; the tokenizers put in what they add to any other text."""

CHATGLM2 = r"""
{{- '[gMASK]<sop>' }}
{%- set round = namespace(number=0) %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {%- set round.number = round.number + 1 %}
        {{- ('' if loop.first else '\n\n') ~ '[Round ' ~ round.number ~ ']\n\n问：' ~ message['content'] }}
    {%- elif message['role'] == 'assistant' %}
        {{- '\n\n答：' ~ message['content'] }}
    {%- else %}
        UNKNOWN_ROLE
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\n\n答：' }}
{%- endif %}""".replace("UNKNOWN_ROLE", _unknown_role("chatglm2", "user", "assistant"))
r"""ChatGLM2: rounds are numbered from 1, and there is no system role.

renders: ``[gMASK]<sop>[Round 1]\n\n问：q1\n\n答：a1\n\n[Round 2]\n\n问：q2\n\n答：``

Source: ``build_prompt`` in tokenization_chatglm.py of THUDM/chatglm2-6b.
"""

CHATGLM3 = r"""
{%- macro turn(role, metadata, content) %}
    {{- '<|' ~ role ~ '|>' ~ metadata ~ '\n' ~ (' ' ~ content if content else '') }}
{%- endmacro %}
{%- macro system(content, tools) %}
    {%- set bare = namespace(tools=[]) %}
    {%- for tool in tools or [] %}
        {%- set bare.tools = bare.tools + [tool['function'] if 'function' in tool else tool] %}
    {%- endfor %}
    {{- turn('system', '', content ~ '\n' ~ bare.tools | tojson(indent=4) if tools else content) }}
{%- endmacro %}
{{- '[gMASK]<sop>' }}
{%- if tools and messages[0]['role'] != 'system' %}
    {{- system('Answer the following questions as best as you can. You have access to the following tools:', tools) }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- system(message['content'], message['tools'] or (tools if loop.first else none)) }}
    {%- elif message['role'] == 'user' %}
        {{- turn('user', '', message['content']) }}
    {%- elif message['role'] in ('observation', 'tool') %}
        {{- turn('observation', '', message['content']) }}
    {%- elif message['role'] == 'assistant' %}
        {%- if message['content'] or not message['tool_calls'] %}
            {{- turn('assistant', message['metadata'] or '', message['content']) }}
        {%- endif %}
        {%- for call in message['tool_calls'] or [] %}
            {%- set call = call['function'] if 'function' in call else call %}
            {%- set written = namespace(arguments=[]) %}
            {%- for name, value in call['arguments'].items() %}
                {%- set value = value | tojson if value is string else value %}
                {%- set written.arguments = written.arguments + [name ~ '=' ~ value] %}
            {%- endfor %}
            {%- set code = 'tool_call(' ~ written.arguments | join(', ') ~ ')' %}
            {{- turn('assistant', call['name'], '```python\n' ~ code ~ '\n```') }}
        {%- endfor %}
    {%- else %}
        UNKNOWN_ROLE
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}""".replace("UNKNOWN_ROLE", _unknown_role("chatglm3", "system", "user", "assistant", "observation", "tool"))
r"""ChatGLM3: a header line (role token, and for a tool call its name), then the content.

renders: ``[gMASK]<sop><|user|>\n q1<|assistant|>\n a1<|user|>\n q2<|assistant|>``

The original encodes the header's ``\n`` and the content one by one, and SentencePiece puts a space before each; the
space after ``\n`` stands for the second one, and the ids are equal. An answer so starts with ``\n``; strip it.

Tools are given as the argument ``tools`` or as the system message's ``tools``, with or without OpenAI's ``function``
wrapper, and come as JSON after its content. A call is ``<|assistant|>name`` and a line ``tool_call(...)`` of Python,
from ``tool_calls`` (arguments as a mapping) or from ``metadata`` and content. Its result has the role
``observation`` or ``tool``.

Sources: ``build_chat_input`` in tokenization_chatglm.py and ``chat_template`` in tokenizer_config.json (a later
revision, without tools) of THUDM/chatglm3-6b; PROMPT.md of the repository THUDM/ChatGLM3.
"""

CHATML = r"""
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
    {%- if message['role'] not in ('system', 'user', 'assistant') %}
        UNKNOWN_ROLE
    {%- endif %}
    {{- '<|im_start|>' ~ message['role'] ~ '\n' ~ message['content'] ~ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}""".replace("UNKNOWN_ROLE", _unknown_role("chatml", "system", "user", "assistant"))
r"""Qwen v1: ChatML with a default system message.

renders: ``<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n
<|im_start|>assistant\na1<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n`` (in one line)

The original encodes the ``\n`` after the role by itself. Here content that begins with a line break is encoded
together with it, which can give other ids; other content gives the same.

Source: ``make_context`` in qwen_generation_utils.py of Qwen/Qwen-7B-Chat.
"""

INTERNLM2 = r"""
{{- '<s>' }}
{%- for message in messages %}
    {%- if message['role'] not in ('system', 'user', 'assistant') %}
        UNKNOWN_ROLE
    {%- endif %}
    {{- '<|im_start|>' ~ message['role'] ~ '\n' ~ message['content'] ~ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}""".replace("UNKNOWN_ROLE", _unknown_role("internlm2", "system", "user", "assistant"))
r"""InternLM2: ChatML after ``<s>``; without a system message there is none (its ``chat`` method has one by default).

renders: ``<s><|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n
<|im_start|>assistant\n`` (in one line)

Source: ``build_inputs`` in modeling_internlm2.py, ``chat_template`` in tokenizer_config.json of
internlm/internlm2-chat-7b.
"""

BAICHUAN2 = r"""
{%- for message in messages %}
    {%- if message['role'] == 'system' and loop.first %}
        {{- message['content'] }}
    {%- elif message['role'] == 'user' %}
        {{- '<reserved_106>' ~ message['content'] }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<reserved_107>' ~ message['content'] }}
    {%- else %}
        UNKNOWN_ROLE
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<reserved_107>' }}
{%- endif %}""".replace("UNKNOWN_ROLE", _unknown_role("baichuan2", "system (first)", "user", "assistant"))
"""Baichuan 2: two reserved tokens, ids 195 and 196, say who speaks; a system message comes first, without a mark.

renders: ``<reserved_106>q1<reserved_107>a1<reserved_106>q2<reserved_107>``

Source: ``build_chat_input`` in generation_utils.py of baichuan-inc/Baichuan2-7B-Chat.
"""

LLAMA2_CHINESE = r"""
{%- for message in messages %}
    {%- if message['role'] == 'system' and loop.first %}
        {{- '<s>System: ' ~ message['content'] ~ '\n</s>' }}
    {%- elif message['role'] == 'user' %}
        {{- '<s>Human: ' ~ message['content'] ~ '\n</s>' }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<s>Assistant: ' ~ message['content'] ~ '\n</s>' }}
    {%- else %}
        UNKNOWN_ROLE
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<s>Assistant: ' }}
{%- endif %}""".replace("UNKNOWN_ROLE", _unknown_role("llama2-chinese", "system (first)", "user", "assistant"))
r"""Llama2-Chinese and Atom: every turn is a text of its own, from ``<s>`` to ``</s>``.

renders: ``<s>Human: q1\n</s><s>Assistant: a1\n</s><s>Human: q2\n</s><s>Assistant: ``

Sources: the README (training data and inference) and examples/hf-llama2-7b-gradio/model.py (turns and system) of
FlagAlpha/Llama2-Chinese.
"""

ALPACA = (
    START
    + r"""
{{- 'Below is an instruction that describes a task. ' }}
{{- 'Write a response that appropriately completes the request.' }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '\n\n### Instruction:\n\n' ~ message['content'] }}
    {%- elif message['role'] == 'assistant' %}
        {{- '\n\n### Response:\n\n' ~ message['content'] }}
    {%- else %}
        UNKNOWN_ROLE
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\n\n### Response:\n\n' }}
{%- endif %}""".replace("UNKNOWN_ROLE", _unknown_role("alpaca", "user", "assistant"))
)
r"""Chinese-LLaMA-Alpaca: Stanford Alpaca's wording, which is its own system message.

renders: ``<s>Below is an instruction that describes a task. Write a response that appropriately completes the
request.\n\n### Instruction:\n\nq1\n\n### Response:\n\na1\n\n### Instruction:\n\nq2\n\n### Response:\n\n`` (in one line)

It was trained on one turn, with fewer line breaks (``### Instruction:\n{q1}\n\n### Response: ``); its authors found
this form, of llama.cpp, to answer better. Turns are put one after another as their demo does.

Source: scripts/inference/inference_hf.py and gradio_demo.py of ymcui/Chinese-LLaMA-Alpaca.
"""

NONE = (
    START
    + r"""
{%- for message in messages %}
    {{- message['content'] }}
{%- endfor %}"""
)
"""Base models know no turns: the contents one after another, whoever said them.

renders: ``q1a1q2``, after what the tokenizer adds to any text
"""

CHAT_TEMPLATES: dict[str, str] = {
    "chatglm2": CHATGLM2,
    "chatglm3": CHATGLM3,
    "chatml": CHATML,
    "internlm2": INTERNLM2,
    "baichuan2": BAICHUAN2,
    "llama2-chinese": LLAMA2_CHINESE,
    "alpaca": ALPACA,
    "none": NONE,
}
"""Jinja chat templates by the name of the format."""

STOP_TOKENS: dict[str, list[str]] = {
    "chatglm2": ["</s>"],
    "chatglm3": ["</s>", "<|user|>", "<|observation|>"],
    "chatml": ["<|im_end|>", "<|im_start|>", "<|endoftext|>"],
    "internlm2": ["<|im_end|>", "</s>"],
    "baichuan2": ["</s>"],
    "llama2-chinese": ["</s>"],
    "alpaca": ["</s>"],
    "none": [],
}
"""Tokens that end an answer, by the name of the format; ``none`` leaves it to the tokenizer's end-of-text token.

Source: the ``chat`` methods of the modelling code named above, each with the ids it stops at.
"""
