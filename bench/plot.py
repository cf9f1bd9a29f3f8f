"""``python -m bench.plot``: a picture and tables from the records, and from nothing else. It never times."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import records
from bench.comparison import Comparison, comparisons, headlines
from bench.records import Record, deciding_seconds
from bench.tables import (
    all_newest,
    commits,
    full_table,
    machine,
    newest_environment,
    readme_table,
    with_table,
)

README = Path(__file__).resolve().parent.parent / "README.md"
# Okabe and Ito's palette: told apart with any colour vision, and in grey by lightness and by place.
_OURS, _EAGER, _PUBLIC = "#0072B2", "#E69F00", "#999999"


def draw(shown: Sequence[Comparison], described: Record, path: Path) -> None:
    """Bars of the median time of one call, three an op, on a log scale; beside ours how many times faster it is."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = (("Mooring", _OURS), ("best of eager PyTorch and torch.compile", _EAGER), ("public code", _PUBLIC))
    height = 0.27
    figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.62 * len(shown)), layout="constrained")
    for number, (label, colour) in enumerate(bars):
        places, widths, notes = [], [], []
        for place, c in enumerate(shown):
            record = (c.ours, c.eager_or_compiled, c.public)[number]
            if record is None:
                continue
            places.append(place + (number - 1) * height)
            widths.append(deciding_seconds(record)["p50"] * 1e6)
            ratio = c.faster_than(c.eager_or_compiled) if number == 0 else None
            notes.append("" if ratio is None else f"{ratio['p50']:.2f}x")
        drawn = axes.barh(places, widths, height * 0.92, color=colour, label=label)
        axes.bar_label(drawn, notes, padding=4, fontsize=11, fontweight="bold")
    axes.set_yticks(range(len(shown)), [f"{c.op}\n{c.size}" for c in shown], fontsize=10)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.tick_params(axis="x", labelsize=10)
    axes.set_xlabel(
        "microseconds for one call, forward and backward where there is a gradient; median", fontsize=11
    )
    axes.grid(axis="x", which="major", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=3, fontsize=11, frameon=False)
    threads = {c.threads for c in shown}
    at = "" if threads == {0} else f", {max(threads)} thread{'s' if max(threads) > 1 else ''}"
    footer = f"{machine(described)}{at}, float32; commit {commits(shown)}, environment {shown[0].environment}"
    figure.supxlabel(footer, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Draws everything; returns 1 when there are no records."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("--records", type=Path, default=records.FOLDER)
    parser.add_argument("--out", type=Path, default=records.PLOTS)
    parser.add_argument("--readme", type=Path, default=README, help="the file whose kernel table is replaced")
    parser.add_argument("--environment", help="the README's; by default that of the newest record")
    chosen = parser.parse_args(arguments)
    newest = all_newest(chosen.records)
    if not any("times_faster_than" in record for record in newest):
        print(f"no records in {chosen.records}: run  python -m bench  first", file=sys.stderr)
        return 1
    environments = records.environments(chosen.records)
    identity = chosen.environment or newest_environment(newest)
    if identity not in environments:
        print(f"no environment {identity!r}; there are {', '.join(environments)}", file=sys.stderr)
        return 1
    shown = headlines(comparisons(newest), identity)
    draw(shown, environments[identity], chosen.out / "overview.png")
    (chosen.out / "table.md").write_text(full_table(newest, environments), encoding="utf-8")
    readme = chosen.readme.read_text(encoding="utf-8")
    table = readme_table(newest, environments, identity)
    chosen.readme.write_text(with_table(readme, identity, table), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
