"""The simulated queue against what is known in closed form, its limits, and its errors."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest

from helpers import HelpersError, catalog, estimate
from helpers.catalog.measured import MeasuredRow
from helpers.serving import capacity
from helpers.serving.capacity import Engine, Workload, engine_on, replicas_needed, simulate, workload

STEP, TOKENS = 0.002, 500
SERVICE = STEP * TOKENS
"""Seconds of an answer of ``TOKENS`` by an engine whose steps all take ``STEP``."""


def slots(count, **more):
    """Return an engine that reads prompts in no time and writes at one speed whatever its batch."""
    return Engine({1: STEP, count + 1: STEP}, 1e12, count, 10**9, **more)


def poisson(rate, requests, seed=1):
    """Return that many equal requests, on average."""
    return workload(rate, requests / rate, 1, TOKENS, spread=0, seed=seed)


def exponential(work, seed=2):
    """Return the requests with exponential answers of the same mean."""
    drawn = np.random.default_rng(seed).exponential(TOKENS, len(work.arrival))
    return replace(work, new_tokens=np.maximum(1, np.rint(drawn)).astype(int))


def waits(engine, work, replicas=1, routing="round-robin"):
    """Return how long each request waits before the step that reads its prompt; no shorter than nothing."""
    found = simulate(engine, work, replicas, routing).ttft - STEP
    assert found.min() > -1e-9
    return found


def at(*arrivals, prompt=1, new=TOKENS):
    """Return requests that come at these seconds."""
    lengths = (np.broadcast_to(tokens, len(arrivals)).astype(int) for tokens in (prompt, new))
    return Workload(np.array(arrivals, float), *lengths)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_place_and_equal_answers_wait_as_in_m_d_1(load):
    """Pollaczek and Khinchine: the mean wait is load / (2 (1 - load)) services."""
    outcome = simulate(slots(1), poisson(load / SERVICE, 100_000))
    assert outcome.ttft.mean() - STEP == pytest.approx(SERVICE * load / 2 / (1 - load), rel=0.06)
    assert outcome.utilisation[0] == pytest.approx(load, rel=0.02)
    assert outcome.sequences[0] == pytest.approx(1)


@pytest.mark.parametrize("places,load", [(1, 0.6), (4, 0.7), (8, 0.7)])
def test_exponential_answers_wait_as_in_m_m_c(places, load):
    """Erlang's C is the share that waits, and the mean wait is C service / (places (1 - load))."""
    offered = places * load
    alone = sum(offered**count / math.factorial(count) for count in range(places))
    full = offered**places / math.factorial(places) / (1 - load)
    wait = full / (alone + full) * SERVICE / places / (1 - load)
    rate = offered / SERVICE
    found = [waits(slots(places), exponential(poisson(rate, 50_000, seed), seed + 10)).mean() for seed in (1, 2, 3)]
    assert np.mean(found) == pytest.approx(wait, rel=0.06, abs=STEP)  # who comes during a step joins at the next


def test_places_for_everybody_leave_no_wait():
    found = waits(slots(1000), poisson(20 / SERVICE, 5000))
    assert found.max() <= STEP + 1e-9  # at most for the step under way
    assert waits(slots(1), at(0, SERVICE, 2 * SERVICE)).max() == pytest.approx(0, abs=1e-9)


def test_times_of_a_request_alone():
    engine = Engine({1: 0.01, 4: 0.04}, 1000, 4, 10**6, overhead=0.5)
    outcome = simulate(engine, at(3.0, prompt=200, new=11))
    assert outcome.ttft == pytest.approx([0.5 + 0.2 + 0.01])
    assert outcome.tpot == pytest.approx([0.01])
    assert outcome.e2e == pytest.approx([0.5 + 0.2 + 0.11])
    assert outcome.utilisation == pytest.approx([0.31 / 3.31])


def test_a_prompt_holds_up_those_that_write():
    engine = Engine({1: 0.01, 2: 0.02}, 1000, 2, 10**6)
    outcome = simulate(engine, at(0, 0.045, prompt=[1, 500], new=[11, 2]))
    # 5 steps alone (the first reads a token), one that reads 500 tokens for two, one of two, four alone
    assert outcome.ttft == pytest.approx([0.011, 0.051 + 0.52 - 0.045])
    assert outcome.e2e == pytest.approx([0.051 + 0.52 + 0.02 + 0.04, 0.051 + 0.52 + 0.02 - 0.045])


