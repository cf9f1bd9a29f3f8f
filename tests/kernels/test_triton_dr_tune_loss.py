"""How many launches the DR-Tune block takes on a device, and that none of them waits for the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from implementations import draw_bank
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from mooring_kernels.bank_cross_entropy import gpu as bank_cross_entropy
from mooring_kernels.calibrate import gpu as calibrate
from mooring_kernels.class_statistics import gpu as class_statistics
from mooring_kernels.dr_tune_loss import op

# Change a tensor's shape, reserve memory or wrap a number: no launch.
_FREE = {
    "permute",
    "scalar_tensor",
    "slice",
    "t",
    "transpose",
    "empty",
    "empty_strided",
    "new_empty",
    "view",
    "detach",
    "alias",
    "empty_like",
}
_KERNELS = [
    (class_statistics, "class_logits_fwd_kernel"),
    (class_statistics, "class_statistics_fwd_kernel"),
    (calibrate, "calibrate_fwd_kernel"),
    (bank_cross_entropy, "softmax_cross_entropy_rows_grad_kernel"),
]


class Recorder(TorchDispatchMode):
    """Names of the torch operators called beneath it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name not in _FREE:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class Launched:
    """Stands for a kernel: counts, runs nothing."""

    def __init__(self) -> None:
        self.times = 0

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.times += 1

        return launch


@pytest.mark.parametrize("rotated", [True, False], ids=["head", "kept"])
def test_launches_of_a_step(
    rotated: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, tuned, labels, head = draw_bank(40, 8, 5, generator)
    kernels = {name: Launched() for _, name in _KERNELS}
    for module, name in _KERNELS:
        monkeypatch.setattr(module, name, kernels[name])
    recorder = Recorder()
    # deterministic mode fills what `empty` returns, which is a launch of the tests alone
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    rotation = torch.eye(8) if rotated else None
    batch = frozen[:4].clone(), labels[:4].clone()
    rest = (head, head[:, 0].clone(), rotation, torch.ones(()), 1.0, 0.0, False, [True, True, True], "triton")
    with recorder:
        op._forward._init_fn(*batch, frozen, tuned, labels, *rest)
    assert not {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select"} & set(recorder.seen)
    launched = sum(kernel.times for kernel in kernels.values())
    # kernels/README.md states these numbers
    assert (launched, len(recorder.seen)) == ((5, 21) if rotated else (5, 18)), recorder.seen
