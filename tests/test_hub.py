"""Fetching: pinned, without code, taken up again, and honest when it cannot be done."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from helpers import HelpersError, catalog
from helpers.checkpoints import fetch
from helpers.checkpoints.load import native_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SAFE = ["config.json", "model.safetensors", "pytorch_model.bin", "modeling_qwen.py", "qwen.tiktoken"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub in memory: `files` is what the repository holds, `calls` what was asked of it."""
    hub = SimpleNamespace(files=SAFE, calls=[], error=None)

    def model_info(self, repository, revision=None):
        if hub.error:
            raise hub.error
        hub.calls.append((repository, revision))
        return SimpleNamespace(sha=revision or COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in hub.files])

    def snapshot_download(repository, revision, local_dir, allow_patterns):
        Path(local_dir).mkdir(parents=True, exist_ok=True)
        for name in huggingface_hub.utils.filter_repo_objects(hub.files, allow_patterns=allow_patterns):
            (Path(local_dir) / name).write_text(revision)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setenv("LLM_DEPLOY_CACHE", str(tmp_path / "cache"))
    return hub


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_fetches_the_catalogues_revision_and_no_code(hub):
    row = catalog.model("qwen-7b")
    folder = fetch("qwen-7b")
    assert hub.calls == [(row.repositories.huggingface, row.revision)]
    assert names(folder) == ["config.json", "fetched.json", "model.safetensors", "qwen.tiktoken"]
    assert (folder / "config.json").read_text() == row.revision


def test_a_model_born_native_comes_with_its_tokenizer_and_its_own_template(hub):
    small = ["chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    hub.files = [*small, "model.safetensors", "modeling_qwen3.py", "figures/speed.png"]
    assert names(fetch("qwen3-8b")) == sorted([*small, "fetched.json", "model.safetensors"])


def test_takes_pickles_only_where_there_is_nothing_else(hub):
    hub.files = ["config.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "tokenizer.model", "setup.py"]
    assert "pytorch_model.bin" in names(fetch("qwen-7b"))


def test_takes_the_rows_own_file_of_a_repository_that_holds_several_models(hub):
    row = catalog.model("rwkv-7-0.1b")
    hub.files = [row.file, catalog.model("rwkv-7-2.9b").file, "README.md", "rwkv_vocab_v20230424.txt"]
    assert names(fetch("rwkv-7-0.1b")) == [row.file, "fetched.json", "rwkv_vocab_v20230424.txt"]


def test_asks_once_for_a_pin_that_the_catalogue_lacks(hub):
    assert catalog.model("atom-7b").revision is None
    folder = fetch("atom-7b")
    assert (folder / "config.json").read_text() == COMMIT
    fetch("atom-7b")
    assert len(hub.calls) == 1, "a complete folder stays as it is"


def test_fetches_again_what_is_damaged_or_of_another_revision(hub):
    folder = fetch("qwen-7b")
    (folder / "model.safetensors").write_text("cut")
    fetch("qwen-7b")
    assert (folder / "model.safetensors").read_text() == catalog.model("qwen-7b").revision
    fetch("qwen-7b", revision=COMMIT)
    assert (folder / "model.safetensors").read_text() == COMMIT and len(hub.calls) == 3


def test_says_how_to_go_on_when_the_hub_cannot_be_reached(hub, tmp_path):
    hub.error = ConnectionError("no route")
    with pytest.raises(
        HelpersError,
        match=r"hub cannot be reached .*no route.*HF_ENDPOINT.*fetch qwen-7b --from modelscope.*path/to/folder",
    ):
        fetch("qwen-7b")
    assert not (tmp_path / "cache").exists(), "nothing is left behind"


def test_tells_a_full_disk(hub):
    hub.error = OSError(28, "No space left on device")
    with pytest.raises(HelpersError, match=r"disk is full.*LLM_DEPLOY_CACHE"):
        fetch("qwen-7b")


@pytest.mark.parametrize("revision", [None, "master", "main"])
def test_modelscope_takes_no_branch(hub, revision):
    with pytest.raises(HelpersError, match="no fixed point in time"):
        fetch("qwen-7b", "modelscope", revision)


def test_hub_weights_take_what_was_fetched_from_modelscope(hub, monkeypatch):
    def snapshot_download(repository, revision, local_dir, allow_patterns):
        Path(local_dir).mkdir(parents=True)
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            (Path(local_dir) / name).write_text('{"model_type": "qwen3"}')

    monkeypatch.setattr("modelscope.snapshot_download", snapshot_download)
    hub.error = ConnectionError("no route")
    with pytest.raises(HelpersError, match="no route"):
        native_folder("qwen3-0.6b", "hub")
    folder = fetch("qwen3-0.6b", "modelscope", "v1.0")
    assert native_folder("qwen3-0.6b", "hub") == folder
    (folder / "model.safetensors").write_text("cut")
    with pytest.raises(HelpersError, match="no route"):
        native_folder("qwen3-0.6b", "hub")


def test_unknown_hub_and_model(hub):
    with pytest.raises(HelpersError, match=r"unknown hub 'githug'.*huggingface, modelscope"):
        fetch("qwen-7b", "githug")
    with pytest.raises(HelpersError, match="unknown model"):
        fetch("qwen-7")


def test_adapters_are_fetched_into_folders_in_the_order_they_are_merged(hub):
    hub.files = ["adapter_config.json", "adapter_model.bin", "tokenizer.model", "special_tokens_map.json", "README.md"]
    first, second = catalog.model("chinese-alpaca-plus-7b").adapters.steps
    folder = fetch("chinese-alpaca-plus-7b")
    assert hub.calls == [(first.repository, first.revision), (second.repository, second.revision)]
    assert names(folder) == ["lora-1", "lora-2"]
    assert names(folder / "lora-1") == sorted([*hub.files[:4], "fetched.json"])
    assert (folder / "lora-1" / "adapter_model.bin").read_text() == first.revision
    fetch("chinese-alpaca-plus-7b")
    assert len(hub.calls) == 2, "both are complete"
    assert names(fetch("chinese-alpaca-7b")) == ["lora"]


def test_a_revision_asked_for_is_the_last_adapters(hub):
    folder = fetch("chinese-alpaca-plus-7b", revision=COMMIT)
    first, second = catalog.model("chinese-alpaca-plus-7b").adapters.steps
    assert hub.calls == [(first.repository, first.revision), (second.repository, COMMIT)]
    assert (folder / "lora-2" / "config.json").read_text() == COMMIT


def test_adapters_of_modelscope_are_not_known(hub):
    with pytest.raises(HelpersError, match="no repositories of its adapters there"):
        fetch("chinese-alpaca-plus-7b", "modelscope", COMMIT)


@pytest.mark.parametrize(("model", "places"), [("chinese-alpaca-7b", ["lora"]), ("chinese-alpaca-pro-7b", [1, 2])])
def test_a_model_without_a_public_base_is_explained(hub, model, places):
    steps = catalog.model(model).adapters.steps
    names = [place if place == "lora" else f"lora-{place}" for place in places]
    wanted = " and ".join(rf"{step.repository} \(DIR/{name}\)" for step, name in zip(steps, names, strict=True))
    with pytest.raises(HelpersError, match=f"only its adapters are published.* base into DIR/base .*{wanted}"):
        native_folder(model, "hub")
    assert not hub.calls
