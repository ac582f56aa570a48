"""vLLM's load generator beside a real server: what it measures, what it refuses, and that nothing of it is left.

The slow one, for the start of the server. The last test ends it.
"""

from __future__ import annotations

import _thread
import json
import math
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import psutil
import pytest

from helpers import common, serve
from helpers.catalog import MeasuredRow
from helpers.errors import HelpersError
from helpers.serving import bench as module
from helpers.serving import client as load_generator
from helpers.serving.bench import Load, Percentiles, bench, bench_matrix, bench_rates

pytest.importorskip("vllm")

TIME = Percentiles(0.1, 0.2, 0.3)
DONE = Load(2.0, 10, 8, 4, 0, 5.0, 8.0, TIME, TIME, TIME, TIME, 3, 0.0, {"ttft_ms": 500}, 0.0)
SMALL = dict(prompt_tokens=32, new_tokens=8)


@pytest.fixture(autouse=True)
def nothing_in_common():
    yield
    common()


@pytest.fixture(scope="module")
def server():
    with serve("qwen-7b", max_model_len=128, block_size=16, timeout=1500) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    """A load generator that is kept, as its start takes longer than the rest of a test."""
    with module._Client(server) as kept:
        yield kept


@pytest.fixture
def only_one(client, monkeypatch):
    """Let every call of the test use the one that is kept."""
    monkeypatch.setattr(module, "_Client", lambda server: nullcontext(client))


@pytest.fixture
def new_clients():
    """Return a function that lists the load generators started since."""

    def every():
        found = psutil.Process().children(recursive=True)
        return [each for each in found if load_generator.__name__ in each.cmdline()]

    known = every()
    return lambda: [each for each in every() if each not in known]


def test_what_was_measured_is_written_down_as_rows():
    figures = DONE.figures("qwen")
    assert [one["name"] for one in figures] == [
        "qwen_throughput", "qwen_goodput", "qwen_ttft_p50", "qwen_ttft_p99", "qwen_tpot_p50", "qwen_tpot_p99",
    ]  # fmt: skip
    assert {one["requests_per_s"] for one in figures} == {2.0} and {one["batch"] for one in figures} == {None}
    assert "TTFT within 500 ms" in figures[1]["definition"]
    assert DONE.answers_per_s == 2.0
    assert "on average" not in figures[0]["definition"]
    longer = replace(DONE, mean_prompt_tokens=10.0).figures()
    assert "prompts of 10 tokens on average" in longer[0]["definition"]


def test_a_run_all_at_once_says_how_many_and_has_no_rate():
    figures = Load(None, 10, 8, 4, 0, 5.0, 8.0, TIME, TIME, TIME, TIME, 10, 0.0).figures()
    assert {(one["requests_per_s"], one["batch"]) for one in figures} == {(None, 10)}
    assert "goodput" not in [one["name"] for one in figures]  # there was no objective


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"requests_per_s": 0}, "cannot bench with requests_per_s=0: .* Take more than 0"),
        ({"requests_per_s": math.inf}, "cannot bench with requests_per_s=inf"),
        ({"requests": 0}, "requests=0: .* Take at least 1"),
        ({"prompt_tokens": 0}, "prompt_tokens=0"),
        ({"new_tokens": 1}, "new_tokens=1: .* Take at least 2"),
        ({"goodput": {"ttft": 500}}, "unknown objective 'ttft'.* did you mean ttft_ms"),
        ({"goodput": {"ttft_ms": -1}}, "ttft_ms=-1"),
        ({"goodput": {"tpot_ms": math.nan}}, "tpot_ms=nan"),
    ],
)
def test_numbers_are_looked_at_before_the_server_is(change, message):
    with pytest.raises(HelpersError, match=f"(?i){message}"):
        bench(None, **change)


def test_the_matrix_looks_at_its_numbers_before_it_starts_anything(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "serve", None)
    for change, message in [({"rates": [1, -1]}, "requests_per_s=-1"), ({"models": ["qwen-9b"]}, "qwen-9b")]:
        with pytest.raises(HelpersError, match=message):
            bench_matrix(**dict(models=["qwen-7b"], precisions=["bf16"], output=tmp_path / "x", rates=[1]) | change)


def test_a_stream_of_requests_is_measured(server, new_clients):
    run = bench(server, 20, 10, goodput={"ttft_ms": 1e6, "tpot_ms": 1e6}, **SMALL)
    assert run.requests == 10 and run.seconds > 0 and run.most_at_once >= 1
    assert run.throughput == pytest.approx(10 * 8 / run.seconds)  # every answer has its full length
    assert run.mean_prompt_tokens == pytest.approx(32, rel=0.1)
    assert run.goodput == pytest.approx(run.answers_per_s)  # and all were good
    for name in ("ttft", "tpot", "itl", "e2el"):
        times = getattr(run, name)
        assert 0 <= times.p50 <= times.p90 <= times.p99
    assert run.ttft.p50 < run.e2el.p50 < run.seconds  # all of them in seconds
    assert new_clients() == []


