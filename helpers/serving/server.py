"""A vLLM server as an object: started, waited for, asked, and always stopped, whatever ends the cell or the kernel."""

from __future__ import annotations

import atexit
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ..errors import HelpersError
from . import launch
from .command import Job, adapters, flags, prepare
from .explain import explain, flat, is_known
from .metrics import Watch, parse
from .progress import Progress

if TYPE_CHECKING:
    import httpx
    from openai import AsyncOpenAI, OpenAI
    from pandas import DataFrame

GRACE = 10.0
"""Seconds that vLLM gets to end by itself before it is killed."""

LOST_PORT = "DistNetworkError"
"""vLLM's engine picks a free port for PyTorch's workers and takes it seconds later; somebody may have been faster."""

_running: set[Server] = set()


def serve(
    model: str,
    weights: str | Path = "tiny",
    precision: str = "auto",
    device: str = "auto",
    lora: Mapping[str, str | Path] | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    timeout: float = 900,
    **options: Any,
) -> Server:
    """Start vLLM's OpenAI-compatible server for a model, and return when it answers.

        with serve("qwen-7b", max_model_len=512) as server:
            client = server.client()

    Args:
        model, weights, precision: as ``load``. A path as weights may also be a folder that is quantised (GPTQ, AWQ,
            compressed-tensors, bitsandbytes) or converted already: it is served as it is. ``"random"`` needs no
            download and the memory of the full size.
        device: ``"auto"`` is what the installed vLLM is built for; ``"cuda:1"`` picks a card.
        lora: name -> folder of an adapter; each is asked for as a model of its name.
        host: the address to listen at. Anything but the loopback lets other machines in, with the key, unencrypted.
        port: a free one if left out.
        timeout: seconds to wait. A start takes a minute on two CPU cores, more where there is much to load.
        options: vLLM's own arguments by their Python names, e.g. ``max_model_len=2048``,
            ``gpu_memory_utilization=0.5``, ``enable_prefix_caching=False`` (https://docs.vllm.ai/en/latest/cli/serve/).

    Raises:
        HelpersError: the model cannot be served, the port is taken, or vLLM ended or did not answer in time; the
            cause is read from its log, whose tail is in the error's notes.
    """
    job = prepare(model, weights, precision, device, options | adapters(lora or {}))
    if port is not None and not _is_free(host, port):
        raise HelpersError(f"cannot serve at port {port}", "it is taken", "leave port out, and a free one is found")
    with Progress(f"vLLM: {job.title}") as progress:
        for attempt in (1, 2):
            server = Server(job, host, port or _free_port(host))
            try:
                server._wait(timeout, progress)
                return server
            except _Silent as silent:
                server.stop()
                if attempt == 2:
                    raise explain(server.log(None), job, str(silent)) from None
                progress.say("it ended without a word; once more")
            except BaseException:
                server.stop()
                raise
    raise AssertionError("unreachable")


