"""The dashboard for Grafana: a whole file, and no panel that asks for what vLLM does not say.

The slow part starts vLLM once. Prometheus answers a name that nobody has with nothing, so a wrong one would not show.
"""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path

import pytest

import helpers.serving
from helpers import serve

DASHBOARD = json.loads((Path(helpers.serving.__file__).parent / "dashboard.json").read_text(encoding="utf-8"))
PANELS = DASHBOARD["panels"]
TARGETS = [target for panel in PANELS for target in panel["targets"]]
METRIC = re.compile(r"vllm:\w+")
SUFFIXES = ("_total", "_bucket")
WIDTH = 24
"""Columns of Grafana's grid."""


def metrics(text):
    """Return the names that a query asks for."""
    return set(METRIC.findall(text))


EXPRESSIONS = [target["expr"] for target in TARGETS]
VARIABLE = next(each for each in DASHBOARD["templating"]["list"] if each["name"] == "model")
WANTED = set().union(*(metrics(text) for text in [*EXPRESSIONS, VARIABLE["query"]["query"]]))


def test_panels_have_places_of_their_own():
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    assert len({panel["title"] for panel in PANELS}) == len(PANELS) > 5
    places = [panel["gridPos"] for panel in PANELS]
    assert all(at["x"] >= 0 and at["x"] + at["w"] <= WIDTH for at in places)
    for one, other in combinations(places, 2):
        apart = [one[a] + one[size] <= other[a] or other[a] + other[size] <= one[a] for a, size in ("xw", "yh")]
        assert any(apart), (one, other)


def test_panels_say_what_they_show_and_in_which_unit():
    for panel in PANELS:
        assert panel["description"] and panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"])
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_nothing_is_tied_to_one_grafana():
    """An id, or a data source by its own name, would hold where the dashboard was exported."""
    assert DASHBOARD.get("id") is None
    sources = [each["datasource"]["uid"] for each in [*PANELS, *TARGETS, VARIABLE]]
    assert set(sources) == {"${datasource}"}
    names = {each["name"] for each in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps([EXPRESSIONS, sources])))
    assert used - {"__rate_interval"} == names


@pytest.mark.parametrize("expr", EXPRESSIONS)
def test_queries_are_whole_and_read_each_kind_as_it_is_meant(expr):
    assert all(expr.count(opened) == expr.count(closed) for opened, closed in ("()", "{}", "[]"))
    assert metrics(expr), expr
    for name in metrics(expr):
        assert f'{name}{{model_name=~"$model"}}' in expr, "a panel must follow the choice of a model"
        counts_up = name.endswith(SUFFIXES)
        assert counts_up == (f'rate({name}{{model_name=~"$model"}}[$__rate_interval])' in expr), name
        if name.endswith("_bucket"):
            assert "histogram_quantile(" in expr and "by (le)" in expr


@pytest.fixture(scope="module")
def samples():
    pytest.importorskip("vllm")
    with serve("qwen-7b", max_model_len=256, timeout=1500) as server:
        server.client(timeout=300).completions.create(model="qwen-7b", prompt="床前", max_tokens=4)
        yield server.metrics()


def test_a_running_server_says_all_that_is_asked_for(samples):
    assert sorted(WANTED - set(samples["name"])) == []


def test_it_says_it_of_a_model_and_the_histograms_have_buckets(samples):
    for name in WANTED:
        labels = samples.loc[samples["name"] == name, "labels"]
        assert {each["model_name"] for each in labels} == {"qwen-7b"}, name
        if name.endswith("_bucket"):
            assert len(labels) > 5 and "+Inf" in {each["le"] for each in labels}, name


def test_the_names_given_in_legends_are_labels(samples):
    for target in TARGETS:
        for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
            (name,) = metrics(target["expr"])
            assert all(label in each for each in samples.loc[samples["name"] == name, "labels"]), (name, label)


def test_the_names_of_old_dashboards_would_be_found_out(samples):
    """They were vLLM's once: github.com/vllm-project/production-stack/pull/989."""
    old = {"vllm:gpu_cache_usage_perc", "vllm:time_per_output_token_seconds_bucket", "vllm:num_requests_swapped"}
    assert old.isdisjoint(samples["name"])
