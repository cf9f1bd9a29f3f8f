from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mooring.config.schema import OptimizerSettings
from mooring.errors import MissingDependencyError
from mooring.train.lamb import Lamb
from mooring.train.optimizers import apex_available, build_optimizer, default_lr

SHAPES = [(7, 5), (5,), (3, 2, 3, 3), (1,)]


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Two groups as ``parameter_groups`` makes them: decay on matrices only."""
    return [
        {
            "params": [p for p in params if p.ndim > 1],
            "lr": 0.05,
            "weight_decay": 0.1,
            "role": "backbone",
            "name": "a",
        },
        {
            "params": [p for p in params if p.ndim <= 1],
            "lr": 0.2,
            "weight_decay": 0.0,
            "role": "head",
            "name": "b",
        },
    ]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]


def take_steps(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for p, grad in zip(params, gradients(step), strict=True):
            p.grad = grad.to(p.dtype)
        optimizer.step()


def by_hand(name: str, settings: OptimizerSettings, steps: int) -> list[Tensor]:
    """The textbook update of each optimizer in float64, one parameter at a time."""
    rows = [p.detach().double() for p in parameters()]
    out = []
    (b1, b2), eps, mu = settings.betas, settings.eps, settings.momentum
    for i, p in enumerate(rows):
        lr, decay = (0.05, 0.1) if p.ndim > 1 else (0.2, 0.0)
        m, v = torch.zeros_like(p), torch.zeros_like(p)
        for t in range(1, steps + 1):
            g = gradients(t - 1)[i]
            if name == "sgd":
                g = g + decay * p
                m = g if t == 1 else mu * m + g
                p = p - lr * (g + mu * m)
                continue
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            u = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
            if name == "adamw":
                p = p - lr * decay * p - lr * u
                continue
            u = u + decay * p
            ratio = p.norm() / u.norm() if decay else 1.0
            p = p - lr * ratio * u
        out.append(p)
    return out


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_steps_follow_the_textbook(name: str) -> None:
    settings = OptimizerSettings(name=name, implementation="torch", betas=(0.8, 0.95), eps=1e-6)
    params = parameters()
    take_steps(build_optimizer(groups(params), settings, "cpu"), params, range(6))
    for p, expected in zip(params, by_hand(name, settings, 6), strict=True):
        # six fp32 steps, each a handful of roundings of numbers of order 1
        torch.testing.assert_close(
            p.detach().double(), expected, rtol=0, atol=6 * 16 * torch.finfo(torch.float32).eps
        )


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_state_is_restored_bit_for_bit(name: str) -> None:
    settings = OptimizerSettings(name=name)
    params = parameters()
    optimizer = build_optimizer(groups(params), settings, "cpu")
    take_steps(optimizer, params, range(3))
    saved, values = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    take_steps(optimizer, params, range(3, 6))

    again = parameters(seed=9)
    resumed = build_optimizer(groups(again), settings, "cpu")
    with torch.no_grad():
        for p, value in zip(again, values, strict=True):
            p.copy_(value)
    resumed.load_state_dict(saved)
    take_steps(resumed, again, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_parameters_without_gradient_stay(name: str) -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = build_optimizer(groups(params), OptimizerSettings(name=name), "cpu")
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert not torch.equal(params[0], before[0])
    assert all(torch.equal(p, b) for p, b in zip(params[1:], before[1:], strict=True))
    # what joins later is corrected for its own number of steps: its first step is a first step
    params[2].grad = torch.ones_like(params[2])
    optimizer.step()
    fresh = parameters()
    first = build_optimizer(groups(fresh), OptimizerSettings(name=name), "cpu")
    fresh[2].grad = torch.ones_like(fresh[2])
    first.step()
    assert torch.equal(params[2], fresh[2])


def test_group_keys_are_kept_and_the_callers_list_is_not_touched() -> None:
    given = groups(parameters())
    keys = [set(g) for g in given]
    optimizer = build_optimizer(given, OptimizerSettings(name="sgd"), "cpu")
    assert [set(g) for g in given] == keys
    assert [(g["role"], g["name"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("backbone", "a", 0.05, 0.1),
        ("head", "b", 0.2, 0.0),
    ]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_torch_runs_its_fused_kernels(name: str) -> None:
    optimizer = build_optimizer(groups(parameters()), OptimizerSettings(name=name), "cpu")
    assert optimizer.defaults["fused"]


def test_sgd_without_momentum_keeps_no_buffers() -> None:
    params = parameters()
    settings = OptimizerSettings(name="sgd", momentum=0.0, nesterov=False)
    optimizer = build_optimizer(groups(params), settings, "cpu")
    take_steps(optimizer, params, range(2))
    assert not any(state.get("momentum_buffer") is not None for state in optimizer.state.values())


@pytest.mark.parametrize("zero", ["weights", "gradient"])
def test_lamb_does_not_rescale_by_a_zero_norm(zero: str) -> None:
    p = nn.Parameter(torch.zeros(3, 2) if zero == "weights" else torch.ones(3, 2))
    p.grad = torch.zeros(3, 2) if zero == "gradient" else torch.full((3, 2), 0.5)
    optimizer = Lamb([p], lr=0.1, weight_decay=0.1 if zero == "weights" else 1e-30)
    optimizer.step()
    assert p.isfinite().all()
    if zero == "weights":  # ratio 1: a plain Adam step
        torch.testing.assert_close(p.detach(), torch.full((3, 2), -0.1), rtol=1e-4, atol=0)


def test_lamb_returns_the_closures_loss() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = Lamb([p], lr=0.1)

    def closure() -> Tensor:
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0 and p.max() < 1


@pytest.mark.skipif(apex_available(torch.device("cuda")), reason="Apex's kernels are here")
def test_apex_where_it_is_missing() -> None:
    with pytest.raises(MissingDependencyError, match="APEX_CUDA_EXT=1") as err:
        build_optimizer(groups(parameters()), OptimizerSettings(implementation="apex"), "cuda")
    assert "implementation=torch" in str(err.value)
    auto = build_optimizer(groups(parameters()), OptimizerSettings(implementation="auto"), "cpu")
    assert type(auto) is torch.optim.AdamW


def test_importable_apex_proves_nothing(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert not apex_available(torch.device("cpu"))
    with pytest.raises(MissingDependencyError, match="amp_C"):
        build_optimizer(groups(parameters()), OptimizerSettings(implementation="apex"), "cpu")


def test_default_rates() -> None:
    assert {name: default_lr(name) for name in ("sgd", "adamw", "lamb")} == {
        "sgd": 0.01,
        "adamw": 3e-4,
        "lamb": 2e-3,
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("implementation", ["torch", "apex"])
@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_steps_follow_the_textbook_on_cuda(name: str, implementation: str) -> None:
    device = torch.device("cuda")
    if implementation == "apex" and not apex_available(device):
        pytest.skip("Apex's compiled modules are not installed")
    settings = OptimizerSettings(name=name, implementation=implementation, betas=(0.8, 0.95), eps=1e-6)
    params = [nn.Parameter(p.detach().to(device)) for p in parameters()]
    optimizer = build_optimizer(groups(params), settings, device)
    for step in range(6):
        for p, grad in zip(params, gradients(step), strict=True):
            p.grad = grad.to(device, p.dtype)
        optimizer.step()
    for p, expected in zip(params, by_hand(name, settings, 6), strict=True):
        torch.testing.assert_close(
            p.detach().cpu().double(), expected, rtol=0, atol=6 * 16 * torch.finfo(torch.float32).eps
        )
