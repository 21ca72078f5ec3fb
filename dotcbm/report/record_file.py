"""An audit's record as a JSON file: written whole or not at all, read with every key checked, older formats migrated.

The text is generated from the dataclasses of `dotcbm.report.record` and its neighbours by their type hints, and so is its schema (JSON
Schema, draft 2020-12; committed as `audit.schema.json` beside this file, and checked by a test). Floats have six significant digits, more
than any interval resolves; whole numbers are exact. "<" is written as an escape, so that the very text of a record can stand inside a
script element of a page.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import types
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from dotcbm.report.record import FORMAT, AuditRecord, PictureCard
from dotcbm.report.record_experts import ExpertLayer

__all__ = ["read_record", "record_from_dict", "record_from_json", "record_to_dict", "record_to_json", "schema", "write_record"]

_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def record_to_dict(record: AuditRecord) -> dict[str, Any]:
    """Plain JSON values.

    Raises:
        ValueError: A number is NaN or infinite, or a field holds something that its type hint does not allow.
    """
    return _encoded(record, AuditRecord, "")


def record_from_dict(values: object, *, name: str = "the record") -> AuditRecord:
    """The inverse of `record_to_dict`; older formats are migrated.

    Args:
        values: As JSON gives them.
        name: What errors call it, a file for example.

    Raises:
        ValueError: The format is newer than this version's, a key is missing or strange, a value is of the wrong kind, or rows,
            classes and concepts that cards refer to do not exist.
    """
    if not isinstance(values, dict) or not isinstance(values.get("format"), int):
        raise ValueError(f"{name} is no record of an audit: it has no whole number 'format'; give a file that `dotcbm audit` wrote")
    found = values["format"]
    if found > FORMAT:
        raise ValueError(
            f"{name} has format {found}, and this version of dotcbm reads formats up to {FORMAT}; upgrade dotcbm, or audit again"
        )
    if found < 1:
        raise ValueError(f"{name} has format {found}; formats are numbered from 1 on; audit again")
    for step in range(found, FORMAT):
        try:
            values = _MIGRATIONS[step](values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{name} says format {step} but is not ({type(error).__name__}: {error}); audit again") from error
    try:
        record = _decoded(values, AuditRecord, "")
        _check_references(record)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return record


def record_to_json(record: AuditRecord) -> str:
    """The text of the file: one line for each entry of a section, so that two records can be compared line by line."""
    lines = [f"{_dump(key)}: {_lines(value)}" for key, value in record_to_dict(record).items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def record_from_json(text: str, *, name: str = "the record") -> AuditRecord:
    """The inverse of `record_to_json`; errors as in `record_from_dict`, and for text that is no JSON."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{name} is damaged or cut short: {error.msg} at line {error.lineno}, column {error.colno} of {len(text)} characters; "
            "copy it again, or audit again"
        ) from error
    return record_from_dict(values, name=name)


def write_record(record: AuditRecord, path: str | Path) -> Path:
    """Write the file whole or not at all.

    Returns:
        The path.

    Raises:
        ValueError: As in `record_to_dict`.
    """
    return write_whole(Path(path), record_to_json(record).encode("utf-8"))


def read_record(path: str | Path) -> AuditRecord:
    """Read a file of any format up to `FORMAT`.

    Raises:
        ValueError: The file is missing, damaged, newer than this version, or not a record; see `record_from_dict`.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file; give the record that `dotcbm audit` wrote")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: byte {error.start} is no UTF-8; copy it again, or audit again") from error
    return record_from_json(text, name=str(path))


def write_whole(path: Path, content: bytes) -> Path:
    """Write a file such that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)  # mkstemp makes files for the owner only
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the current format, from the dataclasses."""
    definitions: dict[str, Any] = {}
    top = _schema_of(AuditRecord, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "dotcbm audit record",
        "description": f"Format {FORMAT}. See dotcbm/report/record.py for the meaning of each field.",
        **top,
        "$defs": dict(sorted(definitions.items())),
    }


@lru_cache
def _hints(kind: type) -> dict[str, Any]:
    """Type hints by field, in order."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


