"""The inference frameworks of frameworks.yaml: what each does, whether it is alive, and what it claims."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date
from functools import cache
from pathlib import Path
from textwrap import indent
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ..errors import unknown
from .read import Day, Fact, Https, Source, fault, read_rows

FILE = Path(__file__).with_name("frameworks.yaml")

ABBREVIATIONS = {
    "KV": "KV cache: keys and values of earlier tokens are kept, not computed again",
    "TP": "tensor parallel: every layer is split over several GPUs",
    "PP": "pipeline parallel: whole layers are spread over several GPUs",
    "CB": "continuous batching: requests join and leave the running batch at every token",
    "PA": "paged attention (LMDeploy: blocked KV): the KV cache is kept in small blocks, so that little is wasted",
    "TA": "token attention: paged attention with blocks of one token",
    "FA": "flash attention: attention in tiles that stay in fast memory, never storing the full score matrix",
    "FMHA": "fused multi-head attention: the whole attention in one kernel",
    "SF": "split and fuse: long prompts are cut up and mixed with decoding, so that nobody waits for one of them",
    "SD": "speculative decoding: a cheap draft of several tokens is checked in one step",
    "CK": "own kernels: written by hand for the hardware, not taken from a general library",
    "MC": "machine-learning compilation: kernels are generated for the device at hand",
    "AT": "asynchronous tokenising, inference and detokenising, in three processes",
    "ZC": "zero copy: weights are used where the file is mapped, not copied first",
    "LW": "layer-wise inference: one layer at a time is loaded, so that memory need not hold the model",
    "OF": "offloading: layers or tensors that do not fit wait in main memory or on disk",
}
"""What the short names in ``optimisations`` mean."""

STALE_AFTER_DAYS = 365

ALIVE_MONTHS = 12
"""A project whose newest release was older than this on the day it was looked up is not called active."""

OPTION = re.compile(r"(?<!\S)--?[A-Za-z][\w-]*")
HOST = re.compile(r"(?:--host|--hostname|--server-name|\bBENTOML_HOST)[ =](\S+)")
OUTSIDE = re.compile(r"0\.0\.0\.0|--listen\b|--share\b|--public-api|-p (?!127\.0\.0\.1:)|trust.remote.code")
"""What no command of this series says: answer to the whole network, or run code that came with a checkpoint."""

Month = Annotated[str, Field(pattern=r"^20\d\d-(0[1-9]|1[0-2])$")]


class Claim(Fact):
    """A figure a project (or the survey) states about itself; not measured by us.

    Attributes:
        text: the claim, in the words of this series.
        value: the figure alone, e.g. ``"24x"``.
        setting: what it was measured on and against, or that nobody says.
        source: where it is stated; ``None`` if it could not be found anywhere but in the survey.
    """

    text: str = Field(min_length=1)
    value: str = Field(min_length=1)
    setting: str = Field(min_length=1)
    source: Https | None


class Seen(Fact):
    """What we ran ourselves, and when."""

    version: str = Field(min_length=1)
    month: Month
    what: str = Field(min_length=1)


class Listens(Fact):
    """Why a recipe's server answers this machine alone.

    Attributes:
        because: the words of the script that say so, or ``"default"``.
        otherwise: where it answers if nothing is said, as ``source`` has it.
    """

    because: str = Field(min_length=1)
    otherwise: Literal["127.0.0.1", "localhost", "every address"]
    source: Https


class Recipe(Fact):
    """How a framework that no notebook of this series starts would be started; an option was looked up in its source.

    Attributes:
        why: whether to take it today, and why or why not.
        takes: what it can load of this series.
        get: shell lines that fetch one pinned version, or say "not pinned": a container up to its arguments, a wheel,
            a build.
        start: the command line of the framework itself. Together with ``get`` one script.
        options: every option of ``start``, each found in ``source``.
        listens: where it answers; ``None`` for a program that opens no port.
        version: tag, release or commit that was read there.
        ran: what of it was run here, and when; ``None`` if nothing was.
    """

    why: str = Field(min_length=1)
    takes: str = Field(min_length=1)
    get: str = Field(min_length=1)
    start: str = Field(min_length=1)
    options: tuple[str, ...]
    listens: Listens | None
    version: str = Field(min_length=1)
    source: Https
    checked: Day
    ran: str | None

    @property
    def script(self) -> str:
        """Everything to type, in order; the arguments of a container are indented below it."""
        get, start = self.get.rstrip(), self.start.rstrip()
        if get.endswith("\\"):
            start = indent(start, "  ")
        return f"{get}\n{start}"

    @model_validator(mode="after")
    def _looked_up_and_private(self) -> Recipe:
        used = set(OPTION.findall(self.start))
        if used != set(self.options):
            raise ValueError(f"options: {sorted(used ^ set(self.options))} stand in only one of start and options")
        if open_to_all := OUTSIDE.search(self.script):
            raise ValueError(f"{open_to_all[0]!r} opens the service to the network, or runs a checkpoint's code")
        if others := [host for host in HOST.findall(self.script) if host != "127.0.0.1"]:
            raise ValueError(f"{others[0]!r} opens the service to the network")
        return self

    @model_validator(mode="after")
    def _listens_on_this_machine(self) -> Recipe:
        if self.listens and self.listens.because == "default" and self.listens.otherwise == "every address":
            raise ValueError("listens: its default is every address, and the script says nothing else")
        if self.listens and self.listens.because not in ("default", *self._said()):
            raise ValueError(f"listens: the script does not say {self.listens.because!r}")
        return self

    def _said(self) -> list[str]:
        return [found[0] for found in HOST.finditer(self.script)]


class Framework(Fact):
    """One framework; what each field means is told at the head of frameworks.yaml.

    Attributes:
        what: one sentence.
        package: its name on the Python package index, ``None`` if it is not there (or only a placeholder is).
        version: the newest release known here; ``None`` if it never had one.
        last_release: year and month of that release, or of the last commit where there is none.
        openai_api: it serves the OpenAI protocol (``/v1/chat/completions``).
        models: model lines of this series that it runs, converted where need be; named as in helpers/native; empty
            where it takes none of them.
        use_instead: ids of frameworks to take today; must be given for one in maintenance, dormant or archived.
        seen: what ran on our own machines; ``None`` if nothing was tried or possible.
        recipe: how to start it, for a framework that has no hands-on notebook here.
    """

    id: str
    name: str = Field(min_length=1)
    kind: Literal["library", "server", "local engine", "mobile engine", "compiler", "web interface"]
    what: str = Field(min_length=1)
    repository: Https
    package: str | None
    licence: Literal["Apache-2.0", "MIT", "AGPL-3.0"]
    version: str | None
    last_release: Month
    status: Literal["active", "slow", "maintenance", "dormant", "archived"]
    optimisations: tuple[str, ...] = Field(min_length=1)
    quantisation: tuple[str, ...]
    streaming: bool
    openai_api: bool
    hardware: tuple[str, ...] = Field(min_length=1)
    models: tuple[Literal["chatglm", "baichuan", "qwen", "internlm2", "llama", "rwkv"], ...]
    claims: tuple[Claim, ...] = ()
    use_instead: tuple[str, ...] = ()
    seen: Seen | None
    recipe: Recipe | None = None
    note: str = ""
    sources: tuple[Source, ...] = Field(min_length=1)

    @field_validator("what")
    @classmethod
    def _one_sentence(cls, what: str) -> str:
        if not what.endswith(".") or ". " in what:
            raise ValueError("should be one sentence ending in a full stop")
        return what

    @field_validator("optimisations")
    @classmethod
    def _explained(cls, optimisations: tuple[str, ...]) -> tuple[str, ...]:
        for name in optimisations:
            if name not in ABBREVIATIONS:
                raise ValueError(f"{name!r} is not in ABBREVIATIONS: {', '.join(ABBREVIATIONS)}")
        return optimisations

    @model_validator(mode="after")
    def _says_where_to_go(self) -> Framework:
        if self.status in ("maintenance", "dormant", "archived") and not self.use_instead:
            raise ValueError(f"use_instead: missing, but the project is {self.status}")
        return self

    @model_validator(mode="after")
    def _a_server_says_where_it_listens(self) -> Framework:
        if self.openai_api and self.recipe and not self.recipe.listens:
            raise ValueError("recipe.listens: missing, but it serves")
        return self

    @model_validator(mode="after")
    def _as_alive_as_its_last_release(self) -> Framework:
        year, month = map(int, self.last_release.split("-"))
        looked = max(source.checked for source in self.sources)
        age = 12 * (looked.year - year) + looked.month - month
        if self.status == "active" and age > ALIVE_MONTHS:
            raise ValueError(f"status: active, but its last release was {age} months old when it was looked up")
        if self.status == "dormant" and age < ALIVE_MONTHS:
            raise ValueError(f"status: dormant, but its last release was {age} months old when it was looked up")
        return self


def read_frameworks(path: Path = FILE) -> dict[str, Framework]:
    """Read a framework file, checking every row and that ``use_instead`` names rows of it.

    Raises:
        HelpersError: naming the file, the row and the field.
    """
    rows = read_rows(path, Framework)
    for row in rows.values():
        for other in row.use_instead:
            if other not in rows or other == row.id:
                raise fault(path, f"{row.id}.use_instead", f"{other!r} is not another framework of this file")
    return rows


def frameworks() -> dict[str, Framework]:
    """Return every framework of the catalogue by id, in the order of the file."""
    return dict(_catalogue())


def framework(id: str) -> Framework:
    """Return one framework.

    Raises:
        HelpersError: there is no such id; the valid ones are listed.
    """
    rows = _catalogue()
    if id not in rows:
        raise unknown("framework", id, list(rows))
    return rows[id]


def stale(today: date, rows: Mapping[str, Framework] | None = None) -> list[str]:
    """List the sources nobody has looked at for more than a year: projects move and die faster than that.

    Args:
        today: the date to judge by.
        rows: the rows to judge; those of the catalogue if not given.

    Returns:
        A line for each such source, e.g. ``"tgi: https://... was last checked on 2025-01-31"``; empty if all is fresh.
    """
    looked_up = [
        (id, url, checked)
        for id, row in (_catalogue() if rows is None else rows).items()
        for url, checked in [
            *((source.url, source.checked) for source in row.sources),
            *((recipe.source, recipe.checked) for recipe in [row.recipe] if recipe),
        ]
    ]
    return [
        f"{id}: {url} was last checked on {checked}"
        for id, url, checked in looked_up
        if (today - checked).days > STALE_AFTER_DAYS
    ]


@cache
def _catalogue() -> dict[str, Framework]:
    return read_frameworks()
