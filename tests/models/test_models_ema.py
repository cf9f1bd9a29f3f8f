from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mooring.errors import RunFolderError
from mooring.models.ema import WeightEMA


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def change(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p))
    module(torch.randn(5, 3))  # moves the BatchNorm buffers


@pytest.mark.parametrize("warm_up", [False, True])
def test_the_average_follows_its_formula(warm_up: bool) -> None:
    module = net()
    ema = WeightEMA(module, 0.9, warm_up=warm_up)
    expected = {n: p.detach().double().clone() for n, p in module.named_parameters()}
    for n in range(40):
        change(module)
        ema.update(module)
        decay = min(0.9, (1 + n) / (10 + n)) if warm_up else 0.9
        for name, p in module.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach().double()
    for name, value in expected.items():
        # each update rounds once, and errors shrink by the decay
        torch.testing.assert_close(
            ema.parameters[name].double(), value, rtol=0, atol=2e-6 * value.abs().max().item() * 10
        )
    assert all(torch.equal(ema.buffers[n], b) for n, b in module.named_buffers())


def test_swapping_in_and_out_is_exact_also_after_an_error() -> None:
    module = net()
    ema = WeightEMA(module, 0.9)
    for _ in range(3):
        change(module)
        ema.update(module)
    change(module)
    live, average = copy.deepcopy(module.state_dict()), copy.deepcopy(ema.state_dict())
    pointers = [p.data_ptr() for p in module.parameters()]
    with pytest.raises(KeyError), ema.applied_to(module):
        for name, p in module.named_parameters():
            assert torch.equal(p, average["parameters"][name])
        for name, b in module.named_buffers():
            assert torch.equal(b, average["buffers"][name])
        raise KeyError
    assert all(torch.equal(v, live[k]) for k, v in module.state_dict().items())
    assert all(torch.equal(v, average["parameters"][k]) for k, v in ema.parameters.items())
    assert pointers == [p.data_ptr() for p in module.parameters()]


def test_restored_average_continues_bit_for_bit() -> None:
    module = net()
    ema = WeightEMA(module, 0.99)
    for _ in range(3):
        change(module)
        ema.update(module)
    other = WeightEMA(net(seed=9), 0.99)
    other.load_state_dict(copy.deepcopy(ema.state_dict()))
    for _ in range(3):
        change(module)
        ema.update(module)
        other.update(module)
    assert other.updates == ema.updates == 6
    for mine, theirs in ((other.parameters, ema.parameters), (other.buffers, ema.buffers)):
        assert all(torch.equal(mine[n], theirs[n]) for n in theirs)


def test_a_state_of_another_model_is_refused_and_nothing_is_loaded() -> None:
    ema = WeightEMA(net(), 0.9)
    before = copy.deepcopy(ema.state_dict())
    stranger = WeightEMA(nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7), nn.Linear(7, 1)), 0.9).state_dict()
    with pytest.raises(RunFolderError, match=r"2\.weight"):
        ema.load_state_dict(stranger)
    assert all(torch.equal(v, before["parameters"][k]) for k, v in ema.parameters.items())


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0])
def test_decay_out_of_range(decay: float) -> None:
    with pytest.raises(ValueError, match="decay"):
        WeightEMA(net(), decay)
