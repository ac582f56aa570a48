"""Read the catalogue's YAML into typed rows; every failure names the file, the row and the field."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path
from typing import Annotated, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ..errors import HelpersError


def _not_in_the_future(day: date) -> date:
    if day > date.today() + timedelta(days=1):  # a day's grace: somewhere it is tomorrow already
        raise ValueError(f"{day} is in the future")
    return day


Day = Annotated[date, AfterValidator(_not_in_the_future)]
Https = Annotated[str, Field(pattern=r"^https://[^\s/]+\.[^\s/]+(/\S*)?$")]


class Fact(BaseModel):
    """Base of everything in the catalogue: unknown keys are refused, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Source(Fact):
    """Where a fact was read, and when someone last looked."""

    url: Https
    checked: Day
    note: str = ""


Row = TypeVar("Row", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but as in YAML 1.2 only true and false are booleans: `yes` and `no` stay words."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool" or first in "tTfF"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_rows(path: Path, row_class: type[Row]) -> dict[str, Row]:
    """Read a YAML mapping of row id -> row.

    Args:
        path: the file, e.g. ``helpers/catalog/models.yaml``.
        row_class: the pydantic class of a row. If it has a field ``id``, that is filled with the row's id.

    Returns:
        The rows in the order of the file.

    Raises:
        HelpersError: the file is missing, is not YAML, gives a key twice, or a row does not fit ``row_class``; e.g.
            ``models.yaml: chatglm3-6b.shape.layers: Input should be greater than 0``.
    """
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        _refuse_twice(path, node, "")
        rows = loader.construct_document(node) if node else None
    except OSError as error:
        raise fault(path, "", error.strerror or str(error)) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are not UTF-8, a date such as 2026-13-40
        raise fault(path, "", "not valid YAML: " + " ".join(str(error).split())) from None
    if not isinstance(rows, dict) or not rows:
        raise fault(path, "", "should be a mapping of row id to row")
    return {str(row_id): _row(path, str(row_id), row, row_class) for row_id, row in rows.items()}


def fault(path: Path, place: str, why: str) -> HelpersError:
    """The error for one place in one catalogue file; `place` is a row and field (or a line), joined by dots."""
    return HelpersError(f"{path.name}: {place}" if place else path.name, why, f"correct {path}")


def reason(error: ValidationError) -> tuple[str, str]:
    """The first complaint of pydantic as (field, why); further ones are counted."""
    first, *others = error.errors(include_url=False)
    more = f" (and {len(others)} more)" if others else ""
    return ".".join(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ") + more


def _row(path: Path, row_id: str, row: object, row_class: type[Row]) -> Row:
    if not isinstance(row, dict):
        raise fault(path, row_id, "should be a mapping of field to value")
    if "id" in row_class.model_fields:
        if "id" in row:
            raise fault(path, f"{row_id}.id", "the key of the row is its id: remove this field")
        row = {"id": row_id, **row}
    try:
        return row_class.model_validate(row)
    except ValidationError as error:
        field, why = reason(error)
        raise fault(path, f"{row_id}.{field}" if field else row_id, why) from None


def _refuse_twice(path: Path, node: yaml.Node | None, place: str) -> None:
    """YAML keeps the last of two equal keys without a word, which would drop a row or a fact."""
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _refuse_twice(path, item, f"{place}.{number}")
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[object, int] = {}
    for key, value in node.value:
        name, line = key.value if isinstance(key.value, str) else str(key.start_mark), key.start_mark.line + 1
        here = f"{place}.{name}" if place else name
        if name in seen:
            raise fault(path, here, f"given twice, in lines {seen[name]} and {line}")
        seen[name] = line
        _refuse_twice(path, value, here)
