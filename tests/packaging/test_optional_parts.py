"""Heavy packages are optional: everything imports without them, and what needs one names it with its command."""

from __future__ import annotations

import subprocess
import sys

PREAMBLE = """
import sys
from importlib.machinery import PathFinder
HIDDEN = ("nvidia", "deepspeed", "triton", "transformers", "apex")
found = PathFinder.find_spec
def find_spec(name, path=None, target=None):  # as on a machine where they are not installed
    return None if name.split(".")[0] in HIDDEN else found(name, path, target)
PathFinder.find_spec = find_spec
"""

IMPORTS = """
import mooring, mooring_kernels
from mooring import Batch, Engine, RunConfig, load_config
from mooring.methods import dr_tune, fine_tune, linear_probe, lp_ft
from mooring.data.scan import scan
from mooring_kernels import (
    bank_cross_entropy, calibrate, class_statistics, procrustes_rotation, ring_push_, row_normalise,
    text_supervised_loss, two_head_cross_entropy,
)
assert not {"nvidia.dali", "deepspeed", "triton", "transformers"} & set(sys.modules)
import torch
unit, norm = row_normalise(torch.eye(3))
assert torch.equal(unit, torch.eye(3))
"""

ASKED_FOR = """
from mooring.errors import MissingDependencyError, require
for module, package in [("nvidia.dali", "nvidia-dali-cuda130"), ("deepspeed", "deepspeed"), ("triton", "triton")]:
    try:
        require(module, needed_for="this")
    except MissingDependencyError as err:
        assert "pip install" in str(err) and package in str(err), err
    else:
        raise AssertionError(module)
"""


def run(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + program], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_engine_methods_and_ops_import_without_the_optional_packages() -> None:
    run(IMPORTS)


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    run(ASKED_FOR)


AUTO_SOURCE = """
import tempfile
from pathlib import Path
from PIL import Image
from mooring.data.augment import ModelInput, evaluation
from mooring.data.scan import scan
from mooring.data.sources import make_source
from mooring.errors import MissingDependencyError
with tempfile.TemporaryDirectory() as root:
    for name, level in (("a", 40), ("b", 200)):
        (Path(root) / name).mkdir()
        for i in range(4):
            Image.new("RGB", (40, 40), (level + i, 10, 10)).save(Path(root) / name / f"{i}.png")
    split = scan(Path(root)).manifest.split("train")
    augment = evaluation(ModelInput(size=32))
    with make_source("auto", split, augment, batch_size=2, training=False) as source:
        assert source.kind == "torch" and sum(int((b.labels >= 0).sum()) for b in source) == len(split)
    try:
        make_source("dali", split, augment, batch_size=2, training=False)
    except MissingDependencyError as err:
        assert "pip install 'nvidia-dali-cuda130" in str(err), err
    else:
        raise AssertionError("DALI was not missed")
"""


def test_the_data_source_falls_back_to_torch_and_names_dali_when_asked_for() -> None:
    run(AUTO_SOURCE)