@lru_cache
def _choices(hint: Any) -> tuple[Any, ...]:
    """The members of a union; the hint itself if it is none."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _encoded(value: Any, hint: Any, place: str) -> Any:
    """JSON values of `value`, which must be what `hint` says."""
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, hint):
            raise ValueError(f"{place or 'the record'} is {value!r:.60}; expected {hint.__name__}")
        return {name: _encoded(getattr(value, name), kind, f"{place}.{name}".lstrip(".")) for name, kind in _hints(hint).items()}
    if get_origin(hint) is tuple:
        if not isinstance(value, tuple | list):
            raise ValueError(f"{place} is {value!r:.60}; expected a tuple")
        if (plain := _plain_numbers(value, hint)) is not None:
            return plain
        kinds = _element_hints(hint, len(value), place)
        return [_encoded(entry, kind, f"{place}[{i}]") for i, (entry, kind) in enumerate(zip(value, kinds))]
    choices = _choices(hint)
    if len(choices) > 1:
        return None if value is None else _encoded(value, next(kind for kind in choices if kind is not type(None)), place)
    return _leaf(value, hint, place)


def _leaf(value: Any, hint: Any, place: str) -> Any:
    """A number, text or choice, checked; floats rounded to six significant digits."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{place} is {value!r:.60}; expected one of {list(get_args(hint))}")
        return value
    allowed = (int, float) if hint is float else hint
    if not isinstance(value, allowed) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{place} is {value!r:.60}; expected {_NAMES[hint]}")
    if hint is not float:
        return value
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"{place} is {value}, which JSON cannot hold; use None for what is not known")
    return _rounded(value)


def _plain_numbers(values: typing.Sequence[Any], hint: Any) -> list[Any] | None:
    """The values as `_leaf` gives them if they are nothing but numbers that are right (most of a record); None to go one by one."""
    kinds = get_args(hint)
    if len(kinds) != 2 or kinds[1] is not Ellipsis:
        return None
    found, choices = set(map(type, values)), _choices(kinds[0])
    if not found <= {int, float, types.NoneType} or not found <= {int, *choices}:
        return None
    if int in choices:
        return list(values)
    if float not in choices or not all(map(math.isfinite, filter(None, values))):
        return None
    return [value if value is None else _rounded(value) for value in values]


def _rounded(value: float) -> float:
    """Six significant digits; whole numbers as they are, and no "-0.0"."""
    return int(value) + 0.0 if float(value).is_integer() else float(f"{value:.6g}")


def _element_hints(hint: Any, num: int, place: str) -> list[Any]:
    """The hint of each element of a tuple of `num` elements."""
    kinds = get_args(hint)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return [kinds[0]] * num
    if len(kinds) != num:
        raise ValueError(f"{place} has {num} entries; expected {len(kinds)}")
    return list(kinds)


def _decoded(value: Any, hint: Any, place: str) -> Any:
    """The inverse of `_encoded`."""
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise ValueError(f"{place or 'the record'} is {value!r:.60}; expected the keys {list(_hints(hint))}")
        prefix = f"{place}." if place else ""
        missing = [f"{prefix}{name}" for name in _hints(hint) if name not in value]
        strange = [f"{prefix}{name}" for name in value if name not in _hints(hint)]
        if missing or strange:
            said = [f"{what} {names[:5]}" for what, names in (("lacks", missing), ("has the unknown", strange)) if names]
            raise ValueError(f"it {' and '.join(said)}; format {FORMAT} knows {list(_hints(hint))} there; audit again")
        return hint(**{name: _decoded(value[name], kind, f"{prefix}{name}") for name, kind in _hints(hint).items()})
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{place} is {value!r:.60}; expected a list")
        if (plain := _plain_numbers(value, hint)) is not None:
            return tuple(plain)
        kinds = _element_hints(hint, len(value), place)
        return tuple([_decoded(entry, kind, f"{place}[{i}]") for i, (entry, kind) in enumerate(zip(value, kinds))])
    choices = _choices(hint)
    if len(choices) > 1:
        return None if value is None else _decoded(value, next(kind for kind in choices if kind is not type(None)), place)
    return _leaf(value, hint, place)


