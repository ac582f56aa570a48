"""The GPUs of gpus.yaml: memory, bandwidth and dense rates by number format, each with its source."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ..errors import unknown
from .read import Fact, Https, Source, fault, read_rows

FILE = Path(__file__).with_name("gpus.yaml")

Format = Literal["fp16", "bf16", "tf32", "fp8", "int8", "int4", "fp4"]
"""A number format that tensor cores multiply."""

FIRST_CAPABILITY = {"fp16": 7.0, "int8": 7.5, "int4": 7.5, "bf16": 8.0, "tf32": 8.0, "fp8": 8.9, "fp4": 10.0}
"""The compute capability whose tensor cores first have a format. Hopper and Blackwell dropped INT4 again."""

LAST_INT4 = 8.9
FP64_TENSOR = {8.0, 9.0, 10.0}
"""The compute capabilities with FP64 tensor cores: the data-centre chips from A100 on."""

FP16_PER_FP32 = {7.0: 8, 7.5: 8, 8.0: 16, 8.6: 4, 8.9: 4, 9.0: 16, 10.0: 32, 12.0: 4}
"""At most so many dense FP16 tensor operations for one FP32 operation of the CUDA cores; GeForce has half of it."""

PER_FP16 = {"bf16": 1, "tf32": 0.5, "fp8": 2, "int8": 2, "int4": 4, "fp4": 4}
"""At most so many operations for one of FP16, all dense. GeForce halves FP16 with FP32 accumulation, so that its
integer and FP4 rates are twice this; see the head of gpus.yaml."""

ROUNDING = 1.03  # datasheets round, the clock behind two rates can differ a little

Rate = Annotated[float, Field(gt=0, le=20_000)]


class Rates(Fact):
    """Peak rates without sparsity: TFLOPS, for integers TOPS. ``None``: the cores lack it, or the vendor is silent.

    Attributes:
        fp16: tensor cores, FP32 accumulation; likewise bf16, tf32, fp8 and fp4.
        int8: tensor cores, INT32 accumulation; likewise int4.
        fp32: CUDA cores; likewise fp64.
        fp64_tensor: FP64 on tensor cores.
    """

    fp16: Rate
    bf16: Rate | None = None
    tf32: Rate | None = None
    fp8: Rate | None = None
    int8: Rate | None = None
    int4: Rate | None = None
    fp4: Rate | None = None
    fp32: Rate
    fp64: Rate
    fp64_tensor: Rate | None = None


class Correction(Fact):
    """Something the survey behind this series says of a card, and what its vendor says."""

    said: str = Field(min_length=1)
    right: str = Field(min_length=1)
    source: Https


class Gpu(Fact):
    """One card; what each field means is told at the head of gpus.yaml.

    Attributes:
        nvml_names: the names NVML (and so nvidia-smi and torch) give the card.
        memory_gb: memory as the vendor says it.
        nvml_total_mib: memory as nvidia-smi prints it, MiB.
        bandwidth_gb_s: peak memory bandwidth, 10**9 bytes a second.
        dense: always true: no rate here counts sparsity.
        datasheet_sparse: the vendor prints the tensor rates with sparsity only, so that half of them stands here.
        tdp_w: power limit, W; the highest where it can be configured.
    """

    id: str
    name: str = Field(min_length=1)
    nvml_names: tuple[str, ...] = Field(min_length=1)
    architecture: Literal["Volta", "Turing", "Ampere", "Ada", "Hopper", "Blackwell"]
    compute_capability: float
    memory_gb: float = Field(ge=8, le=300)
    nvml_total_mib: int | None = Field(default=None, gt=0)
    bandwidth_gb_s: float = Field(ge=100, le=10_000)
    formats: tuple[Format, ...] = Field(min_length=1)
    rates: Rates
    dense: Literal[True]
    datasheet_sparse: bool
    tdp_w: int = Field(ge=50, le=1500)
    interconnect: str = Field(min_length=1)
    note: str = ""
    corrections: tuple[Correction, ...] = ()
    sources: tuple[Source, ...] = Field(min_length=1)

    @property
    def usable_gib(self) -> float | None:
        """Memory in GiB before any program runs, from nvidia-smi's total; each program's CUDA context takes some."""
        return None if self.nvml_total_mib is None else self.nvml_total_mib / 1024

    @field_validator("compute_capability")
    @classmethod
    def _known(cls, capability: float) -> float:
        if capability not in FP16_PER_FP32:
            raise ValueError(f"{capability} is none of {', '.join(map(str, FP16_PER_FP32))}")
        return capability

    @model_validator(mode="after")
    def _formats_fit_the_chip(self) -> Gpu:
        for name in self.formats:
            if self.compute_capability < FIRST_CAPABILITY[name]:
                raise ValueError(f"formats: {name} needs {FIRST_CAPABILITY[name]}, this is {self.compute_capability}")
        if "int4" in self.formats and self.compute_capability > LAST_INT4:
            raise ValueError(f"formats: tensor cores after {LAST_INT4} have no int4")
        if self.rates.fp64_tensor and self.compute_capability not in FP64_TENSOR:
            raise ValueError(f"rates.fp64_tensor: {self.compute_capability} has no FP64 tensor cores")
        for name in FIRST_CAPABILITY:
            rate = getattr(self.rates, name)
            if rate is not None and name not in self.formats:
                raise ValueError(f"rates.{name}: a rate for a format that is not in formats")
            if rate is None and name in self.formats and name != "int4":  # vendors often print no INT4 rate
                raise ValueError(f"rates.{name}: missing, but {name} is in formats")
        return self

    @model_validator(mode="after")
    def _rates_are_dense(self) -> Gpu:
        """Sparse figures are twice the dense ones, which breaks these proportions of the chips."""
        geforce = "GeForce" in self.name
        most = self.rates.fp32 * FP16_PER_FP32[self.compute_capability] / (2 if geforce else 1)
        if self.rates.fp16 > most * ROUNDING:
            raise ValueError(f"rates.fp16: {self.rates.fp16} is above the dense {most:.0f}; is it with sparsity?")
        for name, times in PER_FP16.items():
            rate = getattr(self.rates, name)
            most = self.rates.fp16 * times * (2 if geforce and name in ("int8", "int4", "fp4") else 1)
            if rate is not None and rate > most * ROUNDING:
                raise ValueError(f"rates.{name}: {rate} is above the dense {most:.0f}; is it with sparsity?")
        if self.rates.fp64 > self.rates.fp32 / 2 * ROUNDING:
            raise ValueError(f"rates.fp64: {self.rates.fp64} is more than half of fp32; is it the tensor cores' rate?")
        return self

    @model_validator(mode="after")
    def _memory_agrees(self) -> Gpu:
        if self.usable_gib is not None and not 0.9 * self.memory_gb <= self.usable_gib <= self.memory_gb:
            raise ValueError(f"nvml_total_mib: {self.usable_gib:.1f} GiB does not go with {self.memory_gb} GB")
        return self


def read_gpus(path: Path = FILE) -> dict[str, Gpu]:
    """Read a GPU file, checking every row and that no NVML name is given twice.

    Raises:
        HelpersError: naming the file, the row and the field.
    """
    rows = read_rows(path, Gpu)
    owner: dict[str, str] = {}
    for row in rows.values():
        for name in map(_plain, row.nvml_names):
            if name in owner:
                raise fault(path, f"{row.id}.nvml_names", f"{name!r} is already a name of {owner[name]}")
            owner[name] = row.id
    return rows


def gpus() -> dict[str, Gpu]:
    """Return every GPU of the catalogue by id, in the order of the file."""
    return dict(_catalogue())


def gpu(id: str) -> Gpu:
    """Return one GPU.

    Raises:
        HelpersError: there is no such id; the valid ones are listed.
    """
    rows = _catalogue()
    if id not in rows:
        raise unknown("GPU", id, list(rows))
    return rows[id]


def find_gpu(nvml_name: str) -> Gpu | None:
    """Find the row of a card by the name the driver gives it.

    Args:
        nvml_name: e.g. ``"NVIDIA H100 80GB HBM3"`` or ``"Tesla T4"``, from NVML, nvidia-smi or
            ``torch.cuda.get_device_name()``.

    Returns:
        The row, or ``None``: names must agree in full, as "NVIDIA H200 NVL" and "NVIDIA GeForce RTX 4090 Laptop GPU"
        are other cards than their shorter namesakes.
    """
    wanted = _plain(nvml_name)
    return next((row for row in _catalogue().values() if wanted in map(_plain, row.nvml_names)), None)


@cache
def _catalogue() -> dict[str, Gpu]:
    return read_gpus()


def _plain(nvml_name: str) -> str:
    """Lower case, single spaces, no leading "NVIDIA", which drivers before 470 left out."""
    return " ".join(nvml_name.lower().split()).removeprefix("nvidia ")
