"""``python -m bench [op ...]``: verify, time and record; without an op, all of them."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from bench.outcome import Outcome, Request, UnknownOperationError
from bench.threads import in_new_process


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Verify, time and record the ops.")
    parser.add_argument("op", nargs="*", help="all of them by default; a wrong name lists them")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=[1],
        metavar="N",
        help="CPU only; each count in its own process",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds, nothing recorded")
    parser.add_argument(
        "--verify-only", action="store_true", help="hold the quick sizes against float64, no more"
    )
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument(
        "--candidates", nargs="+", default=[], metavar="NAME", help="only these; the first is the baseline"
    )
    parser.add_argument("--seconds", type=float, help="wall time for the whole run; rounds are cut to fit")
    return parser


def _run(wanted: Request, counts: list[int]) -> Outcome:
    if wanted.device == "cuda":
        from bench.session import serve

        return serve(wanted)
    total = Outcome()
    if wanted.seconds is not None:
        wanted = replace(wanted, seconds=wanted.seconds / len(counts))
    for threads in counts:
        total += in_new_process(threads, "bench.session:serve", wanted, threads)
    return total


def main() -> int:
    """Runs what the command line asks for; 1 if an op failed its verification, 2 for a wrong call."""
    parser = _arguments()
    chosen = parser.parse_args()
    if min(chosen.threads) < 1:
        parser.error(f"--threads takes positive counts; got {chosen.threads}")
    if chosen.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("--device cuda needs a CUDA device, and torch sees none", file=sys.stderr)
            return 2
    wanted = Request(
        names=tuple(chosen.op),
        device=chosen.device,
        quick=chosen.quick,
        candidates=tuple(chosen.candidates),
        write=not chosen.no_record,
        verify_only=chosen.verify_only,
        seconds=chosen.seconds,
    )
    try:
        outcome = _run(wanted, chosen.threads)
    except UnknownOperationError as error:
        parser.error(str(error))
    for line in outcome.left_out:
        print(f"not run, no time was left: {line}")
    for line in outcome.slow_auto:
        print(f"WARNING: {line}")
    for line in outcome.failed:
        print(line, file=sys.stderr)
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())