def test_equal_steps_taken_in_one_go_are_as_if_taken_one_by_one():
    """A second replica makes the first one advance at every arrival; round-robin leaves it alone in between."""
    work = workload(8, 60, 20, 40, 0.8, 200, seed=4)
    engine = Engine({1: 0.01, 4: 0.02}, 5000, 4, 10**6)
    in_one_go = simulate(engine, work)
    often = capacity._Replica(engine, work)
    for request, now in enumerate(work.arrival):
        for moment in np.linspace(often.clock, now, 7):
            often.advance(moment)
        often.add(request, now)
    often.advance(math.inf)
    assert often.last - work.arrival == pytest.approx(in_one_go.e2e)


def test_replicas_asked_only_when_their_load_may_have_changed_are_as_if_asked_each_time(monkeypatch):
    work = workload(30, 60, 200, 40, 1.0, 1000, seed=5)  # some answers are one token, and the cache fills up
    engine = Engine({1: 0.01, 16: 0.03}, 2e4, 16, 3000)
    now_and_then = simulate(engine, work, 3, "least-loaded")
    monkeypatch.setattr(capacity._Replica, "due", lambda replica: -math.inf)
    each_time = simulate(engine, work, 3, "least-loaded")
    for name in ("ttft", "e2e", "utilisation", "sequences"):
        assert getattr(now_and_then, name) == pytest.approx(getattr(each_time, name)), name


def test_kv_cache_is_never_overdrawn(monkeypatch):
    most, let_in = [], capacity._Replica._let_in

    def watched(replica):
        found = let_in(replica)
        assert replica.kv == sum(replica.prompt[one] + replica.answer[one] for _, one in replica.running)
        most.append(replica.kv)
        return found

    monkeypatch.setattr(capacity._Replica, "_let_in", watched)
    work = workload(20, 60, 200, 50, 1.0, 1000, seed=3)
    engine = Engine({1: 0.01, 64: 0.02}, 1e5, 64, 1500)
    tight = simulate(engine, work)
    assert 1000 < max(most) <= 1500
    assert simulate(replace(engine, kv_tokens=10**6), work).ttft.mean() < tight.ttft.mean()


def test_batch_and_prompts_of_a_step_are_limited():
    engine = Engine({1: 0.01, 8: 0.01}, 1000, 3, 10**6, step_tokens=100)
    crowd = simulate(engine, at(0, 0, 0, 0, prompt=60, new=10))
    assert sorted(crowd.ttft) == pytest.approx([0.07, 0.14, 0.21, 0.07 + 0.07 * 2 + 0.01 * 7 + 0.07])
    assert simulate(engine, at(0, prompt=500, new=1)).ttft == pytest.approx([0.51])  # longer than a step: alone in one


def test_first_come_first_served():
    outcome = simulate(slots(2), exponential(poisson(1.9 / SERVICE, 2000)))
    arrival = poisson(1.9 / SERVICE, 2000).arrival
    assert (np.diff(arrival + outcome.ttft) > -1e-9).all()


@pytest.mark.parametrize("routing", capacity.ROUTING)
def test_more_replicas_and_fewer_requests_wait_less(routing):
    engine = Engine({1: 0.01, 4: 0.02}, 5000, 4, 10**6)
    by_rate = [
        simulate(engine, workload(rate, 400, 50, 50, seed=5), 2, routing).quantile("ttft", 0.9) for rate in (2, 4, 6, 8)
    ]
    assert by_rate == sorted(by_rate) and by_rate[-1] > 2 * by_rate[0]
    work = workload(8, 400, 50, 50, seed=5)
    by_replicas = [simulate(engine, work, count, routing).quantile("ttft", 0.9) for count in (1, 2, 3, 6)]
    assert by_replicas == sorted(by_replicas, reverse=True) and by_replicas[0] > 2 * by_replicas[-1]


def test_each_in_turn_is_as_many_queues_and_the_least_loaded_is_better():
    work = exponential(poisson(3 * 0.8 / SERVICE, 20_000))
    third = Workload(work.arrival[::3], work.prompt_tokens[::3], work.new_tokens[::3])
    in_turn = waits(slots(1), work, 3)
    assert in_turn[::3] == pytest.approx(waits(slots(1), third))
    assert waits(slots(1), work, 3, "least-loaded").mean() < 0.6 * in_turn.mean()


def test_a_seed_draws_the_same_requests_and_another_seed_others():
    first, again, other = (workload(5, 50, 100, 50, seed=seed) for seed in (7, 7, 8))
    for name in ("arrival", "prompt_tokens", "new_tokens"):
        assert (getattr(first, name) == getattr(again, name)).all()
    assert first.arrival[0] != other.arrival[0]
    engine = Engine({1: 0.01, 8: 0.02}, 5000, 8, 10**6)
    assert (simulate(engine, first, 2).e2e == simulate(engine, again, 2).e2e).all()


