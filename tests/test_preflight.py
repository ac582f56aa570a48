"""Whether preflight's sums and verdicts hold; the machine is faked, so that the answers are known."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from helpers import catalog
from helpers.catalog.models import TransformerShape
from helpers.checkpoints.load import stand_ins
from helpers.errors import HelpersError
from helpers.memory import preflight as check
from helpers.memory.parts import GIB, MIB, Setting, activations, memory
from helpers.memory.preflight import RUNTIME_RAM, TOO_SMALL, file_sizes, sized_weights
from helpers.memory.shapes import Sized

module = sys.modules["helpers.memory.preflight"]  # `helpers.memory.preflight` is the function of that name

SHAPE = TransformerShape(
    kind="transformer", hidden_size=4096, layers=28, heads=32, kv_heads=2, head_dim=128, ffn_size=13696,
    vocab_size=65024, qkv_bias=True, rope_theta=10000,
)  # fmt: skip
ROW = SimpleNamespace(
    id="m", shape=SHAPE, parameters=sum(SHAPE.count_parameters().values()), weight_bytes=12_487_168_064, dtype="fp16",
    native_config=None, largest_file=None, stand_in=None, name="M", native_class="GlmForCausalLM", context=8192,
    adapters=None,
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


def test_quantising_takes_disk_and_by_gptqmodel_the_16_bit_model_in_ram(machine):
    plain, made = (rows(check("m", "random", quantize=method)) for method in (None, "nf4"))
    assert plain["disk"].have is None
    assert made["disk"].need == 1.5 * ROW.weight_bytes and made["system RAM"].need == RUNTIME_RAM["cuda"]
    assert rows(check("m", "random", quantize="gptq"))["system RAM"].need == RUNTIME_RAM["cuda"] + ROW.weight_bytes
    machine.ram = 12 * GIB
    with pytest.raises(HelpersError, match=r"system RAM: 13\.63 GiB needed, 12\.00 GiB free.*bitsandbytes"):
        check("m", "random", quantize="gptq")
    machine.device = "cpu"
    machine.ram = 32 * GIB
    needs = [rows(check("m", "random", quantize=method))["system RAM"].need for method in (None, "gptq")]
    assert needs[0] == needs[1]  # the model in fp32, loaded before, is the larger one


def test_largest_shard_is_the_catalogues_where_it_knows_it():
    known = SimpleNamespace(**vars(ROW) | {"largest_file": 1_968_299_544})
    assert file_sizes(known, "hub") == (ROW.weight_bytes, 1_968_299_544)
    assert file_sizes(ROW, "hub") == (ROW.weight_bytes, 10 * 10**9)


def test_a_cpu_has_weights_cache_and_activations_alone():
    about = Sized.of(ROW)
    run = Setting("fp32", "transformers", "default", 1, 100, 120, element=4, cuda=False)
    parts = {part.name: part.bytes for part in memory(about, run)[0]}
    assert parts.pop("positions, token ids") == MIB
    assert parts == {
        "weights": 4 * ROW.parameters,
        "KV cache": 100 * 56 * 1024,
        "activations": activations(about, run, 100),
    }
    on_gpu = {part.name for part in memory(about, Setting("fp32", "transformers", "default", 1, 100, 120, 4))[0]}
    assert {"cuBLAS workspace", "CUDA context and libraries", "freed blocks of the prompt"} < on_gpu


def test_quantised_in_fp32_keeps_and_unpacks_fp32():
    """On a CPU what is not quantised is fp32: the matrix being loaded, and the one being unpacked."""
    about = Sized.of(ROW)
    run = Setting("nf4", "transformers", "default", 1, 1, 8, element=4, cuda=False)
    parts, moments = memory(about, run)
    matrix, weights = about.largest_matrix(), sum(part.bytes for part in parts if part.name.startswith(("w", "scales")))
    assert moments["loading"] == weights + 4.5 * matrix
    unpacked = next(part.bytes for part in memory(about, run)[0] if part.name == "matrix being quantised")
    assert unpacked == 4.5 * matrix


def test_hub_on_a_gpu(machine):
    result = check("m", "hub", "fp16", tokens=2048)
    assert result.fits
    by_name = rows(result)
    weights, cache = 2 * ROW.parameters, 2048 * 28 * 1024
    rest = by_name["VRAM"].need - weights - cache  # blocks freed as it grew are given back when room is short
    assert 0.69 * GIB < rest < 1.1 * GIB  # CUDA context, workspace, activations of 2,048 tokens
    assert by_name["system RAM"].need == RUNTIME_RAM["cuda"]
    assert by_name["disk"].need == 2 * ROW.weight_bytes  # the download and the converted copy


def test_random_needs_neither_disk_nor_shard(machine):
    by_name = rows(check("m", "random"))
    assert by_name["disk"].verdict == by_name["largest shard"].verdict == "not needed"


def test_a_converted_checkpoint_needs_no_more_disk(machine, tmp_path):
    (tmp_path / "native" / "hub" / "m").mkdir(parents=True)
    assert rows(check("m", "hub"))["disk"].verdict == "not needed"


def test_a_finished_download_needs_disk_for_the_conversion_alone(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "fetched", lambda model: tmp_path)
    assert rows(check("m", "hub"))["disk"].need == ROW.weight_bytes
    monkeypatch.setattr(ROW, "native_config", {"model_type": "qwen3"})
    assert rows(check("m", "hub"))["disk"].verdict == "not needed"


def test_a_lora_has_no_base_on_a_hub():
    with pytest.raises(HelpersError, match=r"only its adapters are published.*DIR/base"):
        check("chinese-alpaca-7b", "hub", device="cpu")
    assert check("chinese-alpaca-7b", "hub", device="cpu", strict=False).needs


def test_cpu_needs_ram_and_no_vram(machine):
    machine.device = "cpu"
    by_name = rows(check("m", "hub"))
    assert by_name["VRAM"].verdict == "not needed"
    about, run = Sized.of(ROW), Setting("fp32", "transformers", "default", 1, 2048, 2048, 4)
    whole = 4 * ROW.parameters + 2048 * 56 * 1024 + activations(about, run, 2048) + MIB
    assert by_name["system RAM"].need == whole + RUNTIME_RAM["cpu"]


def test_too_little_vram_names_the_precision_that_fits(machine):
    machine.vram = 8.5 * GIB
    with pytest.raises(
        HelpersError, match=r"VRAM: 12\.6. GiB needed, 8\.50 GiB free\. Lower precision to int8 \(7\.4. GiB\)"
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


def write_folder(folder, **more):
    config = dict(model_type="llama", hidden_size=8, num_hidden_layers=3, num_attention_heads=2, vocab_size=16)
    config |= dict(intermediate_size=16, num_key_value_heads=1, max_position_embeddings=32, rms_norm_eps=1e-5)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | more))
    save_file({"w": torch.zeros(1000, dtype=torch.float16)}, folder / "model.safetensors")
    return str(folder), (folder / "model.safetensors").stat().st_size


def test_an_own_folder_is_sized_from_its_config_and_files(machine, tmp_path):
    machine.device = "cpu"
    folder, on_disk = write_folder(tmp_path / "mine")
    assert file_sizes(ROW, folder) == (on_disk, on_disk)
    shape = sized_weights(ROW, folder).shape
    assert shape.kv_values_per_token() == 2 * 3 * 1 * 4 and shape.layers == 3
    by_name = rows(check("m", folder))
    assert by_name["largest shard"].need == by_name["disk"].need == on_disk
    parameters = sum(shape.count_parameters().values())
    assert 4 * parameters < by_name["system RAM"].need - RUNTIME_RAM["cpu"] - MIB < 4 * parameters + 2048 * 1024


def test_the_base_of_an_adapter_is_sized(machine, tmp_path):
    write_folder(tmp_path / "lora" / "base")
    assert sized_weights(ROW, str(tmp_path / "lora")).shape.layers == 3


@pytest.mark.parametrize("method,stays", [("gptq", True), ("compressed-tensors", False)])
def test_a_quantised_folder_takes_its_files_and_no_more_weights(machine, tmp_path, method, stays):
    machine.device = "cpu"
    (plain, _), (saved, on_disk) = (
        write_folder(tmp_path / "plain"),
        write_folder(tmp_path / "saved", quantization_config={"quant_method": method, "bits": 4}),
    )
    weights = 4 * sum(sized_weights(ROW, plain).shape.count_parameters().values())
    more = rows(check("m", plain))["system RAM"].need - rows(check("m", saved))["system RAM"].need
    assert more == pytest.approx(weights - on_disk if stays else 0)


def test_every_stand_in_is_sized_as_what_it_holds():
    """The bytes of its file, in 16 bit, are those of its shape: what was trained is what is counted."""
    for model in stand_ins():
        row = catalog.model(model)
        if row.stored_parameters or row.adapters:  # what is stored twice, or grows when the adapter is merged
            continue
        parameters = sum(sized_weights(row, "tiny").shape.count_parameters().values())
        assert file_sizes(row, "tiny")[0] == pytest.approx(2 * parameters, rel=0.02), model


def test_a_container_limit_counts(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    monkeypatch.setattr(module, "Path", lambda place: tmp_path)
    assert module.free_ram() == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert module.free_ram() > 1000
