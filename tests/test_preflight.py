"""Whether preflight's sums and verdicts hold; the machine is faked, so that the answers are known."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from helpers import catalog
from helpers.catalog.models import TransformerShape
from helpers.errors import HelpersError
from helpers.memory import preflight as check
from helpers.memory.preflight import GIB, MARGIN, RUNTIME_RAM, TOO_SMALL, Size, estimate, model_size

module = sys.modules["helpers.memory.preflight"]  # `helpers.memory.preflight` is the function of that name

SHAPE = TransformerShape(
    kind="transformer", hidden_size=4096, layers=28, heads=32, kv_heads=2, head_dim=128, ffn_size=13696,
    vocab_size=65024, qkv_bias=True, rope_theta=10000,
)  # fmt: skip
ROW = SimpleNamespace(
    id="m", shape=SHAPE, parameters=sum(SHAPE.count_parameters().values()), weight_bytes=12_487_168_064, dtype="fp16",
    native_config=None, largest_file=None, stand_in=None, name="M", native_class="GlmForCausalLM", context=8192,
)  # fmt: skip


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with one card of 24 GiB, 32 GiB of RAM and 100 GB of disk; a test may change it."""
    box = SimpleNamespace(vram=24 * GIB, ram=32 * GIB, disk=100e9, device="cuda:0")
    monkeypatch.setattr(catalog, "model", lambda name: ROW)
    monkeypatch.setattr(module, "pick_device", lambda device: box.device)
    monkeypatch.setattr(
        module, "pick_dtype", lambda precision, published, device: torch.float32 if device == "cpu" else torch.float16
    )
    monkeypatch.setattr(module, "free_vram", lambda device: None if device == "cpu" else box.vram)
    monkeypatch.setattr(module, "free_ram", lambda: box.ram)
    monkeypatch.setattr(module, "free_disk", lambda: box.disk)
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path)
    return box


def rows(result):
    return {need.what: need for need in result.needs}


def test_largest_shard_is_the_catalogues_where_it_knows_it():
    known = SimpleNamespace(**vars(ROW) | {"largest_file": 1_968_299_544})
    assert model_size(known, "hub").shard == 1_968_299_544
    assert model_size(ROW, "hub").shard == 10 * 10**9


def test_sizes_of_a_published_model():
    size = model_size(ROW, "hub")
    embeddings = 2 * 65024 * 4096
    assert size.kv_per_token * 2 == 28 * 1024  # the published 28 KiB
    assert 0 < size.parameters - embeddings - size.linear < 0.001 * size.parameters  # norms and biases
    assert size.shard == 10**10


def test_estimate_by_hand():
    size = Size(parameters=1000, linear=800, kv_per_token=5, files=2000, shard=2000)
    assert estimate(size, "fp16", 2, batch=1, tokens=0) == pytest.approx(2000 * MARGIN)
    assert estimate(size, "fp32", 4, batch=1, tokens=0) == pytest.approx(4000 * MARGIN)
    assert estimate(size, "int8", 2, batch=1, tokens=0) == pytest.approx((800 + 400) * MARGIN)
    assert estimate(size, "nf4", 2, batch=1, tokens=0) == pytest.approx((450 + 400) * MARGIN)
    assert estimate(size, "fp16", 2, batch=3, tokens=7) == pytest.approx((2000 + 3 * 7 * 5 * 2) * MARGIN)


def test_hub_on_a_gpu(machine):
    result = check("m", "hub", "fp16", tokens=2048)
    assert result.fits
    by_name = rows(result)
    weights, cache = 2 * ROW.parameters, 2048 * 28 * 1024
    rest = by_name["VRAM"].need - weights - 2 * cache  # the cache once more, in blocks freed as it grew
    assert 0.69 * GIB < rest < 1.1 * GIB  # CUDA context, workspace, activations of 2,048 tokens
    assert by_name["system RAM"].need == RUNTIME_RAM
    assert by_name["disk"].need == 2 * ROW.weight_bytes  # the download and the converted copy


