"""``python -m bench.distributed.tables``: RESULTS.md and the README's tables of several ranks, from records alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.distributed.runs import FOLDER
from bench.environment import ROOT
from bench.readme_block import with_block

RESULTS = ROOT / "bench" / "distributed" / "RESULTS.md"
Record = Mapping[str, Any]
_BEGIN, _END = "<!-- several ranks -->", "<!-- end of several ranks -->"
_BACKENDS = ("ddp", "zero0", "zero1", "zero2", "zero3")
# What exchanges are for -> the column of the table that they stand in.
_COLUMNS = {
    "gradients": "gradients", "parameters": "parameters", "bank rows": "banks", "bank statistics": "banks",
    "queue queries": "banks", "queue sums": "banks", "queue gradient": "banks",
}  # fmt: skip
_LITTLE = 100  # bytes: flags, norms, the number of rows
_PARTS = ("forward", "backward", "exchange", "optimizer", "banks")


def newest(name: str, key: Sequence[str], folder: Path = FOLDER) -> list[Record]:
    """The newest record of each measurement; none where there is no file."""
    file, found = folder / f"{name}.jsonl", {}
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            found[tuple(record[part] for part in key)] = record
    return list(found.values())


def equality_records(folder: Path = FOLDER) -> list[Record]:
    return newest("equality", ("method", "kind", "world", "backend"), folder)


def traffic_records(folder: Path = FOLDER) -> list[Record]:
    return newest("traffic", ("method", "kind", "scope", "world", "backend"), folder)


def scaling_records(folder: Path = FOLDER) -> list[Record]:
    return newest("weak_scaling", ("method", "scope", "world", "backend"), folder)


def memory_records(folder: Path = FOLDER) -> list[Record]:
    return newest("memory", ("case", "world", "zero_stage"), folder)


# ---------------------------------------------------------------- equality


def equality_summary(records: Sequence[Record]) -> str:
    """One sentence on all cells."""
    equal = [record for record in records if record["problem"] is None]
    loss, moved = (max(r[f"{name}_difference"] for r in equal) for name in ("loss", "movement"))
    return (
        f"{len(equal)} of {len(records)} cells (every method, ViT and CNN, plain data parallelism and ZeRO 0 to 3, 2 "
        f"and 4 ranks) are equal to one process: losses differ by at most {loss:.0e} relative, and no tensor ends "
        f"farther than {100 * moved:.1g} % of its movement from where one process has it."
    )


def equality_tables(records: Sequence[Record]) -> str:
    """Relative difference of losses, and of weights in shares of their movement; the largest over steps and tensors."""
    by_cell = {(r["method"], r["kind"], r["world"], r["backend"]): r for r in records}
    methods = sorted({r["method"] for r in records})
    text = []
    for kind in ("vit", "cnn"):
        for world in (2, 4):
            rows = [
                [method, *(_cell(by_cell.get((method, kind, world, backend))) for backend in _BACKENDS)]
                for method in methods
            ]
            text += [f"{_NETWORKS[kind]}, {world} ranks:", "", table(["method", *_BACKENDS], rows)]
    return "\n".join(text)


_NETWORKS = {"vit": "ViT", "cnn": "CNN"}


def _cell(record: Record | None) -> str:
    if record is None:
        return ""
    if record["problem"] is not None:
        return "**differs**"
    return f"{record['loss_difference']:.0e}, {record['movement_difference']:.0e}"


# ---------------------------------------------------------------- traffic


def traffic_table(records: Sequence[Record], chosen: Callable[[Record], bool]) -> str:
    """Kilobytes that a rank hands over in a step, and what leaves it by a ring."""
    rows = []
    for record in filter(chosen, records):
        columns = {"gradients": 0.0, "parameters": 0.0, "banks": 0.0, "the rest": 0.0}
        for purpose, count in record["handed"].items():
            columns[_COLUMNS.get(purpose, "the rest")] += count
        rest = sorted(
            (name for name in record["handed"] if name not in (*_COLUMNS, "agreement", "rows")),
            key=lambda name: -record["handed"][name],
        )
        scope = f", {record['scope']}" if record["scope"] else ""
        rows.append(
            [
                record["method"] + scope, _NETWORKS[record["kind"]], record["backend"], str(record["world"]),
                *(_kilobytes(value) for value in columns.values()), ", ".join(rest),
                _kilobytes(sum(record["sent"].values())), f"{record['background']:.0%}",
            ]
        )  # fmt: skip
    header = [
        "method", "network", "backend", "ranks", "gradients", "parameters", "banks, queues", "the rest",
        "the rest: of what", "sent by a ring", "in the background",
    ]  # fmt: skip
    return table(header, rows)


def _kilobytes(count: float) -> str:
    kilobytes = count / 1e3
    return "" if count == 0 else f"{kilobytes:,.0f}" if kilobytes >= 10 else f"{kilobytes:.2g}"


# ---------------------------------------------------------------- weak scaling


def scaling_table(records: Sequence[Record]) -> str:
    """CPU seconds of a rank and step, efficiency against one process, and the parts on the most ranks."""
    alone = {(r["method"], r["scope"]): r for r in records if r["world"] == 1}
    cases = list(dict.fromkeys((r["method"], r["scope"], r["backend"]) for r in records if r["world"] > 1))
    found = {(r["method"], r["scope"], r["backend"], r["world"]): r for r in records}
    worlds = sorted({r["world"] for r in records if r["world"] > 1})
    rows = []
    for method, scope, backend in cases:
        # one process has one bank, however several would share theirs
        one = alone.get((method, scope)) or next(r for (name, _), r in alone.items() if name == method)
        row = [method + (f", {scope}" if scope else ""), backend, f"{one['process_seconds']:.2f}"]
        for world in worlds:
            record = found.get((method, scope, backend, world))
            row.append("" if record is None else _scaled(record, one))
        last = found.get((method, scope, backend, worlds[-1]))
        row += [f"{last['part_seconds'].get(part, 0.0):.2f}" if last else "" for part in _PARTS]
        row.append(f"{last['exchange_wall_seconds']:.2f} of {last['wall_seconds']:.2f}" if last else "")
        rows.append(row)
    header = [
        "method", "backend", "one process", *(f"{world} ranks" for world in worlds),
        *(f"{part} at {worlds[-1]}" for part in _PARTS), f"waiting at {worlds[-1]}, wall",
    ]  # fmt: skip
    return table(header, rows)


def _scaled(record: Record, one: Record) -> str:
    return f"{record['process_seconds']:.2f} ({one['process_seconds'] / record['process_seconds']:.0%})"


# ---------------------------------------------------------------- memory


def memory_table(records: Sequence[Record]) -> str:
    """Megabytes of a rank at the worst moment of a step: measured, predicted, and of what the prediction is made."""
    rows = []
    for record in records:
        measured, predicted = record["measured"]["worst_moment"], record["predicted"]["worst_moment"]
        parts = ("parameters", "gradients", "optimizer", "buffers", "activations", "constants", "banks")
        rows.append(
            [
                record["case"], str(record["zero_stage"]), f"{measured / 1e6:,.0f}", f"{predicted / 1e6:,.0f}",
                f"{predicted / measured - 1:+.1%}", *(f"{record['predicted'][part] / 1e6:,.0f}" for part in parts),
            ]
        )  # fmt: skip
    header = [
        "model and method",
        "ZeRO",
        "measured",
        "predicted",
        "off by",
        "parameters",
        "gradients",
        "optimizer",
    ]
    return table([*header, "buffers", "activations", "frozen", "banks"], rows)


# ---------------------------------------------------------------- pages


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    marks = ["---", *("---:" for _ in header[1:])]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, marks, *rows))


def sources(records: Sequence[Record]) -> str:
    """Where and from which source records were made."""
    machines = sorted(
        {
            f"{r['environment']['cpu']}, {r['environment']['cores']} cores, torch {r['environment']['torch']}"
            for r in records
        }
    )
    return f"{'; '.join(machines)}; commit {', '.join(sorted({r['commit'] for r in records}))}"


def results(folder: Path = FOLDER) -> str:
    """All tables with what must be read with them."""
    equality, traffic = equality_records(folder), traffic_records(folder)
    scaling, memory = scaling_records(folder), memory_records(folder)
    text = [
        "# Several ranks", "",
        "Drawn from `bench/records/distributed/*.jsonl` by `python -m bench.distributed.tables`. Gloo ranks of one "
        "machine, random images; README.md beside this file says how each figure is made and what it does not say.", "",
    ]  # fmt: skip
    if equality:
        text += ["## Equal to one process", "", equality_summary(equality), ""]
        text += ["Each cell: losses, weights.", "", equality_tables(equality)]
        text += [f"- `python -m bench.distributed.equality`; {sources(equality)}.", ""]
    if traffic:
        text += ["## Bytes of a step", "", "In kB of 1,000 bytes, of one rank.", ""]
        text += [traffic_table(traffic, lambda record: True)]
        text += [f"- `python -m bench.distributed.traffic`; {sources(traffic)}.", ""]
    if scaling:
        text += [
            "## Weak scaling",
            "",
            "In CPU seconds of a rank and step, 16 images each.",
            "",
            scaling_table(scaling),
        ]
        text += [f"- `python -m bench.distributed.weak_scaling`; {sources(scaling)}.", ""]
    if memory:
        text += [
            "## Memory predicted and measured",
            "",
            "In MB, of one of two ranks.",
            "",
            memory_table(memory),
        ]
        text += [f"- `python -m bench.distributed.memory`; {sources(memory)}.", ""]
    return "\n".join(text).rstrip() + "\n"


def readme_block(folder: Path = FOLDER) -> str:
    """What stands between the markers of the README."""
    equality, traffic = equality_records(folder), traffic_records(folder)
    scaling, memory = scaling_records(folder), memory_records(folder)
    most = max((record["world"] for record in traffic), default=0)
    text = [_BEGIN, equality_summary(equality), ""]
    text += [
        f"Bytes of a step on a ViT-tiny, {most} ranks, 16 images in all, kB; methods that are not here exchange "
        "gradients alone, as `fine_tune` does:", "",
        traffic_table(traffic, lambda record: record["world"] == most and _is_shown(record)),
    ]  # fmt: skip
    if scaling:
        text += [
            "Weak scaling, CPU seconds of a rank and step (efficiency), ViT-tiny, 96 pixels, 16 images a rank:"
        ]
        text += ["", scaling_table(scaling)]
    if memory:
        text += ["Memory of one of two ranks at the worst moment of a step, MB:", "", memory_table(memory)]
    return "\n".join(text).rstrip() + f"\n{_END}"


def _is_shown(record: Record) -> bool:
    """Whether the README has the row: on the ViT, and not the same as plain fine-tuning's."""
    own = sum(count for name, count in record["handed"].items() if name not in ("gradients", "parameters"))
    return record["kind"] == "vit" and (own > _LITTLE or record["method"] in ("fine_tune", "linear_probe"))


def main() -> None:
    argparse.ArgumentParser(prog="python -m bench.distributed.tables", description=__doc__).parse_args()
    RESULTS.write_text(results(), encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(with_block(readme.read_text(encoding="utf-8"), readme_block()), encoding="utf-8")


if __name__ == "__main__":
    main()
