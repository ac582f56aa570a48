"""The machines of machines.yaml: what a free service lends, each figure with its source."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pydantic import Field, PositiveFloat, field_validator

from ..errors import unknown
from .gpus import gpus
from .read import Fact, Source, read_rows

FILE = Path(__file__).with_name("machines.yaml")


class Machine(Fact):
    """One machine; what each field means is told at the head of machines.yaml.

    Attributes:
        gpu: id of its card.
        ram_gib: system RAM, 2**30 bytes; ``ram_taken_gib`` of it are taken before a notebook begins.
        disk_gb: 10**9 bytes.
    """

    id: str
    name: str = Field(min_length=1)
    gpu: str
    ram_gib: PositiveFloat
    ram_taken_gib: PositiveFloat
    disk_gb: PositiveFloat
    note: str = ""
    sources: tuple[Source, ...] = Field(min_length=1)

    @field_validator("gpu")
    @classmethod
    def _in_the_catalogue(cls, gpu: str) -> str:
        if gpu not in gpus():
            raise ValueError(f"there is no GPU {gpu!r} in gpus.yaml")
        return gpu


def read_machines(path: Path = FILE) -> dict[str, Machine]:
    """Read machines.yaml, or another file of its form.

    Raises:
        HelpersError: naming the file, the row and the field.
    """
    return read_rows(path, Machine)


def machine(id: str) -> Machine:
    """Return one machine.

    Raises:
        HelpersError: there is no such id; the valid ones are listed.
    """
    rows = _catalogue()
    if id not in rows:
        raise unknown("machine", id, list(rows))
    return rows[id]


@cache
def _catalogue() -> dict[str, Machine]:
    return read_machines()
