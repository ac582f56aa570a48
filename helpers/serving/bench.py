"""A server under load: ``vllm bench serve``, vLLM's own load generator, run against a server of ``serve``."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from .. import catalog
from ..errors import HelpersError, unknown
from ..memory.matrix import append_rows, is_done
from ..report.record import common, figure, format_value, record
from . import client as load_generator
from .command import parallel
from .explain import last_words
from .progress import Progress
from .server import Server, serve

SOURCE = "python -m helpers bench"
WARM_UP = 4
"""Requests sent before the clock starts, all with the first prompt: some things are only made at first use."""

TIMEOUT = 3600.0
"""Seconds that a run of ``bench_matrix`` may take."""

TIMES = ("ttft", "tpot", "itl", "e2el")
"""What vLLM's program measures of every request."""

OBJECTIVES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "e2el_ms": "the whole answer"}
"""What an objective may limit, in milliseconds, as ``--goodput`` takes it without the unit."""


@dataclass(frozen=True)
class Percentiles:
    """A time over all requests of a run, in seconds: half of them took at most ``p50``, 99 of 100 at most ``p99``."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Load:
    """How a server answered one stream of requests. Times are seconds, taken at the client, the network included.

    Attributes:
        requests_per_s: requests sent a second on average, at random distances (a Poisson process); None: all at once.
        requests: how many were sent, every one answered.
        prompt_tokens: tokens of each prompt, drawn at random from the vocabulary.
        new_tokens: tokens of each answer; stop tokens are ignored, so every answer has as many.
        seed: of prompts and distances.
        seconds: from the first request to the last token of the last answer.
        throughput: tokens written a second over ``seconds``, all answers together; prompts do not count.
        ttft: time to first token: from sending a request to the first piece of its answer, waiting in line included.
        tpot: time per output token after the first: the rest of an answer by ``new_tokens - 1``, a figure a request.
        itl: inter-token latency: each pause between two pieces of an answer, a figure a pause.
        e2el: end-to-end latency: from sending a request to the end of its answer.
        most_at_once: the most requests that were under way within one second.
        cached: share of the prompt tokens that the server took from its prefix cache instead of computing them, 0 to
            1, the warm-up included. Two runs with the same seed send the same prompts: unless the server was started
            with ``enable_prefix_caching=False``, the second one measures the cache.
        objective: limits in milliseconds, keys of ``OBJECTIVES``.
        goodput: answers a second that kept to every limit; None without an objective.
        mean_prompt_tokens: tokens of a prompt as the server counted them, the warm-up included. vLLM's program sends
            text: a tokenizer that spells rare characters byte by byte (the SentencePiece stand-ins) reads some of it
            back as up to three times as many tokens.
    """

    requests_per_s: float | None
    requests: int
    prompt_tokens: int
    new_tokens: int
    seed: int
    seconds: float
    throughput: float
    ttft: Percentiles
    tpot: Percentiles
    itl: Percentiles
    e2el: Percentiles
    most_at_once: int
    cached: float
    objective: Mapping[str, float] = field(default_factory=dict)
    goodput: float | None = None
    mean_prompt_tokens: float | None = None

    @property
    def answers_per_s(self) -> float:
        """Requests answered a second; well below ``requests_per_s`` the server no longer keeps up."""
        return self.requests / self.seconds

    def figures(self, prefix: str = "") -> list[dict[str, Any]]:
        """Return throughput, times and goodput as arguments of ``record``; named ``<prefix>_<figure>``."""
        prefix = f"{prefix}_" if prefix else ""
        about = {"requests_per_s": self.requests_per_s, "batch": None if self.requests_per_s else self.requests}
        about |= {"prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens}
        sent = "at random times (Poisson)" if self.requests_per_s else "all at once"
        how = f"{self.requests} requests {sent}, at the client of vllm bench serve"
        mean = self.mean_prompt_tokens or self.prompt_tokens
        if abs(mean / self.prompt_tokens - 1) > 0.05:
            how += f", prompts of {mean:.0f} tokens on average"
        found = [("throughput", self.throughput, "tokens/s", "output tokens a second, all answers together")]
        if self.goodput is not None:
            limits = " and ".join(f"{OBJECTIVES[key]} within {limit:g} ms" for key, limit in self.objective.items())
            found.append(("goodput", self.goodput, "requests/s", f"answers a second with {limits}"))
        times = {"ttft": "time to first token", "tpot": "time per output token after the first"}
        for (name, what), rank in itertools.product(times.items(), (50, 99)):
            value = getattr(getattr(self, name), f"p{rank}")
            found.append((f"{name}_p{rank}", value, "s", f"{what}, percentile {rank} over the requests"))
        return [
            {"name": prefix + name, "value": value, "unit": unit, "definition": f"{what}; {how}", "machine": True}
            | about
            for name, value, unit, what in found
        ]

    def record(self, prefix: str = "", **about: Any) -> None:
        """Record the figures; ``about`` as for ``helpers.report.record``."""
        for one in self.figures(prefix):
            record(**(one | about))


def bench(
    server: Server,
    requests_per_s: float | None = None,
    requests: int = 32,
    prompt_tokens: int = 128,
    new_tokens: int = 128,
    goodput: Mapping[str, float] | None = None,
    seed: int = 0,
    timeout: float = 3600,
) -> Load:
    """Send a running server requests by ``vllm bench serve``, a process of its own, and return what it measured.

        run = bench(server, requests_per_s=4, requests=100, goodput={"ttft_ms": 500, "tpot_ms": 50})

    Prompts are random tokens, answers greedy and of full length, so the words have no part in it. Importing vLLM takes
    the client some seconds before it begins; they are not counted.

    Args:
        server: as ``serve`` returns it. Start it with ``enable_prefix_caching=False`` if it is to be asked twice.
        requests_per_s: how fast requests are sent; None sends all at once.
        requests: how many. A 99th percentile of fewer than a hundred is little more than the slowest one.
        prompt_tokens: tokens of each prompt; where a tokenizer does not read its own text back the same, some prompts
            come out longer (``Load.mean_prompt_tokens``), and the server needs room for them.
        new_tokens: tokens of each answer, at least 2.
        goodput: objective in milliseconds, any of ``ttft_ms``, ``tpot_ms`` and ``e2el_ms``.
        seed: of the prompts and of the distances between requests.
        timeout: seconds that a run may take.

    Raises:
        HelpersError: numbers that leave nothing to measure, a server that does not answer, requests that failed or a
            client that did.
    """
    run = _Run(requests_per_s, requests, prompt_tokens, new_tokens, dict(goodput or {}), seed)
    with _Client(server) as client:
        return client.measure(run, timeout)


def bench_rates(
    server: Server,
    rates: Sequence[float | None],
    requests: int = 100,
    seconds: float = 10,
    prompt_tokens: int = 128,
    new_tokens: int = 128,
    goodput: Mapping[str, float] | None = None,
    seed: int = 0,
    timeout: float = 3600,
) -> list[Load]:
    """Measure several rates, one after another, by one client: it imports vLLM once.

    Args:
        server, prompt_tokens, new_tokens, goodput, timeout: as ``bench``.
        rates: requests a second, in the order they are tried; None, or ``inf``, sends all at once.
        requests: how many are sent at a rate, at the least.
        seconds: for how long they are sent, at the least: a line grows for as long as requests come too fast.
        seed: of the first rate; each next one has the next, and so other prompts.

    Raises:
        HelpersError: as ``bench``.
    """
    sizes = (prompt_tokens, new_tokens, dict(goodput or {}))
    runs = [_run_at(rate, requests, seconds, *sizes, seed + number) for number, rate in enumerate(rates)]
    with _Client(server) as client:
        return [client.measure(run, timeout) for run in runs]


def bench_matrix(
    models: Sequence[str],
    precisions: Sequence[str],
    output: Path,
    *,
    rates: Sequence[float],
    weights: str = "random",
    device: str = "auto",
    requests: int = 100,
    seconds: float = 30,
    prompt_tokens: int = 128,
    new_tokens: int = 128,
    goodput: Mapping[str, float] | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Measure every rate that ``output`` does not hold yet, and append its rows; a model is started once a precision.

    What cannot be served or fails is reported and left out.

    Args:
        models: catalogue ids.
        precisions, weights, device: as ``serve``.
        output: file of JSON lines in the form of ``helpers.catalog.MeasuredRow``.
        rates: requests a second; ``inf`` sends them all at once, and the rows say how many as their ``batch``.
        requests: how many are sent at a rate, at the least.
        seconds: for how long they are sent, at the least: fast rates need more requests until the line is as long as
            it gets.
        prompt_tokens, new_tokens, goodput: as ``bench``.
        options: of vLLM, as ``serve`` takes them. The prefix cache is off unless they say otherwise.

    Raises:
        HelpersError: an unknown model or numbers that leave nothing to measure, before anything is started.
    """
    for model in models:
        catalog.model(model)
    options = {"enable_prefix_caching": False} | dict(options or {})
    runs = [_run_at(rate, requests, seconds, prompt_tokens, new_tokens, dict(goodput or {}), 0) for rate in rates]
    about = {"weights": weights, "engine": "vllm", "device": device, "parallel": parallel(options)}
    for model, precision in itertools.product(models, precisions):
        common(**about, model=model, precision=precision)
        print(f"{model} {precision}", flush=True)
        missing = [run for run in runs if not is_done(output, "tpot_p99", run.point())]
        if not missing:
            print("  measured already")
            continue
        try:
            with serve(model, weights, precision, device, **options) as server, _Client(server) as client:
                for run in missing:
                    _write_down(client, run, output)
        except HelpersError as error:
            print(f"  not served: {str(error).splitlines()[0]}", flush=True)


