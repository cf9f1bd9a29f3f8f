"""One run killed again and again at random moments, resumed after each, against the same run left alone.

``python tests/resume/soak.py --kills 200`` prints one line of JSON, and fails where a single bit differs. A parent
that has imported everything forks each process of the run, so a start costs milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from resume_cases import STEPS_PER_EPOCH, assert_equal, make_config, outcome, write_inputs

from mooring.config.schema import RunConfig
from mooring.data.batch import Batch
from mooring.train.engine import Engine

_SETTLED = 3600.0  # seconds after which something hangs


def train(config: RunConfig, events: int, ids: Path) -> None:
    """One process of the run; writes a byte when it is built and after each step."""
    engine = Engine.build(config)
    step = engine.step
    file = ids.open("a")

    def told(group: list[Batch]) -> Any:
        at = engine.global_step
        result = step(group)
        file.write(json.dumps([at, [batch.ids.tolist() for batch in group]]) + "\n")
        file.flush()
        os.write(events, b".")
        return result

    engine.step = told  # type: ignore[method-assign]
    os.write(events, b".")
    engine.fit()


class Child:
    """A forked process of the run."""

    def __init__(self, config: RunConfig, ids: Path) -> None:
        self.events, theirs = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.close(self.events)
                torch.manual_seed(os.getpid())  # a new process has other random states
                train(config, theirs, ids)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(theirs)

    def wait_for(self, events: int, seconds: float) -> None:
        """Until so many events came, and then some time; returns early when the process ends."""
        deadline = time.monotonic() + _SETTLED
        while events and time.monotonic() < deadline:
            if select.select([self.events], [], [], 1.0)[0]:
                read = os.read(self.events, 1)
                if not read:
                    return
                events -= 1
        select.select([self.events], [], [], seconds)

    def end(self, *, kill: bool) -> int:
        """Its exit code; negative where it was killed."""
        if kill:
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        os.close(self.events)
        return os.waitstatus_to_exitcode(status)


def last_ids(file: Path) -> dict[int, Any]:
    """What each step was trained on, the last time it was done."""
    lines = file.read_text().split("\n")
    return dict(json.loads(line) for line in lines if line.endswith("]]]"))


def soak(root: Path, kills: int, seed: int) -> dict[str, Any]:
    """Both runs; returns what happened."""
    draw = random.Random(seed)
    write_inputs(root)
    os.environ["MOORING_CACHE"] = str(root / "cache")
    epochs = max(2, 2 * kills // STEPS_PER_EPOCH)  # more than the run comes forward between its kills
    settings: dict[str, Any] = {"train": {"epochs": epochs}, "checkpoint": {"every": 1, "keep_last": 2}}
    whole = make_config(root, root / "whole", "dr_tune", "torch", **settings)
    undisturbed = Child(whole, root / "whole.ids")
    started = time.monotonic()
    assert undisturbed.end(kill=False) == 0
    total = epochs * STEPS_PER_EPOCH
    seconds_per_step = (time.monotonic() - started) / total

    config = make_config(root, root / "run", "dr_tune", "torch", **settings)
    ids = root / "run.ids"
    killed = torn = starts = 0
    began = time.monotonic()
    while True:
        starts += 1
        child = Child(config.model_copy(update={"resume": "auto"}), ids)
        if killed == kills:
            assert child.end(kill=False) == 0, "the last part of the run failed"
            break
        if draw.random() < 0.15:
            child.wait_for(0, draw.random() * 10 * seconds_per_step)  # while it is built, or anywhere
        else:
            # some steps on, so that the run comes forward, and then a moment: in a step, a write, a validation
            child.wait_for(1 + draw.choice([0, 1, 1, 2, 2]), draw.random() * 2 * seconds_per_step)
        code = child.end(kill=True)
        assert code == -signal.SIGKILL, f"the run ended by itself with {code} after {killed} kills"
        killed += 1
        torn += any((root / "run" / "checkpoints").glob("*.partial"))
    tensors = assert_equal(outcome(root / "whole"), outcome(root / "run"))
    assert last_ids(root / "whole.ids") == last_ids(ids)
    return {
        "kills": killed,
        "starts": starts,
        "kills_inside_a_write": torn,
        "steps": total,
        "steps_done": len(ids.read_text().splitlines()),
        "tensors_equal": tensors,
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> int:
    """Prints what happened; fails by an assertion."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(soak(Path(folder), chosen.kills, chosen.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
