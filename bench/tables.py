"""Markdown tables from the records, and from nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench import records
from bench.comparison import Comparison, comparisons, headlines, may_be_eager
from bench.records import Record, deciding, deciding_seconds
from bench.step_share import StepShares

_BEGIN, _END = "<!-- kernel table: environment {} -->", "<!-- end of kernel table -->"
_BLOCK = re.compile(_BEGIN.format(r"(?P<environment>\w+)") + r"\n.*?" + re.escape(_END), flags=re.DOTALL)


def newest_environment(measurements: Iterable[Record]) -> str:
    """Where the latest measurement of an op was made."""
    timed = [r for r in measurements if "times_faster_than" in r]
    return max(timed, key=lambda record: record["time"])["environment"]


def machine(described: Record) -> str:
    """An environment in words."""
    device = (
        described.get("gpu")
        or f"{described['cpu']} ({described.get('native') or described['cpu_capability']})"
    )
    return f"{device}, torch {described['torch']}"


def commits(shown: Iterable[Comparison]) -> str:
    """The commits that were measured."""
    return ", ".join(sorted({r["commit"] for c in shown for r in c.candidates.values()}))


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def microseconds(record: Record | None) -> str:
    return "" if record is None else f"{deciding_seconds(record)['p50'] * 1e6:,.0f}"


def _times(ratio: dict[str, float] | None) -> str:
    return "" if ratio is None else f"{ratio['p50']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})"


def _mebibytes(record: Record | None) -> str:
    peak = None if record is None else record.get("peak_bytes")
    return "" if peak is None else f"{peak / 2**20:.2f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def full_table(newest: Sequence[Record], environments: dict[str, Record]) -> str:
    """All timed candidates, environment by environment."""
    shares, all_comparisons = StepShares(newest), comparisons(newest)
    header = (
        "op", "size", "dtype", "pass", "threads", "candidate", "median us", "times faster than eager",
        "than public code", "share of copy rate", "share of matmul rate", "peak MiB", "relative error",
        "of a training step saved", "commit",
    )  # fmt: skip
    parts = []
    for identity in dict.fromkeys(c.environment for c in all_comparisons):
        rows = []
        for c in all_comparisons:
            if c.environment != identity:
                continue
            for name, r in c.candidates.items():
                ratios = deciding(r).times_faster_than
                rows.append(
                    (
                        c.op,
                        c.size,
                        c.dtype,
                        c.which,
                        str(c.threads or ""),
                        name,
                        f"{deciding_seconds(r)['p50'] * 1e6:.1f}",
                        _times(ratios.get(r["baseline"])),
                        _times(ratios.get("public")),
                        f"{r['share_of_copy_rate']:.1%}",
                        f"{r['share_of_matmul_rate']:.1%}",
                        _mebibytes(r),
                        f"{r['relative_error']:.1e}",
                        _share(shares.saved(c)) if r is c.ours and c.which == _whole_pass(c, newest) else "",
                        r["commit"],
                    )
                )
        parts.append(f"## {identity}: {machine(environments[identity])}\n\n{_markdown(header, rows)}")
    return "\n".join(parts)


def _whole_pass(c: Comparison, newest: Iterable[Record]) -> str:
    """The pass that a step is made of: both where the op has a gradient."""
    return "both" if any(r["op"] == c.op and r["pass"] == "both" for r in newest) else "forward"


def readme_table(newest: Sequence[Record], environments: dict[str, Record], identity: str) -> str:
    """One row per op at its first full size, in one environment; each names the file of its records."""
    shares, all_comparisons = StepShares(newest), comparisons(newest)
    shown = headlines(all_comparisons, identity)
    more_threads = {
        (c.op, c.size, c.dtype, c.which): c
        for c in all_comparisons
        if c.environment == identity and c.threads > 1
    }
    header = (
        "op", "size", "ours, us", "eager or compiled, us", "times faster", "at 2 threads", "than public code",
        "copy rate", "peak MiB, ours / theirs", "of a step saved", "record",
    )  # fmt: skip
    rows = []
    for c in shown:
        other, wide = c.eager_or_compiled, more_threads.get((c.op, c.size, c.dtype, c.which))
        rows.append(
            (
                f"`{c.op}`",
                f"{c.size}, {c.which}",
                microseconds(c.ours),
                "" if other is None else f"{microseconds(other)} ({other['candidate']})",
                _times(c.faster_than(other)),
                "" if wide is None or wide is c else _times(wide.faster_than(wide.eager_or_compiled)),
                _times(c.faster_than(c.public)),
                "" if c.ours is None else f"{c.ours['share_of_copy_rate']:.0%}",
                f"{_mebibytes(c.ours)} / {_mebibytes(other)}" if _mebibytes(c.ours) else "",
                _share(shares.saved(c)),
                f"`{c.op.rstrip('_')}.jsonl`",
            )
        )
    clock = "events" if "gpu" in environments[identity] else "CPU time at one thread, wall time at two"
    doubt = (
        " The `compile` times among them may be those of eager code (`bench/README.md`)."
        if any(may_be_eager(r) for c in shown for r in c.candidates.values())
        else ""
    )
    caption = (
        f"Environment `{identity}`: {machine(environments[identity])}; commit {commits(shown)}; float32, median (20 % "
        f"to 80 %) of ratios within rounds, {clock}; records in `bench/records/`, all sizes and candidates in "
        f"`bench/plots/table.md`.{doubt}\n"
    )
    return f"{_markdown(header, rows)}\n{caption}"


def in_readme(readme: str) -> str:
    """The environment whose table the README shows.

    Raises:
        ValueError: the README has no place for a table.
    """
    found = _BLOCK.search(readme)
    if found is None:
        raise ValueError(f"the README lacks the lines {_BEGIN.format('ID')} and {_END}")
    return found["environment"]


def with_table(readme: str, identity: str, table: str) -> str:
    """``readme`` with this table in place of the one it has."""
    in_readme(readme)
    block = f"{_BEGIN.format(identity)}\n![Time of one call of each op](bench/plots/overview.png)\n\n{table}{_END}"
    return _BLOCK.sub(lambda _: block, readme)


def all_newest(folder: Path = records.FOLDER) -> list[Record]:
    """The newest record of everything measured."""
    return list(records.latest(records.measurements(folder)).values())