def _check_references(record: AuditRecord) -> None:
    """Columns of one length, and indices that exist.

    Raises:
        ValueError: Naming the place.
    """
    columns = record.pictures
    num, num_concepts, num_classes = len(columns.name), len(record.concepts), len(record.class_names)
    for field in fields(columns):
        held = len(getattr(columns, field.name))
        if held != num and (held or field.name in ("label", "predicted", "confidence", "true_probability")):
            raise ValueError(f"pictures.{field.name} has {held} entries for {num} pictures; audit again")
    for name in ("concept_probability", "concept_truth"):
        for i, row in enumerate(getattr(columns, name)):
            if len(row) != num_concepts:
                raise ValueError(f"pictures.{name}[{i}] has {len(row)} entries for {num_concepts} concepts; audit again")
    for name in ("label", "predicted"):
        _check_range(getattr(columns, name), num_classes, f"pictures.{name}", "classes")
    counts = record.confusion.count_KK
    if counts and {len(counts), *map(len, counts)} != {num_classes}:
        raise ValueError(f"confusion.count_KK has {len(counts)} rows for {num_classes} classes; audit again")
    _check_range([thumbnail.row for thumbnail in record.grid], num, "grid.row", "pictures")
    for name, cards in (("errors", record.errors), ("cards", record.cards)):
        for i, card in enumerate(cards):
            _check_card(card, f"{name}[{i}]", (num, num_concepts, num_classes))
    for i, layer in enumerate(record.experts):
        _check_experts(layer, f"experts[{i}]", num)


def _check_card(card: PictureCard, place: str, sizes: tuple[int, int, int]) -> None:
    """One card's indices, and as many values as its grid and its classes ask for."""
    num, num_concepts, num_classes = sizes
    _check_range([card.row], num, f"{place}.row", "pictures")
    _check_range(card.classes, num_classes, f"{place}.classes", "classes")
    _check_range([shown.concept for shown in card.concepts], num_concepts, f"{place}.concepts", "concepts")
    if len(card.class_logits) != len(card.classes):
        raise ValueError(f"{place}.class_logits has {len(card.class_logits)} entries for {len(card.classes)} classes; audit again")
    for i, shown in enumerate(card.concepts):
        for name, held, wanted in (("heat", shown.heat, card.grid[0] * card.grid[1]), ("slope_K", shown.slope_K, len(card.classes))):
            if held and len(held) != wanted:
                raise ValueError(f"{place}.concepts[{i}].{name} has {len(held)} entries; expected {wanted} or none; audit again")
        if any(not 0 <= level <= 255 for level in shown.heat):
            raise ValueError(f"{place}.concepts[{i}].heat leaves 0 ... 255; audit again")


def _check_experts(layer: ExpertLayer, place: str, num: int) -> None:
    """One layer's indices, and as many values as it has experts and patches."""
    num_experts, num_patches = len(layer.experts), layer.grid[0] * layer.grid[1]
    for t, table in enumerate(layer.tables):
        if len(table.lift_XE) != len(table.names) or {len(row) for row in table.lift_XE} - {num_experts}:
            raise ValueError(f"{place}.tables[{t}].lift_XE does not have {len(table.names)} rows of {num_experts} experts; audit again")
        _check_range([link.row for link in table.links], len(table.names), f"{place}.tables[{t}].links", "rows")
        _check_range([link.expert for link in table.links], num_experts, f"{place}.tables[{t}].links", "experts")
    pictures = [picture for expert in layer.experts for picture in expert.pictures]
    _check_range([picture.row for picture in (*pictures, *layer.maps)], num, f"{place}.pictures", "pictures")
    _check_range([cell for picture in pictures for cell in (*picture.cells, picture.surest)], num_patches, f"{place}.cells", "patches")
    for i, shown in enumerate(layer.maps):
        if len(shown.expert_P) != num_patches:
            raise ValueError(f"{place}.maps[{i}].expert_P has {len(shown.expert_P)} entries for {num_patches} patches; audit again")
        _check_range(shown.expert_P, num_experts, f"{place}.maps[{i}].expert_P", "experts")