def _write_down(client: _Client, run: _Run, output: Path) -> None:
    """Measure a rate and append its rows; one that fails is reported, and the server may be there for the next."""
    try:
        figures = [figure(**one) for one in client.measure(run, TIMEOUT).figures()]
        append_rows(output, figures, SOURCE)
        print("  " + ", ".join(f"{one['name']} {format_value(one['value'])} {one['unit']}" for one in figures))
    except HelpersError as error:
        print(f"  left out: {str(error).splitlines()[0]}")
    sys.stdout.flush()


@dataclass(frozen=True)
class _Run:
    """One stream of requests, as ``bench`` takes it; made, it can be measured.

    Raises:
        HelpersError: numbers that leave nothing to measure.
    """

    requests_per_s: float | None
    requests: int
    prompt_tokens: int
    new_tokens: int
    goodput: dict[str, float]
    seed: int

    def __post_init__(self) -> None:
        for key in self.goodput:
            if key not in OBJECTIVES:
                raise unknown("objective", key, list(OBJECTIVES))
        least = {"requests": 1, "prompt_tokens": 1, "new_tokens": 2}
        numbers = {name: getattr(self, name) for name in least} | self.goodput
        if self.requests_per_s is not None:
            numbers["requests_per_s"] = self.requests_per_s
        for name, number in numbers.items():
            enough = number >= least[name] if name in least else number > 0
            if not (enough and math.isfinite(number)):
                fix = f"take at least {least[name]}" if name in least else "take more than 0"
                raise HelpersError(f"cannot bench with {name}={number:g}", "it leaves nothing to measure", fix)

    def point(self) -> dict[str, Any]:
        """Return what tells its rows from those of other streams."""
        batch = None if self.requests_per_s else self.requests
        sizes = {"prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens}
        return {"requests_per_s": self.requests_per_s, "batch": batch} | sizes

    def pace(self) -> str:
        """Say how fast it is."""
        return "all at once" if self.requests_per_s is None else f"at {self.requests_per_s:.3g} a second"

    def arguments(self) -> list[str]:
        """Write it for vLLM's command line."""
        words = [
            *("--dataset-name", "random", "--num-prompts", str(self.requests), "--seed", str(self.seed)),
            *("--random-input-len", str(self.prompt_tokens), "--random-output-len", str(self.new_tokens)),
            *("--request-rate", "inf" if self.requests_per_s is None else str(self.requests_per_s)),
            *("--ignore-eos", "--temperature", "0", "--num-warmups", str(WARM_UP)),
            *("--percentile-metrics", ",".join(TIMES), "--metric-percentiles", "50,90,99"),
        ]
        limits = [f"{key.removesuffix('_ms')}:{limit:g}" for key, limit in self.goodput.items()]
        return [*words, "--goodput", *limits] if limits else words


def _run_at(rate: float | None, requests: int, seconds: float, *rest: Any) -> _Run:
    """Make the run of a rate with as many requests as come in ``seconds``, and no fewer than ``requests``."""
    if rate is None or rate == math.inf:
        return _Run(None, requests, *rest)
    many = math.ceil(rate * seconds) if math.isfinite(rate * seconds) else 0
    return _Run(rate, max(requests, many), *rest)


class _Client:
    """vLLM's load generator beside a server: started for the first run, killed at the end of the block."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the block
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(self, *_: object) -> None:
        """Kill it, whatever it does; an interrupt comes here, too."""
        self._kill()
        self._log.close()

    def measure(self, run: _Run, timeout: float) -> Load:
        """Send one stream of requests and return what came of it; arguments and errors as ``bench``."""
        import torch  # noqa: F401 - what a figure says of its device is asked of torch

        self._check(run)
        before = self._counted()
        label = f"vllm bench serve: {run.requests} requests {run.pace()}"
        with tempfile.TemporaryDirectory() as folder, Progress(label) as progress:
            names = ("--model", self.server.model, "--tokenizer", str(self.server.job.folder))
            result = ("--save-result", "--save-detailed", "--result-dir", folder, "--result-filename", "result.json")
            self._run([*names, "--base-url", self.server.url, *run.arguments(), *result], timeout, progress)
            found = json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))
        if found["failed"] or found["completed"] != run.requests:
            raise self._failed(found)
        hits, asked, read = (now - then for now, then in zip(self._counted(), before, strict=True))
        return Load(
            **{name: value for name, value in vars(run).items() if name != "goodput"},
            **{name: _percentiles(found, name) for name in TIMES},
            seconds=found["duration"],
            throughput=found["output_throughput"],
            most_at_once=found["max_concurrent_requests"],
            cached=hits / asked if asked else 0.0,
            objective=run.goodput,
            goodput=found["request_goodput"] if run.goodput else None,
            mean_prompt_tokens=read / (run.requests + WARM_UP),
        )

    def _check(self, run: _Run) -> None:
        """Raise HelpersError unless the server answers, and takes sequences of that length."""
        import httpx

        server, tokens = self.server, run.prompt_tokens + run.new_tokens
        try:
            headers = {"Authorization": f"Bearer {server.key}"}
            answer = httpx.get(f"{server.url}/v1/models", headers=headers, timeout=30, trust_env=False)
            longest = answer.raise_for_status().json()["data"][0]["max_model_len"]
        except httpx.HTTPError as error:
            why = f"it does not answer ({type(error).__name__})"
            raise HelpersError(f"cannot bench {server!r}", why, "start it again with serve(...)") from None
        if tokens > longest:
            why = f"prompt and answer have {tokens} tokens, and it takes {longest} at most"
            fix = "take fewer, or serve it with a larger max_model_len"
            raise HelpersError(f"cannot bench {server.model}", why, fix)

    def _counted(self) -> list[float]:
        """Return prompt tokens found in the prefix cache so far, those looked for there, and all."""
        samples = self.server.metrics()
        names = ("prefix_cache_hits", "prefix_cache_queries", "prompt_tokens")
        return [float(samples.loc[samples["name"] == f"vllm:{name}_total", "value"].sum()) for name in names]

    def _start(self) -> subprocess.Popen[bytes]:
        """Start vLLM's program. It takes the key from the environment, where ps does not show it."""
        server = self.server
        host = server.url.split("/")[2].rpartition(":")[0]
        direct = ",".join(filter(None, [os.environ.get("NO_PROXY"), host]))  # it would ask a proxy for the loopback
        settings = {"OPENAI_API_KEY": server.key, "NO_PROXY": direct, "no_proxy": direct}
        return subprocess.Popen(
            [sys.executable, "-m", load_generator.__name__],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=os.environ | server.job.environment() | server._environment() | settings,
            start_new_session=True,  # as Server: its group is ended whole, also when this process is killed
        )

    def _run(self, arguments: list[str], timeout: float, progress: Progress) -> None:
        """Have vLLM's program run once.

        Raises:
            HelpersError: it failed, or ``timeout`` is over.
        """
        begin, end = os.fstat(self._log.fileno()).st_size, time.monotonic() + timeout
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        with suppress(BrokenPipeError):  # then it has just ended
            self._process.stdin.write(f"{json.dumps(arguments)}\n".encode())
            self._process.stdin.flush()
        while load_generator.DONE not in (said := self._said(begin)):
            late = time.monotonic() > end
            if late or self._process.poll() is not None:
                self._kill()
                why = f"it was not done within {timeout:.0f} s" if late else last_words(self._said(begin))
                raise HelpersError(f"vllm bench serve failed on {self.server.model}", why, "look at server.log()")
            progress.say(said.strip().rpartition("\n")[2] or "starting")
            time.sleep(0.2)

    def _said(self, begin: int) -> str:
        """Return what was printed since; tqdm goes back to the start of its line, which counts as a new one."""
        size = os.fstat(self._log.fileno()).st_size - begin
        return os.pread(self._log.fileno(), size, begin).decode(errors="replace").replace("\r", "\n")

    def _kill(self) -> None:
        if self._process is None:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def _failed(self, found: Mapping[str, Any]) -> HelpersError:
        first = next((error for error in found.get("errors", []) if error), "no reason given").strip()
        what = f"{found['failed']} of {found['num_prompts']} requests to {self.server.model} failed"
        why = f"the first with {first.splitlines()[-1][:200]!r}, and figures of the rest alone would flatter"
        return HelpersError(what, why, "look at server.log(), and send fewer or shorter ones")


def _percentiles(found: Mapping[str, float], name: str) -> Percentiles:
    return Percentiles(*(found[f"p{rank}_{name}_ms"] / 1000 for rank in (50, 90, 99)))
