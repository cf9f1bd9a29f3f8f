"""``python -m bench.accuracy --assets DIR --out DIR [NAME ...]``: makes the runs of the experiments and keeps them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.accuracy.experiments import EXPERIMENTS, Experiment
from bench.accuracy.keep import FOLDER, Record, keep
from mooring.comparison.plan import Comparison
from mooring.comparison.runner import run_comparison
from mooring.config.keys import all_keys
from mooring.config.method_settings import method_names
from mooring.models.weights import cache_folder


def comparisons(
    experiment: Experiment, out: Path, roots: dict[str, Path]
) -> Iterator[tuple[str | None, Comparison]]:
    """That of the experiment's methods, and one for each row with settings of its own, by that row's name."""

    def comparison(methods: Sequence[str], settings: Sequence[str], folder: str) -> Comparison:
        return Comparison(
            methods=methods,
            out=out / folder,
            overrides=[
                word.format(**roots)
                for word in (*experiment.settings, *settings)
                if _meant_for(word, methods)
            ],
            seeds=experiment.seeds,
            shots=experiment.shots,
            lrs=experiment.lrs,
        )

    yield None, comparison(experiment.methods, (), "methods")
    for name, (method, settings) in experiment.variants.items():
        yield name, comparison([method], settings, name.replace(" ", "_"))


def _meant_for(word: str, methods: Sequence[str]) -> bool:
    """Whether a setting is of all methods, or one of these has it."""
    known = all_keys().get(word.partition("=")[0])
    owners = set(known.methods) if known is not None else set()
    return not owners or bool(owners & {part for method in methods for part in method_names(method)})


def make(name: str, out: Path, roots: dict[str, Path], folder: Path) -> bool:
    """Makes what is missing of one experiment; False where the user stopped it."""
    experiment, records = EXPERIMENTS[name], []
    for label, comparison in comparisons(experiment, out / name, roots):
        outcome = run_comparison(comparison, draw=False)
        if outcome.interrupted:
            return False
        records += [_renamed(dict(record), label) for record in outcome.records]
    order = [*experiment.methods, *experiment.variants]
    records.sort(key=lambda record: (record["shots"] or 0, order.index(record["method"])))
    keep(name, experiment.title, records, roots, folder)
    return True


def _renamed(record: Record, label: str | None) -> Record:
    return record if label is None else {**record, "method": label, "run": f"{label}: {record['run']}"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(EXPERIMENTS)}; none: all")
    parser.add_argument(
        "--assets", type=Path, required=True, help="folder with weights/, datasets/ and text/"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the runs; what is finished there is kept"
    )
    parser.add_argument("--records", type=Path, default=FOLDER, help="where the records are written")
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - set(EXPERIMENTS)):
        parser.error(f"expected names among {', '.join(EXPERIMENTS)}; got {', '.join(unknown)}")
    roots = {
        "assets": args.assets.resolve(), "demo": cache_folder() / "demo", "work": args.out.resolve(),
    }  # fmt: skip
    for name in args.names or EXPERIMENTS:
        if not make(name, args.out, roots, args.records):
            raise SystemExit(130)


if __name__ == "__main__":
    main()
