"""``python -m bench [op ...]``: verify, time and record; without an op, all of them."""

from __future__ import annotations

import argparse
import os
import sys


def main() -> int:
    """Runs what the command line asks for; 1 if an op failed its verification, 2 for a wrong call."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Verify, time and record the ops.")
    parser.add_argument("op", nargs="*", help="all of them by default; a wrong name lists them")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds, nothing recorded")
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--seconds", type=float, help="wall time for the whole run; rounds are cut to fit")
    chosen = parser.parse_args()
    if chosen.device == "cpu":
        # One thread, set before torch is imported: CPU time then counts work, not waiting at barriers.
        os.environ.setdefault("OMP_NUM_THREADS", "1")

    import torch

    from bench.registry import OPERATIONS
    from bench.run import main_loop

    unknown = [name for name in chosen.op if name not in OPERATIONS]
    if unknown:
        parser.error(f"expected ops among {', '.join(OPERATIONS)}; got {', '.join(unknown)}")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda needs a CUDA device, and torch sees none", file=sys.stderr)
        return 2
    if chosen.device == "cpu":
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    failed = main_loop(
        [OPERATIONS[name] for name in chosen.op or OPERATIONS],
        torch.device(chosen.device),
        quick=chosen.quick,
        write=not chosen.no_record,
        total_seconds=chosen.seconds,
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
