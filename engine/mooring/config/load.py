"""TOML recipe + ``key=value`` overrides -> one checked RunConfig, and back to TOML.

Relative paths, in a recipe or an override, are relative to the current folder, as in a shell. The same
key given twice: the later override wins, and any override wins over the recipe.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from mooring.config.keys import DEFAULT_METHOD, METHODS, SECTIONS, SHORTHANDS, all_keys, find_key, nearest
from mooring.config.method_settings import CombinedSettings, MethodSettings, method_names
from mooring.config.schema import RunConfig
from mooring.config.tes_settings import TeSSettings
from mooring.errors import ConfigError
from mooring.parsing import parse_toml

_Flat = dict[str, Any]
_LOCAL_DIR = "local-dir:"  # timm's prefix of a model folder


def load_config(recipe: Path | str | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration that a recipe and overrides describe.

    An override that names another method than the recipe replaces the recipe's whole ``method`` table.
    With no recipe and ``resume=RUN``, the base is ``RUN/config.toml`` and ``out`` is RUN.

    Args:
        recipe: a TOML file, or the bare name of a shipped recipe (see ``shipped_recipes``).
        overrides: ``key=value`` texts. A value is read as TOML where it parses (``3``, ``true``,
            ``[0.9, 0.95]``), else as plain text; ``none`` resets an optional key. ``data=DIR`` and
            ``method=NAME`` are short for ``data.path`` and ``method.name``.

    Raises:
        ConfigError: lists every unknown key, wrong type and value out of range, one line each; or the
            run to resume is none, or is not the folder that ``out`` names.
    """
    problems: list[str] = []
    given = _parse_overrides(overrides, problems)
    resume = given.get("resume")
    run = Path(resume).expanduser() if isinstance(resume, str) and resume not in ("", "auto") else None
    if run is not None:
        if not run.is_dir():
            raise ConfigError(f"resume: expected a run folder, got {resume}")
        given["resume"] = str(run)
    if recipe is not None:
        base = _read(_find_recipe(recipe))
    elif run is not None and (run / "config.toml").is_file():
        base = _read(run / "config.toml") | {"out": str(run)}
    elif run is not None and "data.path" not in given:  # else the message would only ask for data
        raise ConfigError(f"resume: expected a run folder (with a config.toml), got {resume}")
    else:
        base = {}
    config = _build(_merge(base, given), problems)
    if run is not None and config.out is not None and config.out.resolve() != run.resolve():
        raise ConfigError(
            f"out: got {config.out} with resume={resume}; a continued run stays in its own folder: "
            "leave out= out, or give the same folder"
        )
    return config


def as_started(config: RunConfig) -> RunConfig:
    """A copy without how the run was continued: it describes the run, and repeats it elsewhere."""
    return config.model_copy(update={"resume": None, "allow_inexact": False})


def absolute_paths(config: RunConfig) -> RunConfig:
    """A copy whose input paths do not depend on the current folder: data, weights file, local model folder.

    ``out`` and ``resume`` stay as they are: they name the run, which may be moved.
    """
    model: dict[str, str] = {}
    if config.model.name.startswith(_LOCAL_DIR):
        model["name"] = _LOCAL_DIR + str(_absolute(config.model.name.removeprefix(_LOCAL_DIR)))
    if config.model.weights not in ("auto", "none"):
        model["weights"] = str(_absolute(config.model.weights))
    return config.model_copy(
        update={
            "data": config.data.model_copy(
                update={
                    "path": _absolute(config.data.path),
                    "extra_test": {name: _absolute(path) for name, path in config.data.extra_test.items()},
                }
            ),
            "model": config.model.model_copy(update=model),
            "report": config.report.model_copy(
                update={key: _absolute(path) for key, path in config.report if isinstance(path, Path)}
            ),
            "method": _absolute_method(config.method),
        }
    )