def _check_range(indices: typing.Iterable[int], num: int, place: str, what: str) -> None:
    strange = next((index for index in indices if not 0 <= index < num), None)
    if strange is not None:
        raise ValueError(f"{place} speaks of number {strange}, and there are {num} {what}; audit again")


def _schema_of(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of one hint; dataclasses below the record go to `definitions`."""
    if is_dataclass(hint) and isinstance(hint, type):
        if hint is not AuditRecord and hint.__name__ in definitions:
            return {"$ref": f"#/$defs/{hint.__name__}"}
        written: dict[str, Any] = {"type": "object", "description": (hint.__doc__ or "").strip().split("\n")[0]}
        if hint is not AuditRecord:
            definitions[hint.__name__] = written
        properties = {name: _schema_of(kind, definitions) for name, kind in _hints(hint).items()}
        if hint is AuditRecord:
            properties["format"] = {"const": FORMAT}
        written |= {"properties": properties, "required": list(properties), "additionalProperties": False}
        return written if hint is AuditRecord else {"$ref": f"#/$defs/{hint.__name__}"}
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        if kinds[-1] is Ellipsis:
            return {"type": "array", "items": _schema_of(kinds[0], definitions)}
        entries = [_schema_of(kind, definitions) for kind in kinds]
        return {"type": "array", "prefixItems": entries, "items": False, "minItems": len(entries)}
    if get_origin(hint) is Literal:
        return {"enum": list(get_args(hint))}
    choices = _choices(hint)
    if len(choices) > 1:
        return {"anyOf": [_schema_of(kind, definitions) for kind in choices]}
    return {"type": {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}[hint]}


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _lines(value: Any) -> str:
    """One entry of the top level; lists of objects get a line each."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(f" {_dump(entry)}" for entry in value) + "\n]"
    if isinstance(value, dict):
        return "{\n" + ",\n".join(f" {_dump(key)}: {_dump(entry)}" for key, entry in value.items()) + "\n}"
    return _dump(value)


def _from_1(values: dict[str, Any]) -> dict[str, Any]:
    """Format 2 counts the pictures of intervention curves and the boxes of sweeps; format 1 did not know."""
    curves = [curve | {"num_pictures": None} for curve in values["interventions"]]
    sweeps = [sweep | {"num_boxes": None} for sweep in values["sweeps"]]
    return values | {"format": 2, "interventions": curves, "sweeps": sweeps}


def _from_2(values: dict[str, Any]) -> dict[str, Any]:
    """Format 3 says the coverage of each interval; before, all were 95 % intervals."""

    def levelled(value: Any) -> Any:
        if isinstance(value, list):
            return [levelled(entry) for entry in value] if value and isinstance(value[0], dict | list) else value
        if isinstance(value, dict):
            told = {key: levelled(entry) for key, entry in value.items()}
            return told | {"level": 0.95} if value.keys() == {"value", "low", "high", "n", "over"} else told
        return value

    return levelled(values) | {"format": 3}


def _from_3(values: dict[str, Any]) -> dict[str, Any]:
    """Format 4 counts the pictures behind a concept's share on the background and its fall when covered; before, nobody did."""
    concepts = [concept | {"num_mapped": None, "num_covered": None} for concept in values["concepts"]]
    return values | {"format": 4, "concepts": concepts}


def _from_4(values: dict[str, Any]) -> dict[str, Any]:
    """Format 5 tells of the encoder's experts; before, no audit looked for any."""
    return values | {"format": 5, "experts": []}


_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1, 2: _from_2, 3: _from_3, 4: _from_4}
"""From format f to f + 1."""
