"""The shipped stand-ins: what their evaluation.json says reaches the targets, and a part of it is measured again."""

import json
from pathlib import Path

import pytest

import helpers.checkpoints
from helpers.checkpoints.make import originals
from helpers.checkpoints.make.evaluate import REPORT, TARGETS, evaluate
from helpers.native.convert import family_of
from helpers.native.lora import base_and_adapters

TINY = Path(helpers.checkpoints.__file__).parent / "tiny"


SHIPPED = [model for model in originals.STAND_INS if (TINY / model).is_dir()]


def test_what_is_shipped_can_be_made_again():
    assert {folder.name for folder in TINY.iterdir() if folder.is_dir()} == set(SHIPPED)
    assert len(SHIPPED) >= 9


@pytest.mark.parametrize("model", SHIPPED)
def test_the_files_are_those_of_the_original_and_small(model):
    one, folder = originals.stand_in(model), TINY / model
    base, adapters = base_and_adapters(folder)
    assert [adapter.name for adapter in adapters] == list(one.adapters)
    if not one.weights.endswith(".pth"):  # which has none
        assert json.loads((base / "config.json").read_text()) == one.config
    assert (base / one.weights).exists()
    vocabulary = ("tokenizer.json",) if one.born_native else family_of(one.config).vocabulary
    assert any((base / name).exists() for name in vocabulary)
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= one.largest


@pytest.mark.parametrize("model", SHIPPED)
def test_the_weights_have_the_published_type(model):
    from helpers.native.convert import open_shard, weight_files

    folder, _ = base_and_adapters(TINY / model)
    types = {str(tensor.dtype) for file in weight_files(folder) for tensor in open_shard(file).values()}
    assert types == {f"torch.{originals.stand_in(model).dtype}"}


@pytest.mark.parametrize("model", SHIPPED)
def test_it_recites_and_answers(model):
    stored = json.loads((TINY / model / REPORT).read_text())
    assert stored["held_out_ppl"] <= originals.stand_in(model).held_out_ppl
    assert stored["recited"] >= TARGETS["recited"]
    assert stored["answered"] >= TARGETS["answered"]

    now = evaluate(TINY / model, famous=20, held_out=50)
    assert now["recited"] >= 18
    assert now["answered"] >= 16
    assert now["held_out_ppl"] <= 1.15 * stored["held_out_ppl"]