def test_one_client_measures_all_rates_(server, monkeypatch):
    starts, start = [], module._Client._start
    monkeypatch.setattr(module._Client, "_start", lambda client: starts.append(1) or start(client))
    runs = bench_rates(server, [50, math.inf], 4, seconds=0.2, goodput={"e2el_ms": 1e-3}, seed=20, **SMALL)
    assert starts == [1]
    assert [(run.requests_per_s, run.requests, run.seed) for run in runs] == [(50, 10, 20), (None, 4, 21)]
    assert [run.goodput for run in runs] == [0, 0]  # a microsecond is not enough for anybody


@pytest.mark.usefixtures("only_one")
def test_prompts_that_come_from_the_prefix_cache_are_told(server):
    first, same, other = (bench(server, None, 12, seed=seed, **SMALL).cached for seed in (30, 30, 31))
    assert same > first and same > other  # what the other two share is the first prompt, which is sent to warm up


@pytest.mark.usefixtures("only_one")
def test_the_matrix_goes_on_where_it_stopped(server, tmp_path, monkeypatch, capsys):
    @contextmanager
    def running(*args, **options):
        assert options["enable_prefix_caching"] is False
        yield server

    monkeypatch.setattr(module, "serve", running)
    about = dict(weights="tiny", requests=4, seconds=0, goodput={"ttft_ms": 1e-3}, **SMALL)
    out = tmp_path / "rows.jsonl"
    bench_matrix(["qwen-7b"], ["auto"], out, rates=[50], **about)
    before = out.read_text()
    bench_matrix(["qwen-7b"], ["auto"], out, rates=[50, math.inf], **about)
    assert out.read_text().startswith(before)
    rows = [MeasuredRow.model_validate(json.loads(line)) for line in out.read_text().splitlines()]
    assert [(row.requests_per_s, row.batch) for row in rows if row.name == "tpot_p99"] == [(50, None), (None, 4)]
    assert {(row.engine, row.precision, row.new_tokens, row.parallel) for row in rows} == {("vllm", "fp32", 8, None)}
    assert len({row.setting() for row in rows}) == len(rows)
    monkeypatch.setattr(module, "serve", None)
    bench_matrix(["qwen-7b"], ["auto"], out, rates=[50, math.inf], **about)
    assert "measured already" in capsys.readouterr().out
    assert server.key not in out.read_text()


def test_too_long_a_request_is_refused_in_one_line(server):
    with pytest.raises(HelpersError, match="prompt and answer have 130 tokens, and it takes 128 at most"):
        bench(server, None, 1, prompt_tokens=100, new_tokens=30)


def test_what_vllm_does_not_take_is_told_with_its_last_words(server, monkeypatch):
    monkeypatch.setattr(module._Run, "arguments", lambda run: ["--dataset-name", "nonsense"])
    with pytest.raises(HelpersError, match=r"vllm bench serve failed on qwen-7b: .*nonsense"):
        bench(server, None, 1, **SMALL)


def test_a_run_that_takes_too_long_is_ended(server, new_clients):
    with pytest.raises(HelpersError, match="it was not done within 1 s"):
        bench(server, 0.01, 100, timeout=1, **SMALL)
    assert new_clients() == []


def test_an_interrupt_ends_the_client_and_the_key_is_in_no_command(server, new_clients):
    seen = []

    def press():
        end = time.monotonic() + 300
        while not new_clients() and time.monotonic() < end:
            time.sleep(0.1)
        seen.extend(new_clients())
        commands = [" ".join(each.cmdline()) for each in seen]
        seen.append(server.key in " ".join(commands))
        _thread.interrupt_main()

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        bench(server, 0.01, 100, **SMALL)
    thread.join()
    assert len(seen) == 2 and seen[1] is False
    assert new_clients() == [] and not seen[0].is_running()


@pytest.mark.usefixtures("only_one")
def test_requests_that_fail_are_counted_and_refused(server, monkeypatch):
    monkeypatch.setattr(server, "model", "qwen-8b")
    with pytest.raises(HelpersError, match=r"3 of 3 requests to qwen-8b failed: the first with .*(404|Not Found)"):
        bench(server, None, 3, **SMALL)


def test_a_server_that_is_gone_is_told(server):
    server.stop()
    with pytest.raises(HelpersError, match=r"cannot bench Server\(.*stopped\): it does not answer"):
        bench(server, None, 1, **SMALL)
