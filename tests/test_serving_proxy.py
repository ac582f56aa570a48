"""A reader's proxy is for the outside: what talks to a server on the loopback goes past it."""

from __future__ import annotations

import asyncio
import http.server
import json
import threading
import time
from types import SimpleNamespace

import pytest

from helpers.serving.bench import _Client, _Run
from helpers.serving.progress import Progress
from helpers.serving.server import Server

MODELS = {"object": "list", "data": [{"id": "qwen-7b", "object": "model", "max_model_len": 512}]}


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers like vLLM's /health, /metrics and /v1/models."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        text = "vllm:num_requests_running 3\n" if self.path == "/metrics" else json.dumps(MODELS)
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """A server object without vLLM: what it asks is answered by ``Answer``."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        it = object.__new__(Server)
        it.url, it.key, it.model = f"http://127.0.0.1:{web.server_port}", "key", "qwen-7b"
        it._start, it._process = time.monotonic(), SimpleNamespace(poll=lambda: None, returncode=None)
        it.log = lambda lines: ""
        it.job = SimpleNamespace(title="a stand-in")
        yield it
        web.shutdown()


@pytest.fixture(params=["http://127.0.0.1:9", "socks5://127.0.0.1:9"], autouse=True)
def proxy(request, monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, request.param)


def test_the_server_is_heard(server):
    with Progress("waits") as progress:
        server._wait(5, progress)
    assert server.ready_seconds > 0
    assert server.metrics()["value"].tolist() == [3]


def test_clients_reach_it(server):
    assert [model.id for model in server.client(timeout=5).models.list()] == ["qwen-7b"]

    async def ask():
        async with server.async_client(timeout=5) as client:
            return [model.id async for model in client.models.list()]

    assert asyncio.run(ask()) == ["qwen-7b"]


def test_a_client_of_the_callers_own_is_taken(server):
    import openai

    with openai.DefaultHttpxClient(trust_env=False) as mine:
        assert server.client(http_client=mine)._client is mine


def test_the_load_generator_finds_it(server):
    _Client(server)._check(_Run(None, 1, 8, 8, {}, 0))