def _absolute_method(method: MethodSettings) -> MethodSettings:
    if isinstance(method, CombinedSettings):
        parts = tuple(_absolute_method(part) for part in method.parts)
        return method.model_copy(update={"parts": parts})
    paths = {key: value for key, value in method if isinstance(value, Path)}
    update: dict[str, Path | str] = {key: _absolute(path) for key, path in paths.items()}
    if isinstance(method, TeSSettings) and method.text != "auto":
        update["text"] = str(_absolute(method.text))  # of FILE.npz:SET the set stays at the end
    return method.model_copy(update=update)


def _absolute(path: Path | str) -> Path:
    return Path(path).expanduser().absolute()  # links stay: they may be switched to another copy of the data


def config_from_toml(text: str) -> RunConfig:
    """The configuration written by ``to_toml``: ``config_from_toml(to_toml(c)) == c``.

    Raises:
        ConfigError: as ``load_config``.
    """
    return _build(_parse(text, "the configuration"), [])


def to_toml(config: RunConfig) -> str:
    """All settings as TOML, with defaults; keys that are None are left out."""
    tree = config.model_dump(mode="json", exclude_none=True)
    if isinstance(config.method, CombinedSettings):
        tree["method"] = _flat_methods(config.method)
    return tomli_w.dumps(tree)


def _flat_methods(method: CombinedSettings) -> _Flat:
    """The names as a list and the settings of all parts in one table, as a user writes them."""
    table: _Flat = {"name": [part.name for part in method.parts]}
    tables = [part.model_dump(mode="json", exclude_none=True) for part in method.parts]
    for key in dict.fromkeys(key for part in tables for key in part if key != "name"):
        values = [part[key] for part in tables if key in part]
        if all(value == values[0] for value in values):  # else they are different defaults, and stay so
            table[key] = values[0]
    return table


def shipped_recipes() -> dict[str, Traversable]:
    """Bare name -> file of the recipes that come with the package."""
    folder = files("mooring.config") / "recipes"
    found = (entry for entry in folder.iterdir() if entry.name.endswith(".toml"))
    return {entry.name.removesuffix(".toml"): entry for entry in sorted(found, key=lambda entry: entry.name)}


def _find_recipe(recipe: Path | str) -> Traversable:
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise ConfigError(
            f"{recipe}: expected a recipe (a TOML file), got a folder; "
            f"for a folder of images write data={recipe}"
        )
    shipped = shipped_recipes()
    if str(recipe) in shipped:
        return shipped[str(recipe)]
    close = nearest(str(recipe), tuple(shipped))
    raise ConfigError(
        f"{recipe}: no such recipe file; shipped recipes are {', '.join(shipped)}"
        + (f", the nearest is {close}" if close else "")
        + "; a setting is written key=value"
    )


def _read(file: Traversable) -> _Flat:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{file}: cannot be read as text: {err}") from None
    return _parse(text, str(file))


def _parse(text: str, origin: str) -> _Flat:
    try:
        tree = parse_toml(text)
    except ValueError as err:
        raise ConfigError(f"{origin}: not valid TOML: {err}") from None
    return dict(_flatten(tree))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = prefix + name
        if isinstance(value, Mapping):
            yield from _flatten(value, key + ".")
        else:
            yield SHORTHANDS.get(key, key), value


def _parse_overrides(overrides: Sequence[str], problems: list[str]) -> _Flat:
    given: _Flat = {}
    for override in overrides:
        key, equals, raw = override.partition("=")
        key = key.strip()
        if not equals or not key:
            problems.append(f"{override}: got {_shown(override)}; expected key=value, as in train.epochs=20")
        else:
            given.update(_override(key, raw.strip()))
    return given


def _override(key: str, raw: str) -> Iterable[tuple[str, Any]]:
    name = SHORTHANDS.get(key, key)
    known = find_key(name)
    if known is not None and known.optional and raw.lower() in ("none", "null"):
        return [(name, None)]
    try:
        tree = parse_toml(f"value = {raw}")
        value = tree["value"] if set(tree) == {"value"} else raw
    except ValueError:
        value = raw
    if isinstance(value, Mapping):
        return _flatten(value, key + ".")
    if name == "method.name" and isinstance(value, list):
        return [(name, value)]
    if known is not None and known.text and not isinstance(value, str):
        value = raw  # data=2024 names a folder, not a number
    return [(name, value)]


