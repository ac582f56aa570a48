"""The GPU catalogue: complete, corrected, and not to be broken without a word."""

from __future__ import annotations

from datetime import date

import pytest

from helpers.catalog.gpus import FILE, find_gpu, gpu, gpus, read_gpus
from helpers.errors import HelpersError

SURVEY = {"h200-sxm", "h100-nvl", "a100-pcie-80gb", "v100-sxm2-32gb", "v100-pcie-32gb", "rtx-3090", "rtx-4090"}
READERS_OWN = {"t4", "l4", "a10", "l40s", "h100-sxm", "h100-pcie", "a800-pcie-80gb", "h800-sxm", "h20", "b200"}
READERS_OWN |= {"rtx-4090d", "rtx-5090", "a100-sxm4-80gb", "a100-sxm4-40gb"}


def test_every_gpu_is_there():
    assert set(gpus()) == SURVEY | READERS_OWN


@pytest.mark.parametrize("row", gpus().values(), ids=gpus())
def test_every_row_has_a_source_and_a_date(row):
    assert row.sources
    assert all(source.checked <= date.today() for source in row.sources)
    assert any(source.note == "" or "not opened" not in source.note for source in row.sources), "nothing was opened"


@pytest.mark.parametrize(
    ("id", "memory_gb", "bandwidth_gb_s"),
    [
        ("h200-sxm", 141, 4800),
        ("h100-nvl", 94, 3900),
        ("a100-pcie-80gb", 80, 1935),
        ("v100-sxm2-32gb", 32, 900),
        ("v100-pcie-32gb", 32, 900),
        ("rtx-3090", 24, 936),
        ("rtx-4090", 24, 1008),
    ],
)
def test_memory_and_bandwidth_of_the_survey(id, memory_gb, bandwidth_gb_s):
    assert (gpu(id).memory_gb, gpu(id).bandwidth_gb_s) == (memory_gb, bandwidth_gb_s)


@pytest.mark.parametrize(
    ("id", "said", "right"),
    [
        ("h100-nvl", "188 GB, 134 TFLOPS FP64, 7.8 TB/s", "pair"),
        ("h100-nvl", "no TF32", "tensor cores have TF32"),
        ("h100-sxm", "no TF32", "tensor cores have TF32"),
        ("v100-sxm2-32gb", "NVL", "SXM2"),
        ("v100-sxm2-32gb", "TF32", "Ampere"),
        ("v100-sxm2-32gb", "7.8", "CUDA cores"),
        ("v100-sxm2-32gb", "INT8", "Turing"),
        ("v100-pcie-32gb", "TF32", "Ampere"),
        ("v100-pcie-32gb", "7 TFLOPS", "CUDA cores"),
        ("v100-pcie-32gb", "INT8", "Turing"),
        ("rtx-3090", "TF32, FP16, BF16 and INT8", "FP16, BF16, TF32 and INT8"),
        ("rtx-4090", "TF32, FP16, BF16 and INT8", "FP8"),
        ("h200-sxm", "FP64", "bandwidth bounds decoding"),
    ],
)
def test_the_errors_of_the_survey_are_set_right(id, said, right):
    assert any(said in each.said and right in each.right for each in gpu(id).corrections)


def test_the_rows_say_what_their_corrections_say():
    assert gpu("h100-nvl").rates.tf32 and gpu("h100-sxm").rates.tf32
    for id in ("v100-sxm2-32gb", "v100-pcie-32gb"):
        assert gpu(id).formats == ("fp16",)
        assert gpu(id).rates.fp64_tensor is None
    assert {"fp16", "bf16", "tf32", "int8"} <= set(gpu("rtx-3090").formats)
    assert "fp8" not in gpu("rtx-3090").formats
    assert "fp8" in gpu("rtx-4090").formats


def test_geforce_is_stored_with_fp32_accumulation():
    # With FP16 accumulation, 142, 330 and 419 would stand here.
    assert [gpu(id).rates.fp16 for id in ("rtx-3090", "rtx-4090", "rtx-5090")] == [71, 165.2, 209.5]


