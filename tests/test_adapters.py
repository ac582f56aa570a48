"""A reader's own folder of a model published as LoRA: base and adapters, what is fetched, and what is refused."""

import hashlib
import json
import shutil

import pytest

from helpers import HelpersError, catalog
from helpers.checkpoints import adapters
from helpers.checkpoints.load import TINY, native_folder

MODEL, PLUS = "chinese-alpaca-7b", "chinese-alpaca-plus-7b"
STEPS = [step for row in catalog.models().values() if row.adapters for step in row.adapters.steps]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the stand-in, as a reader has it: base/ and lora/."""
    monkeypatch.setenv("LLM_DEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(adapters, "fetch", lambda model: pytest.fail("nothing is to be fetched"))
    return shutil.copytree(TINY / MODEL, tmp_path / "DIR")


def used(folder):
    """Names of the folders a conversion was made of, by the times of their files."""
    receipt = json.loads((folder / "conversion.json").read_text())
    return {name for name, _, _ in receipt["files"]}


def change_config(base, **change):
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def test_the_adapter_beside_the_base_is_merged(folder):
    assert "adapter_model.bin" in used(native_folder(MODEL, str(folder)))


def test_an_adapter_that_is_not_there_is_fetched(folder, tmp_path, monkeypatch):
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    (folder / "lora").rename(fetched / "lora")
    monkeypatch.setattr(adapters, "fetch", lambda model: {MODEL: fetched}[model])
    assert "adapter_model.bin" in used(native_folder(MODEL, str(folder)))


def test_two_adapters_are_merged_in_the_order_of_their_names(folder, monkeypatch):
    (folder / "lora").rename(folder / "lora-1")
    shutil.copytree(folder / "lora-1", folder / "lora-2")
    row = catalog.model(PLUS)
    assert adapters.published_parts(row, folder) == (folder / "base", [folder / "lora-1", folder / "lora-2"])


def test_a_merged_copy_needs_no_adapters(folder):
    assert adapters.published_parts(catalog.model(MODEL), folder / "base") == (folder / "base", [])


@pytest.mark.parametrize("names", [["lora", "lora-1"], ["lora-2"], ["lora-1", "lora-3"], ["lora-1"], ["lora_old"]])
def test_names_that_give_no_order_are_refused(folder, names):
    (folder / "lora").rename(folder / "kept")
    for name in names:
        shutil.copytree(folder / "kept", folder / name)
    with pytest.raises(HelpersError, match=rf"order .*{', '.join(names)}.*lora-1, lora-2"):
        native_folder(PLUS, str(folder))


def test_one_adapter_where_the_model_has_two_is_refused(folder):
    first, second = (step.repository for step in catalog.model(PLUS).adapters.steps)
    with pytest.raises(HelpersError, match=rf"holds 1 of 2 .*{first} \(DIR/lora-1\) and {second} \(DIR/lora-2\)"):
        native_folder(PLUS, str(folder))


def test_an_adapter_known_by_its_checksum_as_another_is_refused(folder, monkeypatch):
    """Of these, names, shapes and vocabulary fit: Chinese-Alpaca-Plus' second adapter in place of Chinese-Alpaca's."""
    digest = hashlib.sha256((folder / "lora" / "adapter_model.bin").read_bytes()).hexdigest()
    other = catalog.model(PLUS)
    steps = (other.adapters.steps[0], other.adapters.steps[1].model_copy(update={"sha256": digest}))
    changed = other.model_copy(update={"adapters": other.adapters.model_copy(update={"steps": steps})})
    monkeypatch.setattr(catalog, "models", lambda: {MODEL: catalog.model(MODEL), PLUS: changed})
    with pytest.raises(
        HelpersError, match=r"SHA256, lora holds hfl/chinese-alpaca-plus-lora-7b and not hfl/chinese-al"
    ):
        native_folder(MODEL, str(folder))


LLAMA = {"hidden_size": 4096, "vocab_size": 32000, "max_position_embeddings": 2048}


def test_llama_2_is_not_taken_for_llama(folder):
    change_config(folder / "base", **LLAMA | {"max_position_embeddings": 4096})
    with pytest.raises(HelpersError, match=r"its context is 4096 tokens, and that of LLaMA-7B .* is 2048.*DIR/base"):
        native_folder(MODEL, str(folder))


def test_a_base_by_itself_is_not_taken_for_a_merged_model(folder):
    change_config(folder / "base", **LLAMA)
    with pytest.raises(HelpersError, match=r"it has 32000 tokens and Chinese-Alpaca-7B has 49954.*DIR/base"):
        native_folder(MODEL, str(folder / "base"))
    assert adapters.published_parts(catalog.model(MODEL), folder), "into the base of this size it is merged"


def test_every_published_adapter_has_a_checksum_of_its_own():
    checksums = {step.repository: step.sha256 for step in STEPS}
    assert None not in checksums.values() and len(set(checksums.values())) == len(checksums) == 5