def _merge(base: _Flat, given: _Flat) -> _Flat:
    before = method_names(base.get("method.name", DEFAULT_METHOD))
    if method_names(given.get("method.name", before)) != before:
        base = {key: value for key, value in base.items() if not key.startswith("method.")}
    return base | given


def _build(flat: _Flat, problems: list[str]) -> RunConfig:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        problem = _unknown(key, value, flat.get("method.name", DEFAULT_METHOD))
        if problem is not None:
            problems.append(problem)
            continue
        *parents, leaf = _path(key)
        if value is None and key not in all_keys():
            continue  # an entry of a table that is taken out again
        table = tree
        for parent in parents:
            table = table.setdefault(parent, {})
        table[leaf] = value
    if "data" not in tree:
        tree["data"] = {}  # so that its missing path is reported like any other key
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as err:
        problems += _explain(err, flat)
    else:
        if not problems:
            return config
    count = "1 setting is wrong" if len(problems) == 1 else f"{len(problems)} settings are wrong"
    raise ConfigError("\n  ".join([f"{count}:", *problems]))


def _path(key: str) -> list[str]:
    """Where a key stands in the tree of settings; the name of a table's entry is one part, dots and all."""
    for known in all_keys().values():
        if known.table and key.startswith(known.name + "."):
            return [*known.name.split("."), key.removeprefix(known.name + ".")]
    return key.split(".")


def _unknown(key: str, value: Any, method: Any) -> str | None:
    """What is wrong with the key itself, or None."""
    names = all_keys()
    known = find_key(key)
    if known is None:
        got = f"{key}: got {_shown(value)}; "
        if key in SECTIONS:
            example = next(name for name in names if name.startswith(key + "."))
            return got + f"expected a table of settings, such as {example}"
        close = nearest(key, tuple(names))
        return got + "there is no such key" + (f", the nearest is {close}" if close else "")
    chosen = method_names(method)
    if known.methods and set(chosen) <= set(METHODS) and not set(chosen) & set(known.methods):
        owners = " and ".join(known.methods)
        return (
            f"{key}: got {_shown(value)}; method {'+'.join(chosen)} has no such key, it belongs to {owners}"
        )
    return None


def _explain(err: ValidationError, flat: _Flat) -> list[str]:
    lines: dict[str, str] = {}
    for problem in err.errors(include_url=False):
        where = [part for part in problem["loc"] if isinstance(part, str)]
        if where[:3] == ["method", "combined", "parts"]:
            if problem["type"] == "too_short" and flat.get("method.name") and len(err.errors()) > 1:
                continue  # a wrong part is left out of the count; it has an error of its own
            # the list's own errors are about the names; the rest: the union's tag, the list, the part's tag
            where = ["method", "name"] if len(where) == 3 else [where[0], *where[4:]]
        elif where[0] == "method" and len(where) > 1:
            del where[1]  # the union's tag
        key = ".".join(where)
        while find_key(key) is None and find_key(key.rpartition(".")[0]) is not None:
            key = key.rpartition(".")[0]  # which member of a union was tried
        if problem["type"].startswith("union_tag"):
            key = "method.name"
        known = find_key(key)
        if problem["type"] == "value_error":
            got = f"got {_shown(flat[key])}; " if key in flat else ""
            lines[key] = f"{key}: {got}{problem.get('ctx', {}).get('error')}"
        elif problem["type"] == "missing" and key == "data.path":
            lines[key] = "data: got nothing; expected the images: add data=DIR"
        else:
            expected = known.expected if known is not None else problem["msg"]
            line = f"{key}: got {_shown(flat.get(key))}; expected {expected}"
            close = nearest(str(flat.get(key)), known.choices) if known is not None else None
            lines[key] = line + (f"; the nearest is {close}" if close else "")
    return list(lines.values())


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