def test_random_needs_neither_disk_nor_shard(machine):
    by_name = rows(check("m", "random"))
    assert by_name["disk"].verdict == by_name["largest shard"].verdict == "not needed"


def test_a_converted_checkpoint_needs_no_more_disk(machine, tmp_path):
    (tmp_path / "native" / "hub" / "m").mkdir(parents=True)
    assert rows(check("m", "hub"))["disk"].verdict == "not needed"


def test_cpu_needs_ram_and_no_vram(machine):
    machine.device = "cpu"
    by_name = rows(check("m", "hub"))
    assert by_name["VRAM"].verdict == "not needed"
    assert by_name["system RAM"].need == pytest.approx(MARGIN * (4 * ROW.parameters + 2048 * 56 * 1024))


def test_too_little_vram_names_the_precision_that_fits(machine):
    machine.vram = 8.5 * GIB
    with pytest.raises(
        HelpersError, match=r"VRAM: 12\.7. GiB needed, 8\.50 GiB free\. Lower precision to int8 \(8\.1. GiB\)"
    ):
        check("m", "random", "fp16")
    machine.vram = 6 * GIB
    with pytest.raises(HelpersError, match="Lower precision to nf4"):
        check("m", "random", "fp16")


def test_too_long_a_context_is_told_apart_from_too_big_a_model(machine):
    machine.vram = 14 * GIB
    with pytest.raises(HelpersError, match="Lower batch or tokens"):
        check("m", "random", "int8", batch=64, tokens=8192)
    machine.vram = GIB
    with pytest.raises(HelpersError, match="smaller model, or weights='tiny'"):
        check("m", "random", "nf4")


def test_colab_dies_of_the_shard_before_the_card_is_full(machine):
    machine.vram, machine.ram = 15 * GIB, 8 * GIB
    with pytest.raises(HelpersError, match=r"largest shard: 9.31 GiB needed, 8.00 GiB free"):
        check("m", "hub", "nf4")


def test_full_disk_names_the_cache_folder(machine):
    machine.disk = 10e9
    with pytest.raises(HelpersError, match=r"disk: .*LLM_DEPLOY_CACHE"):
        check("m", "hub")


def test_not_strict_shows_instead_of_raising(machine):
    machine.vram = GIB
    result = check("m", "random", strict=False)
    assert not result.fits and rows(result)["VRAM"].verdict == TOO_SMALL
    assert "does not fit" in str(result) and "does not fit" in result._repr_html_()
    assert '<th scope="row">VRAM</th>' in result._repr_html_()


def test_bf16_on_an_old_card_is_refused(monkeypatch):
    monkeypatch.setattr(catalog, "model", lambda name: ROW)
    monkeypatch.setattr(module, "pick_device", lambda device: "cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(HelpersError, match=r"Tesla T4 .*no bf16"):
        check("m", "random", "bf16")


def test_wrong_names_are_refused(machine):
    with pytest.raises(HelpersError, match="unknown precision 'int3'"):
        check("m", precision="int3")
    with pytest.raises(HelpersError, match="unknown weights 'small'"):
        check("m", weights="small")


def test_stand_in_is_sized_from_its_own_files(machine, monkeypatch, tmp_path):
    config = dict(model_type="llama", hidden_size=8, num_hidden_layers=3, num_attention_heads=2, vocab_size=16)
    config |= dict(intermediate_size=16, num_key_value_heads=1, max_position_embeddings=32, rms_norm_eps=1e-5)
    folder = tmp_path / "tiny" / "m"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"w": torch.zeros(1000, dtype=torch.float16)}, folder / "model.safetensors")
    monkeypatch.setattr(module, "TINY", tmp_path / "tiny")
    size, on_disk = model_size(ROW, "tiny"), (folder / "model.safetensors").stat().st_size
    assert size.files == size.shard == on_disk and size.parameters == on_disk // 2
    assert size.kv_per_token == 2 * 3 * 1 * 4


def test_a_container_limit_counts(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    monkeypatch.setattr(module, "Path", lambda place: tmp_path)
    assert module.free_ram() == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert module.free_ram() > 1000
