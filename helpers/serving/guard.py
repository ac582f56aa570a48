"""Asks for the key on every path of a server but the few that must answer without one."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]

OPEN = {"/health", "/ping", "/version", "/metrics"}
"""What a load balancer or Prometheus asks: nothing that anybody wrote, and nothing that makes the model work."""


class KeyEverywhere:
    """ASGI middleware (asgi.readthedocs.io) for ``vllm serve --middleware``.

    vLLM asks for its key only where a path begins with /v1, /v2, /inference or /cohere
    (vllm/entrypoints/serve/utils/server_utils.py): without one, /invocations answers a whole chat.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        self.wanted = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """Pass a request on, or answer 401."""
        given = dict(scope.get("headers", [])).get(b"authorization", b"")
        is_request = scope["type"] in ("http", "websocket")
        if not is_request or scope["path"] in OPEN or secrets.compare_digest(given, self.wanted):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            body = json.dumps({"error": {"message": "wrong or missing API key", "type": "Unauthorized", "code": 401}})
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body.encode()})
