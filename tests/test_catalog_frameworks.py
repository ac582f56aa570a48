"""The framework catalogue: complete, fresh, and not to be broken without a word."""

from __future__ import annotations

import re
import shutil
import subprocess
from datetime import date, timedelta

import pytest

from helpers.catalog.frameworks import ABBREVIATIONS, FILE, framework, frameworks, read_frameworks, stale
from helpers.errors import HelpersError

SURVEY = [
    "transformers",
    "tgi",
    "llama.cpp",
    "text-generation-webui",
    "vllm",
    "tensorrt-llm",
    "jittorllms",
    "inferllm",
    "mnn-llm",
    "lmdeploy",
    "ctranslate2",
    "openllm",
    "mlc-llm",
    "lightllm",
    "airllm",
]


WITH_A_NOTEBOOK = ["transformers", "llama.cpp", "vllm", "mnn-llm", "lmdeploy", "ctranslate2", "airllm"]


def test_every_framework_is_there():
    assert list(frameworks()) == SURVEY


@pytest.mark.parametrize("row", frameworks().values(), ids=frameworks())
def test_every_row_has_a_source_and_a_date(row):
    assert row.sources
    assert all(source.checked <= date.today() for source in row.sources)
    assert row.last_release <= f"{date.today():%Y-%m}"
    if row.package:
        assert any("pypi.org" in source.url for source in row.sources), "its version has no source"


def test_no_row_is_stale():
    assert stale(date.today()) == [], "look the projects up again, then renew `checked`"


@pytest.mark.parametrize(
    ("id", "value", "in_setting"),
    [
        ("vllm", "24x", "one completion"),
        ("vllm", "3.5x", "three completions"),
        ("lmdeploy", "1.8x", "internlm2-20b"),
        ("mlc-llm", "1.4-2.5x", "Not found"),
        ("jittorllms", "40 %", "PyTorch"),
        ("jittorllms", "20 %", "not given"),
        ("jittorllms", "2 GB", "swapping"),
        ("airllm", "4 GB", "70B"),
    ],
)
def test_the_claims_of_the_survey_have_their_setting(id, value, in_setting):
    assert [claim for claim in framework(id).claims if claim.value == value and in_setting in claim.setting]


def test_a_claim_without_an_origin_says_so():
    nowhere = [claim for row in frameworks().values() for claim in row.claims if claim.source is None]
    assert [claim.value for claim in nowhere] == ["1.4-2.5x"]
    assert all("Not found" in claim.setting for claim in nowhere)


@pytest.mark.parametrize(
    ("id", "optimisations"),
    [
        ("transformers", "KV"),
        ("tgi", "TP CB FA PA"),
        ("vllm", "PA CB TP CK"),
        ("tensorrt-llm", "TP PP CB PA FMHA"),
        ("lmdeploy", "CB PA SF TP"),
        ("openllm", "CB"),
        ("lightllm", "AT CB FA TP TA"),
        ("airllm", "LW"),
        ("jittorllms", "ZC"),
    ],
)
def test_the_optimisations_of_the_survey_are_there(id, optimisations):
    assert set(optimisations.split()) <= set(framework(id).optimisations)


def test_every_abbreviation_is_used():
    assert set(ABBREVIATIONS) == {name for row in frameworks().values() for name in row.optimisations}


@pytest.mark.parametrize("id", ["tgi", "jittorllms", "inferllm", "openllm"])
def test_who_is_not_alive_names_a_living_successor(id):
    assert framework(id).status not in ("active", "slow")
    assert all(framework(other).status == "active" for other in framework(id).use_instead)


def test_an_unknown_id_lists_the_valid_ones():
    with pytest.raises(HelpersError, match="Did you mean vllm") as error:
        framework("vlllm")
    assert all(id in str(error.value) for id in SURVEY)


def test_who_has_no_notebook_has_a_recipe():
    assert [id for id, row in frameworks().items() if not row.recipe] == WITH_A_NOTEBOOK


RECIPES = {id: row.recipe for id, row in frameworks().items() if row.recipe}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_recipe_is_a_script_that_names_one_version(recipe):
    assert recipe.checked <= date.today()
    assert recipe.script.startswith(recipe.get.rstrip()) and recipe.script.endswith(
        recipe.start.rstrip().splitlines()[-1]
    )
    if bash := shutil.which("bash"):
        subprocess.run([bash, "-n"], input=recipe.script, text=True, check=True)
    assert ":latest" not in recipe.script
    assert not re.search("/(blob|tree)/(main|master)/", recipe.source), "its options may change under it"
    pinned = re.search(r"==\d|:v?\d[\d.]+ |--branch v\d|\b[0-9a-f]{40}\b", recipe.get)
    assert pinned or "not pinned" in recipe.get


def test_one_recipe_cannot_be_pinned():
    assert [id for id, recipe in RECIPES.items() if "not pinned" in recipe.get] == ["mlc-llm"]


def test_every_server_of_a_recipe_answers_this_machine_alone():
    servers = {id: recipe.listens for id, recipe in RECIPES.items() if framework(id).openai_api}
    assert [id for id, recipe in RECIPES.items() if recipe.listens] == list(servers)
    for id, listens in servers.items():
        assert listens.because.endswith("127.0.0.1") or listens.otherwise == "127.0.0.1", id
        assert not re.search("/(blob|tree)/(main|master)/", listens.source), id


NAMED = {
    "Llama": {"llama", "baichuan", "internlm2"},  # the converted class
    "Qwen2": {"qwen"},
    "LLaMA": {"llama"},  # the published checkpoint
    "ChatGLM": {"chatglm"},
    "Baichuan": {"baichuan"},
    "RWKV": {"rwkv"},
    "GGUF": set(framework("llama.cpp").models),
}


