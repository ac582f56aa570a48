"""The real vLLM, started once: what it answers, what it refuses, who may ask, and what happens when its engine dies.

The slow one: the start takes a minute on two idle cores. The last test ends the server.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time

import httpx
import openai
import psutil
import pytest

from helpers import chat, load, serve
from helpers.errors import HelpersError
from helpers.serving.metrics import total

pytest.importorskip("vllm")

POEM = "背诵《静夜思》"
LONGEST = 256
CLIENTS = 200
PATIENCE = 300


@pytest.fixture(scope="module")
def server():
    with serve("qwen-7b", max_model_len=LONGEST, timeout=1500) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return server.client(timeout=PATIENCE)


def ask(content, **options):
    return {"model": "qwen-7b", "messages": [{"role": "user", "content": content}], "temperature": 0} | options


def until(true, seconds=60):
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not (now := true()) and time.monotonic() < end:
        time.sleep(0.1)
    return now


def used(server):
    """Return running requests, waiting ones, and the share of the KV cache that is in use."""
    samples = server.metrics()
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return tuple(total(samples, name) for name in names)


def test_the_answer_is_that_of_transformers(client):
    model, tokenizer = load("qwen-7b")
    wanted = chat(model, tokenizer, POEM)
    answer = client.chat.completions.create(**ask(POEM))
    assert answer.choices[0].message.content == wanted != ""
    assert answer.choices[0].finish_reason == "stop"

    pieces = list(client.chat.completions.create(**ask(POEM, stream=True)))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == wanted
    assert len(pieces) > 10

    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": POEM}], tokenize=False, add_generation_prompt=True
    )
    said = client.completions.create(model="qwen-7b", prompt=prompt, max_tokens=100, temperature=0)
    assert said.choices[0].text == wanted


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/invocations", "/tokenize"])
def test_without_the_key_nothing_is_answered(server, path):
    body = ask("你好", prompt="你好", max_tokens=1)
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": server.key}):
        answer = httpx.post(server.url + path, json=body, headers=headers, timeout=PATIENCE)
        assert answer.status_code == 401 and "choices" not in answer.text
    with pytest.raises(openai.AuthenticationError):
        server.client(api_key="wrong").models.list()
    assert [each.id for each in server.client().models.list()] == ["qwen-7b"]


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_what_needs_no_key(server, path):
    assert httpx.get(server.url + path, timeout=PATIENCE).status_code == 200


def test_what_cannot_be_answered_is_refused(server, client):
    with pytest.raises(openai.BadRequestError, match=f"maximum context length is {LONGEST} tokens"):
        client.chat.completions.create(**ask("床" * LONGEST))
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.chat.completions.create(**ask(POEM, max_tokens=LONGEST))
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(**ask(POEM, model="qwen-8b"))
    headers = {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"}
    for broken in ("{", '{"model": "qwen-7b"}', '{"model": "qwen-7b", "messages": 3}'):
        answer = httpx.post(f"{server.url}/v1/chat/completions", content=broken, headers=headers, timeout=PATIENCE)
        assert answer.status_code == 400, answer.text


def test_it_listens_at_the_loopback_only(server):
    process = psutil.Process(server.pid)
    every = [process, *process.children(recursive=True)]
    listening = {
        each.laddr.ip for one in every for each in one.net_connections("inet") if each.status == psutil.CONN_LISTEN
    }
    assert "127.0.0.1" in listening
    others = [each.laddr.port for each in process.net_connections("inet") if each.laddr.ip != "127.0.0.1"]
    assert others == []


def test_two_hundred_streams_at_once_all_end_well(server):
    started = asyncio.Event()

    async def one(client, number, open_streams):
        stream = await client.completions.create(
            model="qwen-7b", prompt=f"{number}床前", max_tokens=8, stream=True, extra_body={"ignore_eos": True},
            stream_options={"include_usage": True},
        )  # fmt: skip
        open_streams.append(number)
        if len(open_streams) == CLIENTS:
            started.set()
        await started.wait()  # every answer has begun before one is read to its end
        return [piece async for piece in stream][-1].usage.completion_tokens

    async def every():
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(limits=limits, timeout=PATIENCE) as http:
            client, open_streams = server.async_client(http_client=http), []
            return await asyncio.gather(*(one(client, number, open_streams) for number in range(CLIENTS)))

    with server.watch("num_requests_running", "generation_tokens_total", interval=0.2) as watched:
        assert asyncio.run(every()) == [8] * CLIENTS
    written = watched.frame["generation_tokens_total"]
    assert written.iloc[-1] - written.iloc[0] == 8 * CLIENTS
    assert written.is_monotonic_increasing and watched.frame.index.is_monotonic_increasing
    assert until(lambda: used(server) == (0, 0, 0))
    with pytest.raises(HelpersError, match="Did you mean num_requests_running"):
        server.watch("num_request_running")


def test_a_client_that_leaves_frees_its_blocks(server):
    answers, tokens = 64, 240
    body = {
        "model": "qwen-7b",
        "prompt": "床前",
        "max_tokens": tokens,
        "stream": True,
        "n": answers,
        "ignore_eos": True,
    }
    before = total(server.metrics(), "generation_tokens_total")
    with httpx.stream(
        "POST",
        f"{server.url}/v1/completions",
        json=body,
        headers={"Authorization": f"Bearer {server.key}"},
        timeout=PATIENCE,
    ) as answer:
        assert next(answer.iter_lines()).startswith("data: ")
    assert until(lambda: used(server) == (0, 0, 0))
    assert total(server.metrics(), "generation_tokens_total") - before < answers * tokens, "it wrote on for nobody"


def test_when_the_engine_dies_the_client_is_told_and_does_not_hang(server, client):
    engine = next(each for each in psutil.Process(server.pid).children() if "Engine" in each.name())
    stream = client.completions.create(
        model="qwen-7b", prompt="床前", max_tokens=250, n=2, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    os.kill(engine.pid, signal.SIGKILL)
    killed = time.monotonic()
    with pytest.raises(openai.APIError) as told:
        list(stream)
    # the one time that a test asserts: whoever waits for an answer is promised an error within 5 s
    assert time.monotonic() - killed < 5, "it hung"
    with pytest.raises(openai.APIError) as refused:
        client.completions.create(model="qwen-7b", prompt="床前")
    assert not any(isinstance(each.value, openai.APITimeoutError) for each in (told, refused)), "it hung"
    with pytest.raises(HelpersError):
        server.wait()
    server.stop()
    assert not psutil.pid_exists(server.pid)