@pytest.mark.parametrize(
    ("nvml_name", "id"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200-sxm"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-sxm4-40gb"),
        ("NVIDIA A800 80GB PCIe", "a800-pcie-80gb"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-32GB", "v100-sxm2-32gb"),
        ("Tesla V100-PCIE-32GB", "v100-pcie-32gb"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090 D", "rtx-4090d"),
        ("GeForce RTX 3090", "rtx-3090"),  # drivers before 470
        (" nvidia  geforce rtx 5090 ", "rtx-5090"),
    ],
)
def test_a_card_is_found_by_its_nvml_name(nvml_name, id):
    assert find_gpu(nvml_name).id == id


@pytest.mark.parametrize(
    "nvml_name", ["NVIDIA H200 NVL", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A10G", "NVIDIA L40", "NVIDIA", ""]
)
def test_a_card_that_is_not_listed_is_not_taken_for_its_namesake(nvml_name):
    assert find_gpu(nvml_name) is None


def test_an_unknown_id_lists_the_valid_ones():
    with pytest.raises(HelpersError, match="unknown GPU 'h100'") as error:
        gpu("h100")
    assert all(id in str(error.value) for id in gpus())


def test_usable_memory_is_below_the_vendors_figure():
    assert gpu("t4").usable_gib == 15
    assert gpu("v100-pcie-32gb").usable_gib is None


def test_the_catalogue_cannot_be_changed_by_its_users():
    gpus().clear()
    assert gpus()


@pytest.mark.parametrize(
    ("row", "old", "new", "complaint"),
    [
        ("v100-sxm2-32gb", "formats: [fp16]", "formats: [fp16, bf16]", "formats: bf16 needs 8.0, this is 7.0"),
        ("v100-sxm2-32gb", "formats: [fp16]", "formats: [fp16, tf32]", "formats: tf32 needs 8.0"),
        ("v100-pcie-32gb", "formats: [fp16]", "formats: [fp16, int8]", "formats: int8 needs 7.5"),
        ("v100-pcie-32gb", "fp64: 7}", "fp64: 7, fp64_tensor: 7}", "rates.fp64_tensor: 7.0 has no FP64 tensor cores"),
        ("v100-pcie-32gb", "fp16: 112,", "fp16: 112, bf16: 112,", "rates.bf16: a rate for a format that is not"),
        ("t4", "[fp16, int8, int4]", "[fp16, bf16, int8, int4]", "formats: bf16 needs 8.0"),
        ("rtx-3090", "[fp16, bf16, tf32, int8, int4]", "[fp16, bf16, tf32, fp8, int8]", "formats: fp8 needs 8.9"),
        ("rtx-4090", "[fp16, bf16, tf32, fp8, int8, int4]", "[fp16, bf16, fp4, int8]", "formats: fp4 needs 10.0"),
        ("h20", "fp8, int8]", "fp8, int8, int4]", "formats: tensor cores after 8.9 have no int4"),
        ("h20", "tf32: 74, ", "", "rates.tf32: missing"),
        ("h100-sxm", "fp16: 989.5", "fp16: 1979", "rates.fp16: 1979.0 is above the dense 1072; is it with sparsity?"),
        ("h100-nvl", "fp8: 1670.5", "fp8: 3341", "rates.fp8: 3341.0 is above the dense 1671"),
        ("l4", "tf32: 60", "tf32: 120", "rates.tf32: 120.0 is above the dense 60"),
        ("rtx-4090", "fp16: 165.2", "fp16: 330.3", "rates.fp16: 330.3 is above the dense 165"),
        ("rtx-5090", "fp4: 1676", "fp4: 3352", "rates.fp4: 3352.0 is above the dense 1676"),
        ("a100-pcie-80gb", "fp64: 9.7", "fp64: 19.5", "rates.fp64: 19.5 is more than half of fp32"),
        ("t4", "fp16: 65", "fp16: -65", "rates.fp16: Input should be greater than 0"),
        ("l4", "bandwidth_gb_s: 300", "bandwidth_gb_s: 0.3", "bandwidth_gb_s: Input should be greater than or equal"),
        ("a10", "memory_gb: 24", "memory_gb: 24576", "memory_gb: Input should be less than or equal"),
        ("a10", "memory_gb: 24", "memory_gb: 48", "nvml_total_mib: 22.5 GiB does not go with 48.0 GB"),
        ("a10", "compute_capability: 8.6", "compute_capability: 8.5", "compute_capability: 8.5 is none of 7.0"),
        ("a10", "dense: true", "dense: false", "dense: Input should be True"),
        ("a10", "tdp_w: 150", "watts: 150", "tdp_w: Field required"),
        ("a10", "tdp_w: 150", "tdp_w: 150\n  price: 1", "price: Extra inputs are not permitted"),
        ("l40s", "[NVIDIA L40S]", "[L4]", "nvml_names: 'l4' is already a name of l4"),
    ],
)
def test_a_broken_copy_is_refused(tmp_path, row, old, new, complaint):
    head, name, body = FILE.read_text(encoding="utf-8").partition(f"\n{row}:\n")
    assert old in body.split("\n\n")[0], "the test no longer breaks what it means to break"
    broken = tmp_path / "gpus.yaml"
    broken.write_text(head + name + body.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(HelpersError) as error:
        read_gpus(broken)
    assert str(error.value).startswith(f"gpus.yaml: {row}")  # the file and the row; the field is in the complaint
    assert complaint in str(error.value)
