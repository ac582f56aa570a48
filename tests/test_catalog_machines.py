"""The machines of the catalogue: there, sourced, and not to be broken without a word."""

from __future__ import annotations

import pytest

from helpers import catalog
from helpers.catalog.machines import FILE, read_machines
from helpers.errors import HelpersError


def test_free_colab_is_sourced():
    colab = catalog.machine("colab-free")
    assert catalog.gpu(colab.gpu).name == "NVIDIA T4" and colab.ram_taken_gib < colab.ram_gib < 16
    assert all(source.note for source in colab.sources)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("gpu: t4", "gpu: t5", "gpu: there is no GPU 't5'"),
        ("ram_gib: 12.7", "ram_gib: -1", "ram_gib: Input should be greater than 0"),
        ("disk_gb: 78", "disk: 78", "disk_gb: Field required"),
    ],
)
def test_a_broken_copy_is_refused(tmp_path, old, new, complaint):
    text = FILE.read_text(encoding="utf-8")
    assert old in text, "the test no longer breaks what it means to break"
    (tmp_path / "machines.yaml").write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(HelpersError, match=complaint) as error:
        read_machines(tmp_path / "machines.yaml")
    assert str(error.value).startswith("machines.yaml: colab-free")


def test_unknown_machine():
    with pytest.raises(HelpersError, match=r"unknown machine 'kaggle'.*colab-free"):
        catalog.machine("kaggle")