@pytest.mark.parametrize("id", RECIPES)
def test_a_recipe_takes_what_its_row_says(id):
    named = {family for word, families in NAMED.items() if word in RECIPES[id].takes for family in families}
    assert named == set(framework(id).models)


def test_the_catalogue_cannot_be_changed_by_its_users():
    frameworks().clear()
    assert frameworks()


def broken_copy(tmp_path, row, old, new):
    """Write frameworks.yaml with one replacement inside one row."""
    head, name, body = FILE.read_text(encoding="utf-8").partition(f"\n{row}:\n")
    assert old in body.split("\n\n")[0], "the test no longer breaks what it means to break"
    path = tmp_path / "frameworks.yaml"
    path.write_text(head + name + body.replace(old, new, 1), encoding="utf-8")
    return path


def test_a_row_unchecked_for_a_year_is_stale(tmp_path):
    today = date(2026, 12, 1)
    path = broken_copy(tmp_path, "openllm", "checked: 2026-11-24", "checked: 2025-11-30")
    assert stale(today, read_frameworks(path)) == [
        "openllm: https://pypi.org/project/openllm/ was last checked on 2025-11-30"
    ]
    assert stale(today - timedelta(days=1), read_frameworks(path)) == []


def test_a_recipe_unchecked_for_a_year_is_stale(tmp_path):
    path = broken_copy(tmp_path, "lightllm", "checked: 2026-11-26\n    ran", "checked: 2025-11-01\n    ran")
    (line,) = stale(date(2026, 11, 26), read_frameworks(path))
    assert line.startswith("lightllm: ") and line.endswith("api_cli.py was last checked on 2025-11-01")


@pytest.mark.parametrize(
    ("row", "old", "new", "complaint"),
    [
        ("vllm", "[PA, CB,", "[PA, XX,", "optimisations: 'XX' is not in ABBREVIATIONS"),
        ("vllm", "licence: Apache-2.0", "licence: free", "licence: Input should be 'Apache-2.0'"),
        ("vllm", "status: active", "status: alive", "status: Input should be 'active'"),
        ("vllm", "last_release: 2026-11", "last_release: November", "last_release: String should match"),
        ("vllm", "kind: server", "sort: server", "kind: Field required"),
        ("vllm", "kind: server", "kind: server\n  stars: 1", "stars: Extra inputs are not permitted"),
        ("vllm", "streaming: true", "streaming: sometimes", "streaming: Input should be a valid boolean"),
        ("vllm", "models: [chatglm,", "models: [gpt,", "models.0: Input should be 'chatglm'"),
        ("vllm", "value: 24x", "value: ''", "claims.0.value: String should have at least 1 character"),
        ("vllm", "source: https://blog.vllm.ai", "source: http://blog.vllm.ai", "claims.0.source"),
        ("vllm", "checked: 2026-11-24", "checked: lately", "sources.0.checked: Input should be a valid date"),
        ("vllm", 'url: "https://pypi.org', 'link: "https://pypi.org', "sources.0.url: Field required"),
        ("vllm", "one or more GPUs.", "one or more GPUs. It is fast.", "what: should be one sentence"),
        ("inferllm", "  use_instead: [llama.cpp]\n", "", "use_instead: missing, but the project is dormant"),
        ("inferllm", "[llama.cpp]", "[ollama]", "use_instead: 'ollama' is not another framework of this file"),
        ("inferllm", "[llama.cpp]", "[inferllm]", "use_instead: 'inferllm' is not another framework"),
        ("vllm", "last_release: 2026-11", "last_release: 2025-10", "active, but its last release was 13 months old"),
        ("inferllm", "last_release: 2024-04", "last_release: 2026-04", "dormant, but its last release was 7 months"),
        ("inferllm", "-t 4 -v 2", "-t 4 -x 2", "inferllm.recipe: options: ['-v', '-x'] stand in only one"),
        ("tgi", "--hostname 127.0.0.1", "--hostname 0.0.0.0", "'0.0.0.0' opens the service to the network"),
        ("tgi", "--hostname 127.0.0.1", "--hostname ::", "'::' opens the service to the network"),
        ("tgi", "because: --hostname 127.0.0.1", "because: default", "its default is every address"),
        ("openllm", "export BENTOML_HOST=127.0.0.1", "export A=1", "the script does not say 'BENTOML_HOST=127.0.0.1'"),
        ("jittorllms", "openai_api: false", "openai_api: true", "recipe.listens: missing, but it serves"),
        ("tgi", "--network host", "-p 8080:8080", "'-p ' opens the service to the network"),
        ("text-generation-webui", "--threads 4", "--listen", "options: ['--listen', '--threads']"),
        ("inferllm", "month: 2026-11", "month: 2026-13", "seen.month: String should match"),
    ],
)
def test_a_broken_copy_is_refused(tmp_path, row, old, new, complaint):
    with pytest.raises(HelpersError) as error:
        read_frameworks(broken_copy(tmp_path, row, old, new))
    assert str(error.value).startswith(f"frameworks.yaml: {row}")  # the file and the row; the field is in the complaint
    assert complaint in str(error.value)


def test_a_row_without_sources_is_refused(tmp_path):
    path = tmp_path / "frameworks.yaml"
    text = FILE.read_text(encoding="utf-8")
    path.write_text(text[: text.rindex("  sources:")] + "  sources: []\n", encoding="utf-8")
    with pytest.raises(HelpersError, match=r"^frameworks.yaml: airllm.sources: Tuple should have at least 1 item"):
        read_frameworks(path)
