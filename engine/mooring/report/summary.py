"""What ``mooring info`` shows: this installation, a run, or all settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from mooring.config.keys import all_keys
from mooring.config.load import load_config, shipped_recipes
from mooring.config.method_settings import method_title
from mooring.errors import RunFolderError
from mooring.parsing import parse_json
from mooring.regular_file import read_regular
from mooring.report.metrics import counted, duration, shown_metrics
from mooring.report.metrics_log import FILE_NAME, read_metrics
from mooring.report.records import from_json_number
from mooring.report.run_folder import existing_run
from mooring.report.table import Row, results_table


def installation_summary() -> list[RenderableType]:
    """Versions, processor, and which optional parts are there."""
    from mooring.report.environment import collect_environment, optional_parts

    found = collect_environment()
    cpu = found["cpu"]
    commit, changed, _ = (found["commit"] or "").partition("+changes")
    facts = _facts(
        {
            "mooring": found["mooring"]
            + (f" ({commit[:10]}{' and changes' * bool(changed)})" if commit else ""),
            "python": found["python"],
            "system": found["system"],
            "cpu": f"{cpu['model']}, {cpu['capability']}",
            "threads": f"{cpu['threads']} for torch, {cpu['cores']} cores",
            **found["packages"],
        }
    )
    parts = Table(title="Optional parts", title_justify="left", show_header=False, box=None)
    for name, (usable, text) in optional_parts().items():
        parts.add_row("[green]yes[/]" if usable else "[yellow]no[/]", name, escape(text))
    return [facts, "", parts, "", f"Recipes: {', '.join(shipped_recipes())}"]


def run_summary(run: Path) -> list[RenderableType]:
    """Settings, result and files of a run.

    Raises:
        RunFolderError: it is not a run folder.
    """
    folder = existing_run(run)
    config = load_config(run / "config.toml")
    shown: list[RenderableType] = [
        _facts(
            {
                "run": str(run),
                "data": str(config.data.path),
                "model": config.model.name,
                "method": method_title(config.method),
                "epochs": str(config.train.epochs),
                "batch": f"{config.train.batch_size} x {config.train.accumulate}",
                "seed": str(config.seed),
            }
        )
    ]
    if not (run / "result.json").is_file():
        done = read_metrics(run) if (run / FILE_NAME).is_file() else []
        steps = done[-1].step if done else 0
        shown.append(
            f"\nNot finished: {counted(steps, 'step')} logged. "
            f"Continue with  mooring train --resume {escape(str(run))}"
        )
        return shown
    result = folder.read_json("result.json")
    try:
        shown += _result(result, _class_count(run))
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise RunFolderError(
            f"{run / 'result.json'}: expected the result of a run, got other content "
            f"({type(err).__name__}: {err}): continue the run with  mooring train --resume {run}"
        ) from None
    files = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in run.iterdir())
    shown.append("Files: " + escape(", ".join(name for name in files if not name.startswith("."))))
    return shown


def _result(result: Mapping[str, Any], classes: int | None) -> list[RenderableType]:
    parts: list[RenderableType] = []
    measured = {split: result[split] for split in ("val", "test") if result.get(split)}
    measured |= {f"test/{name}": values for name, values in result.get("extra_tests", {}).items()}
    moved = result.get("distortion", {})
    rows = [Row(name, _numbers(values | moved.get(name, {}))) for name, values in measured.items()]
    if rows:
        names = ["top1", "top5", "mean_per_class", "ece", "nll"]
        names += ["feature_cosine", "feature_distance"] * bool(moved)
        columns = shown_metrics(names, classes)
        parts += ["", results_table(rows, columns, first="split")]
    if beyond := result.get("discrimination"):
        rows = [Row(name, _numbers(values)) for name, values in beyond.items()]
        parts.append(results_table(rows, list(rows[0].values), first="encoder"))
    end = "Interrupted" if result["interrupted"] else "Finished"
    best = "" if result["best_epoch"] is None else f", best epoch {result['best_epoch'] + 1}"
    speed = f"{from_json_number(result['images_per_second']):.0f} images/s"
    parts.append(f"{end} after {duration(from_json_number(result['seconds']))}{best}, {speed}")
    return parts


def _class_count(run: Path) -> int | None:
    """C as the run's manifest tells it; None where that cannot be read."""
    try:
        head = parse_json(read_regular(run / "manifest" / "manifest.json"))
        return len(head["classes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def settings_tables() -> list[RenderableType]:
    """Every key with its type, default and meaning, a table per section."""
    sections: dict[str, Table] = {}
    for key in all_keys().values():
        section = key.name.partition(".")[0] if "." in key.name else "run"
        if section not in sections:
            sections[section] = Table(title=section, title_justify="left", expand=True)
            for title, ratio in (("key", 4), ("expects", 4), ("default", 3), ("", 6)):
                sections[section].add_column(title, ratio=ratio, overflow="fold")
        default = (
            "must be given" if key.required else "none" if key.default is None else json.dumps(key.default)
        )
        meaning = key.description + (f" [{', '.join(key.methods)}]" if key.methods else "")
        sections[section].add_row(key.name, escape(key.expected), escape(default), escape(meaning))
    return list(sections.values())


def _facts(values: Mapping[str, str]) -> Table:
    table = Table(show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(name, escape(value))
    return table


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: from_json_number(value) for name, value in values.items()}