def test_drawn_requests_have_the_rate_and_the_lengths_asked_for():
    work = workload(20, 5000, 500, 100, 0.5, 100_000, seed=6)
    assert len(work.arrival) == pytest.approx(100_000, rel=0.01)
    gaps = np.diff(work.arrival)
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.01) and gaps.std() == pytest.approx(1 / 20, rel=0.02)
    assert work.prompt_tokens.mean() == pytest.approx(500, rel=0.01)
    assert work.new_tokens.std() == pytest.approx(50, rel=0.03)
    cut = workload(20, 100, 500, 100, 2.0, 600)
    assert cut.prompt_tokens.max() == 300 and cut.new_tokens.min() >= 1
    assert (workload(1, 1e-6, 10, 10).new_tokens > 0).sum() == 1  # at least one request


def test_answers_of_one_token_have_no_tpot():
    outcome = simulate(slots(2), at(0, 0, new=[1, 5]))
    assert math.isnan(outcome.tpot[0]) and outcome.quantile("tpot", 0.99) == pytest.approx(STEP)
    assert replicas_needed(slots(2), at(0, 1, new=1), ttft=1, tpot=1)[0] == 1


@pytest.mark.parametrize("objective", [{"ttft": 0.2, "tpot": 1.0}, {"ttft": 100.0, "tpot": 0.012}])
def test_replicas_needed_is_the_smallest_number(objective):
    engine, work = Engine({1: 0.01, 8: 0.02}, 5000, 8, 10**6), workload(20, 100, 50, 80, seed=9)

    def meets(count):
        outcome = simulate(engine, work, count, "least-loaded")
        return all(outcome.quantile(name, 0.99) <= most for name, most in objective.items())

    found, outcome = replicas_needed(engine, work, **objective)
    assert found > 2 and len(outcome.utilisation) == found
    assert meets(found) and not any(meets(count) for count in range(1, found))


GOOD = {"step_seconds": {1: 0.01, 4: 0.02}, "prefill_tokens_per_s": 1000.0, "max_num_seqs": 4, "kv_tokens": 1000}


@pytest.mark.parametrize(
    "change,said",
    [
        ({"step_seconds": {1: 0.01, 4: 0.0}}, "step_seconds[4] is 0.0"),
        ({"step_seconds": {1: math.nan, 4: 0.1}}, "step_seconds[1] is nan"),
        ({"step_seconds": {}}, "steps are known up to 0 sequences"),
        ({"max_num_seqs": 5}, "max_num_seqs is 5, and steps are known up to 4 sequences"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_num_seqs": 2.5}, "Give max_num_seqs as a whole number above 0"),
        ({"prefill_tokens_per_s": -1}, "prefill_tokens_per_s is -1"),
        ({"kv_tokens": "many"}, "kv_tokens is 'many'"),
        ({"overhead": -0.1}, "Give overhead as a number from 0 on"),
        ({"step_tokens": 0}, "step_tokens is 0"),
    ],
)
def test_an_engine_that_cannot_be_is_refused_in_one_line(change, said):
    assert Engine(**GOOD).requests_per_s(10, 10) > 0
    with pytest.raises(HelpersError) as error:
        Engine(**(GOOD | change))
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change,said",
    [
        ({"requests_per_s": 0}, "requests_per_s is 0"),
        ({"seconds": math.inf}, "seconds is inf"),
        ({"prompt_tokens": -5}, "prompt_tokens is -5"),
        ({"new_tokens": 0}, "new_tokens is 0"),
        ({"spread": -1}, "spread is -1"),
        ({"longest": 0}, "longest is 0"),
    ],
)
def test_a_load_that_cannot_be_is_refused_in_one_line(change, said):
    with pytest.raises(HelpersError) as error:
        workload(**({"requests_per_s": 1, "seconds": 10, "prompt_tokens": 10, "new_tokens": 10} | change))
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "call,said",
    [
        (lambda engine, work: simulate(engine, work, 0), "replicas is 0"),
        (lambda engine, work: simulate(engine, work, 1.5), "replicas is 1.5"),
        (lambda engine, work: simulate(engine, work, 2, "random"), "Valid: round-robin, least-loaded"),
        (lambda engine, work: simulate(engine, at()), "requests is 0"),
        (lambda engine, work: simulate(engine, at(0, new=5000)), "5,001 tokens, the KV cache room for 1,000"),
        (lambda engine, work: simulate(engine, work).quantile("itl", 0.5), "Valid: ttft, tpot, e2e"),
        (lambda engine, work: replicas_needed(engine, work, 0, 1), "ttft is 0"),
        (lambda engine, work: replicas_needed(engine, work, 1, 1, share=1.0), "share is 1.0"),
        (lambda engine, work: replicas_needed(engine, work, 0.01, 1), "a request alone has a TTFT of"),
        (lambda engine, work: replicas_needed(engine, work, 1, 0.005), "a request alone has a TPOT of 0.01 s"),
        (lambda engine, work: replicas_needed(engine, work, 0.15, 1, most=2), "2 do not meet the objective"),
        (lambda engine, work: engine.requests_per_s(0, 1), "prompt_tokens is 0"),
        (lambda engine, work: engine_on("t5", "qwen-7b"), "unknown GPU 't5'"),
        (lambda engine, work: engine_on("t4", "qwen"), "unknown model 'qwen'"),
        (lambda engine, work: engine_on("t4", "qwen-7b"), "qwen-7b in fp16 does not fit on t4"),
        (lambda engine, work: engine_on("t4", "qwen-7b", "gptq-int4", places=0), "places is 0"),
    ],
)
def test_wrong_questions_are_answered_in_one_line(call, said):
    with pytest.raises(HelpersError) as error:
        call(Engine(**GOOD), workload(20, 30, 100, 20, 0.5, 200))
    assert said in str(error.value) and "\n" not in str(error.value)


