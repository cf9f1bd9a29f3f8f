"""One seed for every random stream of a run."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy (legacy global stream) and torch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  libraries that draw from the global stream must repeat too
    torch.manual_seed(seed)