class Server:
    """A running server; made by ``serve``. It ends with its ``with`` block, with ``stop``, or with this process.

    Attributes:
        url: e.g. ``"http://127.0.0.1:43211"``; the OpenAI routes lie below ``/v1``.
        key: the API key, new for every server. It is not printed with the object.
        model: the name that requests ask for.
        job: what vLLM was asked to do.
        ready_seconds: time from the start of the process to its first answer.
        pid: process id of vLLM's API server, whose children are the engine and its workers.
    """

    def __init__(self, job: Job, host: str, port: int) -> None:
        """Start the process; ``serve`` does it and waits."""
        self.job, self.model, self.key = job, job.model, secrets.token_urlsafe(24)
        self.host, self.port = host, port
        self.url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
        self.ready_seconds = 0.0
        self._last_log = ""
        self._owner = os.getpid()
        # it has no name, so nothing is left of it even after SIGKILL; stop() closes it
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._start = time.monotonic()
        self._process = subprocess.Popen(
            self._command(),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=os.environ | job.environment() | self._environment(),
            start_new_session=True,  # interrupting a cell is no signal to the server, and its group can be ended whole
        )
        self.pid = self._process.pid
        _running.add(self)

    def __repr__(self) -> str:
        """Name the server without its key."""
        state = "stopped" if self._process.returncode is not None else "running"
        return f"Server({self.job.title}, {self.url}, {state})"

    def client(self, **settings: Any) -> OpenAI:
        """Return an ``openai.OpenAI`` client that has the address and the key; it does not repeat failed requests.

        It goes past any proxy. ``close`` ends its connections, as does ``with server.client() as client``.
        """
        from openai import DefaultHttpxClient, OpenAI

        return OpenAI(**self._address() | {"http_client": DefaultHttpxClient(trust_env=False)} | settings)

    def async_client(self, **settings: Any) -> AsyncOpenAI:
        """Return an ``openai.AsyncOpenAI`` client, as ``client``; end it with ``await client.close()``."""
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        return AsyncOpenAI(**self._address() | {"http_client": DefaultAsyncHttpxClient(trust_env=False)} | settings)

    def log(self, lines: int | None = 20) -> str:
        """Return the last lines of vLLM's log, or the whole; it stays after the server has been stopped."""
        if not self._log.closed:
            size = os.fstat(self._log.fileno()).st_size
            self._last_log = os.pread(self._log.fileno(), size, 0).decode(errors="replace")
        every = self._last_log.splitlines()
        return "\n".join(every if lines is None else every[-lines:])

    def metrics(self) -> DataFrame:
        """Return what /metrics says now: a row for each sample, with ``name``, ``labels`` and ``value``.

        /metrics asks for no key. vLLM's names are listed at https://docs.vllm.ai/en/latest/usage/metrics/.
        """
        return parse(self._get("/metrics", 30).raise_for_status().text)

    def watch(self, *names: str, interval: float = 0.5) -> Watch:
        """Return a block that reads metrics every ``interval`` seconds, e.g. ``server.watch("num_requests_running")``.

        Raises:
            HelpersError: there is no such metric; the valid ones are listed.
        """
        return Watch(self.metrics, names, interval)

    def wait(self) -> None:
        """Wait until ``stop`` is called, e.g. by another thread.

        Raises:
            HelpersError: vLLM ended by itself (it does when its engine dies); its log is quoted.
        """
        code = self._process.wait()
        if self in _running:
            raise explain(self.log(None), self.job, f"it ended with exit status {code}")

    def stop(self) -> None:
        """End vLLM, its engine and its workers; a second call does nothing."""
        if self._log.closed:
            return
        _running.discard(self)
        with suppress(ProcessLookupError):
            self._process.terminate()
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE)
                self._wait_for_group()
        finally:  # an interrupt while waiting must not leave anything behind
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
            self.log(None)
            self._log.close()

    def __enter__(self) -> Self:
        """Return the server itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it."""
        self.stop()

    def _address(self) -> dict[str, Any]:
        return {"base_url": f"{self.url}/v1", "api_key": self.key, "max_retries": 0}

    def _get(self, path: str, timeout: float) -> httpx.Response:
        """Ask the server itself, not the proxy that the reader's environment names for the outside."""
        import httpx

        return httpx.get(self.url + path, timeout=timeout, trust_env=False, verify=_certificates())

    def _command(self) -> list[str]:
        address = {"host": self.host, "port": self.port, "served_model_name": self.model}
        guard = {"middleware": "helpers.serving.guard.KeyEverywhere", "uvicorn_log_level": "warning"}
        options = address | guard | dict(self.job.options)
        return [sys.executable, "-m", launch.__name__, "serve", str(self.job.folder), *flags(options)]

    def _environment(self) -> dict[str, str]:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        return {"VLLM_API_KEY": self.key, "PYTHONPATH": path, launch.PARENT: str(os.getpid())}

    def _wait_for_group(self) -> None:
        """Wait a little for the engine, and for Python's resource tracker, which removes their shared memory."""
        for _ in range(50):
            try:
                os.killpg(self.pid, 0)
            except (ProcessLookupError, PermissionError):
                return
            time.sleep(0.1)

    def _wait(self, timeout: float, progress: Progress) -> None:
        """Return when /health answers.

        Raises:
            _Silent: the process ended and its log does not say why, or another took the port that it had picked for its
                workers: both happen to a start under load now and then.
            HelpersError: it ended for a reason, or ``timeout`` is over.
        """
        import httpx

        while (passed := time.monotonic() - self._start) < timeout:
            if self._process.poll() is not None:
                code = self._process.returncode
                ended = f"it was killed by signal {-code}" if code < 0 else f"it ended with exit status {code}"
                log = self.log(None)
                if (not is_known(log) or LOST_PORT in log) and code != -signal.SIGKILL:
                    raise _Silent(ended)
                raise explain(log, self.job, ended)
            with suppress(httpx.HTTPError):
                if self._get("/health", 5).status_code == 200:
                    self.ready_seconds = time.monotonic() - self._start
                    return
            progress.say(f"{passed:.0f} s  {flat(self.log(1))}")
            time.sleep(1)
        raise explain(self.log(None), self.job, f"it did not answer within {timeout:.0f} s")


class _Silent(Exception):
    """A start that ended without a reason in the log, or with one that will not be there the next time."""


@cache
def _certificates() -> ssl.SSLContext:
    """Make them once; httpx does so for every request, which takes far longer than the reading."""
    return ssl.create_default_context()


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _is_free(host: str, port: int) -> bool:
    """vLLM itself would share a port with another vLLM (SO_REUSEPORT) and answer half of the requests."""
    with socket.socket() as probe:
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


@atexit.register
def _stop_all() -> None:
    """Stop what was not stopped when Python ends; a fork of it leaves its parent's servers alone."""
    for server in list(_running):
        if server._owner == os.getpid():
            server.stop()