def row(name, value, batch=None, **more):
    """Return a row as `python -m helpers measure --engine vllm` writes them."""
    about = {"model": "qwen-7b", "weights": "random", "precision": "bf16", "engine": "vllm", "decoding": None}
    lengths = {"prompt_tokens": 128, "new_tokens": 128} if batch else {"prompt_tokens": None, "new_tokens": None}
    where = {"device": "NVIDIA H100 80GB HBM3", "driver": "580", "versions": {"vllm": "0"}, "date": "2026-11-26"}
    unit = "tokens" if name == "kv_tokens" else "s"
    given = {"name": name, "value": value, "unit": unit, "definition": "test", "batch": batch, "notebook": "test"}
    return MeasuredRow.model_validate(given | about | lengths | where | more)


@pytest.fixture
def rows(monkeypatch):
    """Let the catalogue hold these rows instead of its own."""
    held = []
    monkeypatch.setattr(import_module("helpers.catalog.measured"), "_catalogue", lambda: held)
    return held


def test_a_card_without_recorded_rows_is_predicted(rows):
    engine, source = engine_on("h100-sxm", "qwen-7b", places=100)
    run = estimate("qwen-7b", "bf16", "vllm", 64, 768, "h100-sxm", prompt_tokens=512)
    assert source == "predicted" and max(engine.step_seconds) == engine.max_num_seqs == 100
    assert engine.step_seconds[64] == pytest.approx(64 / run.decode_tokens_per_s)
    assert engine.kv_tokens == run.kv_tokens and engine.prefill_tokens_per_s > 1000


def test_recorded_rows_are_taken_and_fitted_to_the_length(rows):
    times = {1: 0.007, 8: 0.008, 32: 0.009}
    rows += [row("tpot", seconds, batch) for batch, seconds in times.items()]
    rows += [row("ttft", 0.02, 1), row("ttft", 0.12, 32), row("kv_tokens", 111_111)]
    rows += [row("tpot", 9.0, 8, parallel="tp2"), row("tpot", 9.0, 8, precision="fp8")]  # other things
    rows += [row("tpot", 9.0, 8, device="NVIDIA H200")]
    engine, source = engine_on("h100-sxm", "qwen-7b", prompt_tokens=128, new_tokens=128)
    assert (source, engine.max_num_seqs, engine.kv_tokens) == ("recorded", 32, 111_111)
    assert engine.step_seconds == pytest.approx(times)  # the recorded length itself
    assert engine.prefill_tokens_per_s == pytest.approx(31 * 128 / 0.1)
    longer = engine_on("h100-sxm", "qwen-7b", prompt_tokens=2000, new_tokens=500)[0].step_seconds
    assert 1 < longer[1] / times[1] < longer[32] / times[32] < 10  # reads more KV cache, the more the more sequences
    assert engine_on("h100-sxm", "qwen-7b", "fp8")[1] == "predicted"  # one row is no line


def test_rows_of_this_repository_are_taken_where_there_are_any():
    for model in catalog.models():
        recorded = catalog.measured(name="tpot", engine="vllm", model=model, prompt_tokens=128, parallel=[None])
        recorded = [row for row in recorded if row.device == "NVIDIA H100 80GB HBM3" and row.weights == "random"]
        if len({row.batch for row in recorded if row.precision == catalog.model(model).dtype}) > 1:
            assert engine_on("h100-sxm", model)[1] == "recorded"


def test_int8_writes_as_slowly_alone_as_in_a_crowd():
    engine, source = engine_on("h100-sxm", "qwen-7b", "int8")
    assert source == "recorded" and sorted(engine.step_seconds) == [1, 32] and engine.max_num_seqs == 32
    assert engine.step_seconds[32] < 1.2 * engine.step_seconds[1]
