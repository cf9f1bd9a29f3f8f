"""Every dotted key a user may set, derived from the schema: its default, and in words what it accepts."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mooring.config.method_settings import DRTuneSettings, Settings, method_tables
from mooring.config.schema import RunConfig

# Short forms: the section's own name stands for one of its keys.
SHORTHANDS = {"data": "data.path", "method": "method.name"}

DEFAULT_METHOD: str = DRTuneSettings().name


@dataclass(frozen=True, slots=True)
class Key:
    """One settable key.

    Attributes:
        name: dotted, ``train.epochs``.
        expected: what it accepts, in words: ``an integer >= 1``.
        default: as JSON knows it (a path is text, a tuple a list); None also where it must be given.
        required: a run cannot do without it.
        description: one line for the user.
        choices: the allowed words, or empty.
        text: the value is text or a path, so ``key=2024`` means the text ``2024``.
        optional: ``key=none`` resets it.
        methods: the methods that have it; empty for keys of every run.
    """

    name: str
    expected: str
    default: Any
    required: bool
    description: str
    choices: tuple[str, ...]
    text: bool
    optional: bool
    methods: tuple[str, ...] = ()
    table: bool = False  # of entries under names that the user chooses: ``data.extra_test.NAME``


METHODS: dict[str, type[Settings]] = method_tables()


def _without_none(annotation: Any) -> tuple[Any, bool]:
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        if len(members) < len(get_args(annotation)):
            return members[0] if len(members) == 1 else Union[tuple(members)], True  # noqa: UP007  made at run time
    return annotation, False


def _range(metadata: list[Any]) -> str:
    lower = upper = ""
    words = []
    for limit in metadata:
        match limit:
            case annotated_types.Ge(ge=bound):
                lower = f"{bound}"
                words.append(f">= {bound}")
            case annotated_types.Gt(gt=bound):
                words.append(f"> {bound}")
            case annotated_types.Le(le=bound):
                upper = f"{bound}"
                words.append(f"<= {bound}")
            case annotated_types.Lt(lt=bound):
                words.append(f"< {bound}")
    if lower and upper:
        return f" from {lower} to {upper}"
    return " " + " and ".join(words) if words else ""


def _items(annotation: Any) -> str:
    items = get_args(annotation)
    first = items[0]
    if first is str:
        return "a list of texts"
    limits: list[Any] = []
    if get_origin(first) is Annotated:
        for note in get_args(first)[1:]:
            limits += note.metadata if isinstance(note, FieldInfo) else [note]
    count = "" if items[-1] is Ellipsis else f"{len(items)} "
    return f"a list of {count}numbers{_range(limits)}"


def _expected(annotation: Any, metadata: list[Any]) -> str:
    if get_origin(annotation) is dict:
        return f"a table of NAME = {_expected(get_args(annotation)[1], [])}"
    if get_origin(annotation) is Annotated:
        inner, *notes = get_args(annotation)
        return _expected(inner, [limit for note in notes for limit in getattr(note, "metadata", [note])])
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        return " or ".join(_expected(member, metadata).removeprefix("one of ") for member in members)
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(str, get_args(annotation)))
    if get_origin(annotation) is tuple:
        return _items(annotation)
    if annotation is str:
        return "text" + (
            ", not empty" if any(isinstance(m, annotated_types.MinLen) for m in metadata) else ""
        )
    kind = {bool: "true or false", int: "an integer", float: "a number", Path: "a path"}
    return kind[annotation] + (_range(metadata) if annotation in (int, float) else "")


def _key(name: str, field: FieldInfo, methods: tuple[str, ...] = ()) -> Key:
    annotation, optional = _without_none(field.annotation)
    default = field.get_default(call_default_factory=True) if not field.is_required() else None
    if isinstance(default, Path):
        default = str(default)
    elif isinstance(default, tuple):
        default = list(default)
    literal = get_origin(annotation) is Literal
    table = get_origin(annotation) is dict
    return Key(
        name=name,
        expected=_expected(annotation, field.metadata) + (", or none" if optional else ""),
        default=default,
        required=field.is_required(),
        description=field.description or "",
        choices=tuple(map(str, get_args(annotation))) if literal else (),
        text=literal or annotation in (str, Path),
        optional=optional,
        methods=methods,
        table=table,
    )


def _walk() -> Iterator[Key]:
    for section, field in RunConfig.model_fields.items():
        if section == "method":
            yield Key(
                name="method.name",
                expected="one of " + ", ".join(METHODS) + ", or a list of those that combine",
                default=DEFAULT_METHOD,
                required=False,
                description="the fine-tuning method",
                choices=tuple(METHODS),
                text=True,
                optional=False,
            )
            owners: dict[str, list[str]] = {}
            for method, table in METHODS.items():
                for name in table.model_fields:
                    if name != "name":
                        owners.setdefault(name, []).append(method)
            for name, methods in owners.items():
                yield _key(f"method.{name}", METHODS[methods[0]].model_fields[name], tuple(methods))
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            for name, inner in field.annotation.model_fields.items():
                yield _key(f"{section}.{name}", inner)
        else:
            yield _key(section, field)


@cache
def all_keys() -> dict[str, Key]:
    """Dotted name -> key, in the order of the schema; a method's keys once for all its methods."""
    return {key.name: key for key in _walk()}


def find_key(name: str) -> Key | None:
    """The key that ``name`` sets: one of ``all_keys``, or an entry of a table, ``data.extra_test.NAME``."""
    known = all_keys().get(name)
    if known is not None:
        return known
    for key in all_keys().values():
        if key.table and name.startswith(key.name + "."):
            return replace(
                key,
                name=name,
                expected=key.expected.removeprefix("a table of NAME = ") + ", or none",
                default=None,
                text=True,
                optional=True,
                table=False,
            )
    return None


SECTIONS: tuple[str, ...] = tuple(
    name
    for name, field in RunConfig.model_fields.items()
    if name == "method" or (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel))
)


def nearest(word: str, names: tuple[str, ...]) -> str | None:
    """The name that looks most like ``word``, or None where none does.

    Dotted names are compared whole and by their last part, so that ``epochs`` finds ``train.epochs``.
    """

    def likeness(name: str) -> float:
        whole = SequenceMatcher(None, word, name).ratio()
        last = SequenceMatcher(None, word.rpartition(".")[2], name.rpartition(".")[2]).ratio()
        return max(whole, 0.9 * last + 0.1 * whole)  # equal last parts: the more alike section wins

    best = max(names, key=likeness, default=None)
    return best if best is not None and likeness(best) >= 0.6 else None
