"""Long fuzzing with a time budget: every target of ``targets.py`` in turn, inputs by a plain random mutator.

    python tests/fuzz/long.py --seconds 300 [--seed 1] [--only NAME ...] [--coverage]

Prints how many inputs each target took and every finding with the seed that makes it again (``--again NAME SEED``).
Exit code 1 where there is a finding. A target that hangs on one input for a minute ends the process with a stack dump;
a crash of native code ends it too: both say which input it was. ``--coverage`` leaves the making of the bytes to
atheris, which is guided by coverage, for the targets that read one file (``pip install atheris``; no part of the
project's own requirements).
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

_HANG = 60


def one_input(name: str, seed: int) -> str | None:
    """The traceback of a finding, or None."""
    from targets import TARGETS

    faulthandler.dump_traceback_later(_HANG, exit=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            TARGETS[name].run(random.Random(seed), Path(folder))
    except BaseException as err:  # whatever it is, it got out
        if isinstance(err, KeyboardInterrupt):
            raise
        return traceback.format_exc()
    finally:
        faulthandler.cancel_dump_traceback_later()
    return None


def fuzz(name: str, seconds: float, seed: int, trace: Path) -> tuple[int, dict[str, tuple[int, str]]]:
    """Inputs taken, and per place in the code the first seed and traceback."""
    findings: dict[str, tuple[int, str]] = {}
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        number = seed * 1_000_003 + count
        trace.write_text(f"{name} {number}")  # stays where the process dies
        found = one_input(name, number)
        if found is not None:
            lines = found.splitlines()
            place = next((line for line in reversed(lines) if "/mooring/" in line), lines[0])
            findings.setdefault(place + lines[-1].partition(":")[0], (number, found))
        count += 1
    return count, findings


def with_coverage(name: str, seconds: float, seed: int) -> int:
    """atheris on one target, in a process of its own: it does not return."""
    with tempfile.TemporaryDirectory() as corpus:
        from targets import TARGETS

        target = TARGETS[name]
        assert target.corpus is not None
        for number, data in enumerate(target.corpus()):
            (Path(corpus) / str(number)).write_bytes(data)
        code = (
            "import sys, tempfile, pathlib, atheris\n"
            f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            "with atheris.instrument_imports(include=['mooring', 'PIL', 'safetensors', 'tomllib', 'csv', 'json']):\n"
            "    from targets import TARGETS\n"
            f"read = TARGETS[{name!r}].read\n"
            "def one(data):\n"
            "    with tempfile.TemporaryDirectory() as folder:\n"
            "        read(data, pathlib.Path(folder))\n"
            "atheris.Setup(sys.argv, one)\natheris.Fuzz()\n"
        )
        options = [
            f"-max_total_time={int(seconds)}",
            f"-seed={seed}",
            "-timeout=60",
            "-rss_limit_mb=4096",
            "-max_len=16384",
        ]
        command = [
            sys.executable,
            "-c",
            code,
            *options,
            "-artifact_prefix=" + tempfile.gettempdir() + "/",
            corpus,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = done.stderr.splitlines()
        print(
            f"{name}: {next((line for line in reversed(lines) if line.startswith(('Done', '#'))), lines[-1:])}"
        )
        if done.returncode:
            print("\n".join(lines[-40:]))
        return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=300, help="in all")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", nargs="*", metavar="NAME")
    parser.add_argument("--again", nargs=2, metavar=("NAME", "SEED"))
    parser.add_argument("--coverage", action="store_true")
    options = parser.parse_args()
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["MOORING_CACHE"] = cache
        from targets import TARGETS

        if options.again:
            found = one_input(options.again[0], int(options.again[1]))
            print(found or "nothing is wrong")
            return int(found is not None)
        names = options.only or sorted(TARGETS)
        if options.coverage:
            names = [name for name in names if TARGETS[name].read is not None]
            codes = [
                with_coverage(name, options.seconds / len(names), options.seed) for name in names
            ]  # all of them
            return int(any(codes))
        total, found_any = 0, False
        trace = Path(tempfile.gettempdir()) / f"mooring-fuzz-{os.getpid()}.input"
        for name in names:
            count, findings = fuzz(name, options.seconds / len(names), options.seed, trace)
            total += count
            print(f"{name}: {count} inputs, {len(findings)} findings", flush=True)
            for number, text in findings.values():
                found_any = True
                print(f"--again {name!r} {number}\n{text}", flush=True)
        trace.unlink(missing_ok=True)
        print(f"{total} inputs in all")
        return int(found_any)


if __name__ == "__main__":
    sys.exit(main())
