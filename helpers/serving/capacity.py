"""How many replicas a load needs: requests that queue for engines which batch continuously, simulated.

A replica is vLLM seen from outside: a queue, first come first served, and a batch that is made anew for every step.
What a step takes is measured beforehand; what follows from it is counted here, event by event. Nothing is loaded.

Sources: batching by the step, with the prompts of new requests read in the step of those that write: G.-I. Yu et al.,
Orca, OSDI 2022; vLLM's queue and KV cache: W. Kwon et al., https://arxiv.org/abs/2309.06180; simulating engines to size
a service: A. Agrawal et al., Vidur, https://arxiv.org/abs/2405.05465; queueing: M. Harchol-Balter, Performance Modeling
and Design of Computer Systems, 2013.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .. import catalog
from ..catalog.gpus import find_gpu
from ..errors import HelpersError, unknown

ROUTING = ["round-robin", "least-loaded"]
"""Who gets the next request: each in turn, or the one with the fewest requests in its queue and batch."""


@dataclass(frozen=True)
class Engine:
    """What one replica does.

    Attributes:
        step_seconds: sequences in the batch -> seconds of a step that writes a token for each (the TPOT at that batch);
            a straight line between two points.
        prefill_tokens_per_s: prompt tokens read a second; a step takes so much longer for those it reads.
        max_num_seqs, kv_tokens: most sequences in a step, and tokens the KV cache has room for. Prompt and answer are
            set aside together when a request is let in.
        step_tokens: prompt tokens that a step reads at most, but always one prompt (vLLM: max_num_batched_tokens).
        overhead: seconds of each request outside the engine (HTTP, tokenizer); they take nobody's place.

    Raises:
        HelpersError: a number that cannot be, or more sequences than steps are known with.
    """

    step_seconds: Mapping[int, float]
    prefill_tokens_per_s: float
    max_num_seqs: int
    kv_tokens: int
    step_tokens: int = 8192
    overhead: float = 0.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        points = {f"step_seconds[{batch}]": seconds for batch, seconds in self.step_seconds.items()}
        _positive(prefill_tokens_per_s=self.prefill_tokens_per_s, **points)
        _positive(whole=True, **{name: getattr(self, name) for name in ("max_num_seqs", "kv_tokens", "step_tokens")})
        _positive(zero=True, overhead=self.overhead)
        if self.max_num_seqs > (most := max(self.step_seconds, default=0)):
            why = f"max_num_seqs is {self.max_num_seqs}, and steps are known up to {most} sequences"
            raise HelpersError("cannot simulate", why, "lower it, or measure a step with as many")

    @cached_property
    def steps(self) -> list[float]:
        """Seconds of a step that reads no prompt, by its sequences from 0 to ``max_num_seqs``."""
        batches = sorted(self.step_seconds)
        seconds = [self.step_seconds[batch] for batch in batches]
        return np.interp(range(self.max_num_seqs + 1), batches, seconds).tolist()

    def requests_per_s(self, prompt_tokens: float, new_tokens: float) -> float:
        """Return how many requests of this (mean) length one replica completes a second when its batch is full."""
        _positive(prompt_tokens=prompt_tokens, new_tokens=new_tokens)
        batch = max(1, min(self.max_num_seqs, int(self.kv_tokens / (prompt_tokens + new_tokens))))
        return 1 / (new_tokens * self.steps[batch] / batch + prompt_tokens / self.prefill_tokens_per_s)


@dataclass(frozen=True)
class Workload:
    """Requests in order of arrival: seconds, and tokens of prompt and answer; arrays of one length."""

    arrival: np.ndarray
    prompt_tokens: np.ndarray
    new_tokens: np.ndarray


def workload(
    requests_per_s: float,
    seconds: float,
    prompt_tokens: float,
    new_tokens: float,
    spread: float = 1.0,
    longest: int = 4096,
    seed: int = 0,
) -> Workload:
    """Draw requests: Poisson arrivals at a rate, lengths log-normal.

    Args:
        requests_per_s, seconds: rate, and how long it lasts.
        prompt_tokens, new_tokens: means, in tokens.
        spread: standard deviation of a length by its mean; 0 makes all alike.
        longest: prompts and answers are cut to half of it each, so that no request is longer than this.
        seed: the same seed draws the same requests.

    Raises:
        HelpersError: a number that cannot be.
    """
    numbers = {"requests_per_s": requests_per_s, "seconds": seconds, "longest": longest}
    _positive(**numbers, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    _positive(zero=True, spread=spread)
    draw = np.random.default_rng(seed)
    gaps = draw.exponential(1 / requests_per_s, max(1, draw.poisson(requests_per_s * seconds)))
    sigma = math.sqrt(math.log1p(spread**2))
    lengths = [draw.lognormal(math.log(mean) - sigma**2 / 2, sigma, len(gaps)) for mean in (prompt_tokens, new_tokens)]
    return Workload(
        np.cumsum(gaps), *(np.clip(np.rint(tokens), 1, max(1, longest // 2)).astype(int) for tokens in lengths)
    )


@dataclass(frozen=True)
class Outcome:
    """What became of the requests.

    Attributes:
        ttft, tpot, e2e: seconds to the first token, for each token after it, and to the last; arrays of one value a
            request. TPOT of an answer of one token is nan.
        utilisation: share of the time to the last token in which a replica was at work; one value a replica.
        sequences: mean number of sequences in the batch while a replica was at work; one value a replica.
    """

    ttft: np.ndarray
    tpot: np.ndarray
    e2e: np.ndarray
    utilisation: np.ndarray
    sequences: np.ndarray

    def quantile(self, name: str, share: float) -> float:
        """Return the seconds that ``share`` of the requests kept within; ``name`` is ttft, tpot or e2e.

        Raises:
            HelpersError: there is no such time.
        """
        if name not in ("ttft", "tpot", "e2e"):
            raise unknown("time of a request", name, ["ttft", "tpot", "e2e"])
        known = getattr(self, name)[~np.isnan(getattr(self, name))]
        return float(np.quantile(known, share)) if len(known) else math.nan


def simulate(engine: Engine, work: Workload, replicas: int = 1, routing: str = "round-robin") -> Outcome:
    """Send the requests to so many replicas, and return when each was answered.

    Raises:
        HelpersError: no replica, an unknown routing, no requests, or one that is longer than the KV cache.
    """
    _positive(whole=True, replicas=replicas, requests=len(work.arrival))
    if routing not in ROUTING:
        raise unknown("routing", routing, ROUTING)
    if (longest := int((work.prompt_tokens + work.new_tokens).max())) > engine.kv_tokens:
        why = f"its longest request has {longest:,} tokens, the KV cache room for {engine.kv_tokens:,}"
        raise HelpersError("cannot simulate this workload", why, "take shorter requests, or a card with more memory")
    answering = [_Replica(engine, work) for _ in range(replicas)]
    chosen = np.arange(len(work.arrival)) % replicas
    loads, due = [0] * replicas, [math.inf] * replicas
    for request, now in enumerate(work.arrival.tolist()):
        if routing == "least-loaded":
            for one in range(replicas):
                if due[one] < now:  # before that its load stays, and it need not be asked
                    answering[one].advance(now)
                    loads[one], due[one] = answering[one].load(), answering[one].due()
            chosen[request] = min(range(replicas), key=loads.__getitem__)
        each = answering[chosen[request]]
        each.add(request, now)
        loads[chosen[request]], due[chosen[request]] = each.load(), each.due()
    for each in answering:
        each.advance(math.inf)
    first, last = (sum(getattr(each, name) for each in answering) for name in ("first", "last"))  # 0 where not its own
    sent = work.arrival - engine.overhead
    busy, written = (np.array([getattr(each, name) for each in answering]) for name in ("busy", "written"))
    after = np.where(work.new_tokens > 1, work.new_tokens - 1, np.nan)
    share, sequences = busy / last.max(), written / np.maximum(busy, 1e-12)
    return Outcome(first - sent, (last - first) / after, last - sent, share, sequences)


class _Replica:
    """Queue and batch of one engine. Times are seconds; ``clock`` is the end of its last step."""

    def __init__(self, engine: Engine, work: Workload) -> None:
        self.engine = engine
        self.prompt, self.answer = work.prompt_tokens.tolist(), work.new_tokens.tolist()
        self.waiting: deque[int] = deque()
        self.running: list[tuple[int, int]] = []  # heap of (step after which a request is done, request)
        self.clock, self.steps, self.kv = 0.0, 0, 0
        self.busy, self.written = 0.0, 0.0
        self.first, self.last = np.zeros((2, len(self.answer)))

    def load(self) -> int:
        """Count the requests in queue and batch."""
        return len(self.waiting) + len(self.running)

    def due(self) -> float:
        """Return when the next step begins that may end a request."""
        if self.waiting and self._has_room():  # for one that may be done at once
            return self.clock
        if not self.running:
            return math.inf
        return self.clock + (self.running[0][0] - self.steps - 1) * self.engine.steps[len(self.running)]

    def add(self, request: int, now: float) -> None:
        """Queue a request; one that comes during a step waits for its end."""
        self.advance(now)
        if not self.load():
            self.clock = max(self.clock, now)
        self.waiting.append(request)

    def advance(self, until: float) -> None:
        """Take every step that begins before ``until``; steps that are alike are taken in one go."""
        while self.clock < until and self.load():
            new, read = self._let_in()
            seconds = self.engine.steps[len(self.running)] + read / self.engine.prefill_tokens_per_s
            alike = 1
            if not new:  # nobody can join before somebody is done
                alike = self.running[0][0] - self.steps
                if until < math.inf:
                    alike = min(alike, math.ceil((until - self.clock) / seconds))
            self.steps += alike
            self.clock += alike * seconds
            self.busy += alike * seconds
            self.written += alike * seconds * len(self.running)
            for request in new:
                self.first[request] = self.clock
            while self.running and self.running[0][0] <= self.steps:
                request = heapq.heappop(self.running)[1]
                self.last[request] = self.clock
                self.kv -= self.prompt[request] + self.answer[request]

    def _let_in(self) -> tuple[list[int], int]:
        """Move requests from queue to batch while there is room; return them, and the tokens of their prompts."""
        new, read = [], 0
        while self.waiting and self._has_room():
            request = self.waiting[0]
            if new and read + self.prompt[request] > self.engine.step_tokens:
                break
            new.append(self.waiting.popleft())
            heapq.heappush(self.running, (self.steps + self.answer[request], request))
            self.kv += self.prompt[request] + self.answer[request]
            read += self.prompt[request]
        return new, read

    def _has_room(self) -> bool:
        """Tell whether there is a place, and room in the KV cache, for the first in the queue."""
        whole = self.prompt[self.waiting[0]] + self.answer[self.waiting[0]]
        return len(self.running) < self.engine.max_num_seqs and self.kv + whole <= self.engine.kv_tokens


def replicas_needed(
    engine: Engine,
    work: Workload,
    ttft: float,
    tpot: float,
    share: float = 0.99,
    routing: str = "least-loaded",
    most: int = 256,
) -> tuple[int, Outcome]:
    """Return the smallest number of replicas with which ``share`` of the requests keep within both times, and how.

    It is found by halving, which takes for granted that one replica more does no harm.

    Args:
        engine, work, routing: as ``simulate``.
        ttft, tpot: seconds.
        share: 0.99 for the p99.
        most: how many are tried.

    Raises:
        HelpersError: as ``simulate``; or no number is enough, as a request alone takes too long, or not so many.
    """
    _positive(ttft=ttft, tpot=tpot, share=share)
    _positive(whole=True, most=most)
    if share >= 1:
        raise HelpersError("cannot simulate", f"share is {share}", "give it below 1: 0.99 for the p99")
    read = float(np.quantile(work.prompt_tokens, share)) / engine.prefill_tokens_per_s
    for name, alone, wanted in (
        ("TTFT", engine.overhead + engine.steps[1] + read, ttft),
        ("TPOT", engine.steps[1], tpot),
    ):
        if alone > wanted:
            why = f"a request alone has a {name} of {alone:.3g} s, and {wanted:.3g} s is wanted"
            raise HelpersError("no number of replicas is enough", why, "take a faster card, or allow more time")

    def meets(outcome: Outcome) -> bool:
        return not (outcome.quantile("ttft", share) > ttft or outcome.quantile("tpot", share) > tpot)

    rate = len(work.arrival) / float(work.arrival[-1])
    busy = math.ceil(rate / engine.requests_per_s(work.prompt_tokens.mean(), work.new_tokens.mean()))
    low, high = 0, min(busy, most)
    while not meets(found := simulate(engine, work, high, routing)):
        if high == most:
            why = f"{most} do not meet the objective"
            raise HelpersError("cannot tell how many replicas", why, "raise most, or take a faster card")
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        outcome = simulate(engine, work, middle, routing)
        if meets(outcome):
            high, found = middle, outcome
        else:
            low = middle
    return high, found


BATCHES = [1, 8, 32, 64, 128, 256, 512, 1024]
"""Sequences in a step for which a predicted time is asked; between them, a straight line."""

RECORDED = {"prompt_tokens": 128, "new_tokens": 128}
"""Lengths of the recorded runs."""


def engine_on(
    gpu: str, model: str, precision: str = "auto", prompt_tokens: int = 512, new_tokens: int = 256, places: int = 256
) -> tuple[Engine, str]:
    """Return what vLLM does with a model on a card, and whether its steps were ``"recorded"`` or are ``"predicted"``.

    Recorded steps are those of ``RECORDED`` lengths; the estimator says how much longer they are at others.

    Args:
        gpu, model, precision: as ``estimate``.
        prompt_tokens, new_tokens: of a mean request.
        places: most sequences in a step (max_num_seqs); fewer where the recorded batches end before.

    Raises:
        HelpersError: an unknown name, a number that cannot be, or a model that does not fit on the card.
    """
    from ..memory.estimate import Estimate, estimate

    _positive(whole=True, prompt_tokens=prompt_tokens, new_tokens=new_tokens, places=places)
    if precision == "auto":
        precision = catalog.model(model).dtype if "bf16" in catalog.gpu(gpu).formats else "fp16"

    def run(batch: int, prompt_tokens: int = prompt_tokens, new_tokens: int = new_tokens) -> Estimate:
        lengths = {"context": prompt_tokens + new_tokens, "prompt_tokens": prompt_tokens}
        return estimate(model, precision, "vllm", batch, gpu=gpu, **lengths)

    def recorded(name: str, **lengths: int) -> dict[int | None, float]:
        about = {"name": name, "model": model, "precision": precision, "weights": ["random", "hub"], "engine": "vllm"}
        rows = catalog.measured(**about, requests_per_s=None, **lengths)
        return {row.batch: row.value for row in rows if (card := find_gpu(row.device)) and card.id == gpu}

    alone, tpot, ttft = run(1), recorded("tpot", **RECORDED), recorded("ttft", **RECORDED)
    if gpu not in alone.fits_on:
        why = "weights and one request are more than vLLM may take"
        raise HelpersError(f"{model} in {precision} does not fit on {gpu}", why, "take another card or precision")
    prefill, kv_tokens = alone.prefill_tokens_per_s, int(recorded("kv_tokens").get(None, alone.kv_tokens))
    fewest, most = min(ttft, default=0), max(ttft, default=0)
    if most > fewest and ttft[most] > ttft[fewest]:  # one token for each: what more of them take is reading prompts
        prefill = (most - fewest) * RECORDED["prompt_tokens"] / (ttft[most] - ttft[fewest])
    if len(tpot) > 1:
        longer = {batch: run(batch, **RECORDED).decode_tokens_per_s / run(batch).decode_tokens_per_s for batch in tpot}
        steps, source = {batch: tpot[batch] * longer[batch] for batch in tpot}, "recorded"
    else:
        batches = [*(batch for batch in BATCHES if batch < places), places]
        steps, source = {batch: batch / run(batch).decode_tokens_per_s for batch in batches}, "predicted"
    return Engine(steps, prefill, min(places, max(steps)), kv_tokens), source


def _positive(zero: bool = False, whole: bool = False, **numbers: float) -> None:
    """Refuse what is no (whole) number above 0, or from 0 on, naming it."""
    for name, value in numbers.items():
        good = isinstance(value, (int, float, np.number)) and math.isfinite(value)
        if not good or value < 0 or (value == 0 and not zero) or (whole and value != int(value)):
            wanted = f"a {'whole ' if whole else ''}number {'from 0 on' if zero else 'above 0'}"
            raise HelpersError("cannot simulate", f"{name} is {value!r}", f"give {name} as {wanted}")
