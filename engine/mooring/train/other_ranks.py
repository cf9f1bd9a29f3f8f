"""This rank's own part of a state that another number of ranks saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mooring.models.batchnorm_sync import merged_buffers
from mooring.state.encoding import read_all
from mooring.state.rng import capture_rng
from mooring.train.running_mean import RunningMetrics
from mooring.train.seeding import seed_everything

if TYPE_CHECKING:
    from mooring.train.engine import Engine


def resharded_part(engine: Engine, parts: Sequence[Mapping[str, Any]], step: int) -> dict[str, Any]:
    """Of everything that ranks keep each for itself, but the optimizer's state, what this rank has to go on with.

    The place in the data is the same: the order of the images is one for all ranks. Running statistics are the mean
    of the ranks', banks are divided anew (``Method.resharded_state``). Random streams begin anew on every rank, from
    the run's seed, the step, and which rank of how many it is.

    Args:
        engine: freshly built.
        parts: by rank; what is not looked at is not read.
        step: optimizer steps done.

    Raises:
        DataError: the batches of all ranks together were of another size.
    """
    first = parts[0]
    loop = read_all(first["loop"])
    if "running" in loop:
        states = [part["loop"]["running"] for part in parts]
        loop["running"] = RunningMetrics.resharded_state(states, engine.ranks.world)
    source_stream = None
    if engine.source_stream is not None:
        source_stream = engine.source_stream.resharded_state(first["source_stream"])
    seed, mixer_seed = _fresh_seeds(engine, step)
    seed_everything(seed)
    return {
        "buffers": merged_buffers([part["buffers"] for part in parts]),
        "ema_buffers": None
        if first["ema_buffers"] is None
        else merged_buffers([part["ema_buffers"] for part in parts]),
        "extra": read_all(engine.method.resharded_state([part["extra"] for part in parts])),
        "source": engine.train_source.resharded_state(first["source"]),
        "source_stream": source_stream,
        "mixer": {"generator": torch.Generator().manual_seed(mixer_seed).get_state()},
        "loop": loop,
        "rng": capture_rng(),
    }


def _fresh_seeds(engine: Engine, step: int) -> tuple[int, int]:
    ranks = engine.ranks
    words = np.random.SeedSequence([engine.config.seed, step, ranks.world, ranks.rank]).generate_state(2)
    return int(words[0]), int(words[1])
