"""What a server says about itself: one reading, or one every half second while something happens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from ..errors import unknown

if TYPE_CHECKING:
    from pandas import DataFrame

PREFIX = "vllm:"


def parse(text: str) -> DataFrame:
    """Read the text format of Prometheus.

    Args:
        text: the answer of /metrics.

    Returns:
        A row for each sample, with ``name`` (e.g. ``"vllm:num_requests_running"``), ``labels`` (a dict) and ``value``.
    """
    from pandas import DataFrame
    from prometheus_client.parser import text_string_to_metric_families

    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return DataFrame([(sample.name, sample.labels, sample.value) for sample in samples], columns=COLUMNS)


COLUMNS = ["name", "labels", "value"]


def total(samples: DataFrame, name: str) -> float:
    """Add up the samples of a name over its labels (finish reasons, engines).

    Args:
        samples: as ``parse`` returns them.
        name: with or without vLLM's prefix, e.g. ``"num_requests_running"``.

    Raises:
        HelpersError: there is no such metric; names the near misses and every one.
    """
    known = sorted(set(samples["name"]))
    full = name if name in known else PREFIX + name
    if full not in known:
        valid = [each.removeprefix(PREFIX) for each in known if each.startswith(PREFIX)]
        raise unknown("metric", name, valid)
    return float(samples.loc[samples["name"] == full, "value"].sum())


class Watch:
    """Reads a few metrics in a thread while the block runs; afterwards ``frame`` holds them.

        with server.watch("num_requests_running", "kv_cache_usage_perc") as watched:
            ...
        watched.frame.plot()

    Made by ``Server.watch``.
    """

    def __init__(self, read: Callable[[], DataFrame], names: tuple[str, ...], interval: float) -> None:
        self.names, self.interval = names, interval
        self._read = read
        self._rows: list[dict[str, float]] = []
        self._start = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch-metrics", daemon=True)
        self._take()  # a wrong name is told at once, and here

    @property
    def frame(self) -> DataFrame:
        """A column for each name and a row for each reading so far; the index is seconds since the start."""
        from pandas import DataFrame

        return DataFrame(list(self._rows), columns=["seconds", *self.names]).set_index("seconds")

    def stop(self) -> DataFrame:
        """Take a last reading, end the thread and return ``frame``; a second call only returns it."""
        if not self._ended.is_set():
            self._ended.set()
            if self._thread.ident:
                self._thread.join()
            self._try()
        return self.frame

    def __enter__(self) -> Self:
        """Start to watch."""
        self._rows.clear()
        self._start = time.monotonic()
        self._take()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()

    def _run(self) -> None:
        while not self._ended.wait(self.interval):
            self._try()

    def _try(self) -> None:
        """Take a reading; a server that has just been stopped or is too busy to answer leaves a gap."""
        from httpx import HTTPError

        with suppress(HTTPError):
            self._take()

    def _take(self) -> None:
        samples, seconds = self._read(), time.monotonic() - self._start
        self._rows.append({"seconds": seconds} | {name: total(samples, name) for name in self.names})
