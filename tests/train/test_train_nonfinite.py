"""A loss or gradient that is not finite: nothing of its step is left, and a run that is continued is the same run."""

from __future__ import annotations

import copy
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mooring.config.schema import OptimizerSettings
from mooring.train.engine import Engine
from mooring.train.health.diagnosis import NonFiniteError
from mooring.train.health.memory import banks_of
from mooring.train.health.nonfinite import judge, take_step
from mooring.train.local_backend import LocalBackend
from mooring.train.optimizers import build_optimizer


def tensors(tree: Any, place: str = "") -> dict[str, Tensor]:
    """Every tensor and number of a state by its place."""
    if isinstance(tree, Tensor):
        return {place: tree}
    if isinstance(tree, dict):
        return {k: v for key, inner in tree.items() for k, v in tensors(inner, f"{place}/{key}").items()}
    if isinstance(tree, list | tuple):
        return {k: v for i, inner in enumerate(tree) for k, v in tensors(inner, f"{place}[{i}]").items()}
    return {place: torch.tensor(float(tree))} if isinstance(tree, int | float) else {}


def assert_same(first: Any, second: Any) -> None:
    own, other = tensors(first), tensors(second)
    assert own.keys() == other.keys()
    differing = [name for name in own if "/loop/" not in name and not torch.equal(own[name], other[name])]
    assert not differing, differing


class Fault:
    """Makes the encoder's input NaN in the forward passes that are asked for, as a flipped bit would."""

    def __init__(self, engine: Engine) -> None:
        self.calls = 0
        self.at: set[int] = set()
        engine.method.encoder.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        if not module.training:
            return None
        self.calls += 1
        return (inputs[0] * float("nan"),) if self.calls in self.at else None


def steps(engine: Engine, count: int) -> None:
    while engine.global_step < count:
        for group in engine.epoch_groups():
            engine.step(group)
            if engine.global_step == count:
                return


# ---------------------------------------------------------------- one optimizer step


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
@pytest.mark.parametrize("bad", ["nan", "inf", "loss"])
def test_a_bad_step_changes_nothing_and_a_good_one_is_an_ordinary_one(name: str, bad: str) -> None:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(4))]
    twins = [nn.Parameter(w.detach().clone()) for w in weights]
    settings = OptimizerSettings(name=name)  # type: ignore[arg-type]
    guarded, plain = (
        build_optimizer([{"params": list(own), "lr": 0.1, "weight_decay": 0.01}], settings, "cpu")
        for own in (weights, twins)
    )

    def give(gradients: list[Tensor]) -> None:
        for own in (weights, twins):
            for p, g in zip(own, gradients, strict=True):
                p.grad = g.clone()

    backend = LocalBackend(torch.device("cpu"), "fp32")
    backend.prepare(nn.Identity(), guarded)  # type: ignore[arg-type]
    for number in range(4):
        gradients = [torch.randn_like(w) for w in weights]
        give(gradients)
        loss = torch.tensor(1.0)
        if number in (0, 2):  # also the very first step, before there are moments
            before = copy.deepcopy([w.detach() for w in weights])
            state = copy.deepcopy(guarded.state_dict()["state"])
            if bad == "loss":
                loss = torch.tensor(float("nan"))
            else:
                assert weights[0].grad is not None
                weights[0].grad[2, 1] = float(bad)
            assert not take_step(judge(loss, *backend.gradient_norms()), backend, guarded)
            assert all(torch.equal(w.detach(), b) for w, b in zip(weights, before, strict=True))
            for key, moments in state.items():
                assert_same(moments, guarded.state_dict()["state"][key])
            give(gradients)
        assert all(p.grad is not None for p in weights)
        assert take_step(judge(torch.tensor(1.0), *backend.gradient_norms()), backend, guarded)
        plain.step()
        assert all(p.grad is None for p in weights)
        assert all(torch.equal(w, t) for w, t in zip(weights, twins, strict=True))


def test_large_but_finite_gradients_are_no_fault() -> None:
    weight = nn.Parameter(torch.ones(100))
    weight.grad = torch.full((100,), 1e18)
    assert not judge(torch.tensor(1e38), [weight], weight.grad.norm().reshape(1)).is_bad()


# ---------------------------------------------------------------- a run

METHODS = {
    "fine_tune": {
        "method": {"name": "fine_tune"},
        "train": {"batchnorm": "train", "mixup": 0.3, "ema_decay": 0.9},
    },
    "dr_tune": {
        "method": {"name": "dr_tune", "bank_size": 10, "rotation_period": 2},
        "train": {"accumulate": 2},
    },
    "bi_tuning": {"method": {"name": "bi_tuning"}, "optimizer": {"name": "sgd"}},
    "core_tuning": {"method": {"name": "core_tuning"}, "train": {"clip_grad_norm": 1.0}},
}


@pytest.mark.parametrize("name", METHODS)
def test_after_a_passing_fault_the_run_goes_on_as_if_nothing_had_happened(make_config, name: str) -> None:
    config = make_config(**METHODS[name])
    with Engine.build(config) as engine:
        engine.prepare()
        steps(engine, 5)
        undisturbed = copy.deepcopy(engine.state_dict())
    with Engine.build(config) as engine:
        engine.prepare()
        fault = Fault(engine)
        steps(engine, 3)  # the next one has two micro-batches where it can have
        before = copy.deepcopy(engine.state_dict())
        # in the second of them, so that the first one's traces have to go, too
        fault.at = {fault.calls + config.train.accumulate}
        with pytest.raises(NonFiniteError) as stop:
            steps(engine, 5)
        assert_same(before, engine.state_dict())
        assert stop.value.diagnosis["step"] == 3
        steps(engine, 5)
        assert_same(undisturbed, engine.state_dict())


def test_a_step_that_is_left_out_leaves_nothing_behind(make_config) -> None:
    changes = {"train": {"batchnorm": "train"}, "method": {"name": "dr_tune", "bank_size": 10}}
    config = make_config(**changes, health={"nonfinite": "skip", "max_skips": 2})
    with Engine.build(config) as engine:
        engine.prepare()
        fault = Fault(engine)
        fault.at = {2, 4, 6}
        results = []
        with pytest.raises(NonFiniteError, match="2 steps were left out"):
            while True:
                results += [engine.step(group) for group in islice(engine.epoch_groups(), 1)]
        assert [result.skipped is not None for result in results] == [False, True, False, True, False]
        assert results[1].metrics == {}
        assert engine.global_step == 5
        for place, tensor in tensors(engine.state_dict()).items():
            if "/best/" not in place:  # no epoch was validated: its loss is infinite yet
                assert bool(tensor.isfinite().all()), place
        assert all(bool(bank.view()["tuned"].isfinite().all()) for bank in banks_of(engine.method).values())


def test_off_lets_it_through(make_config) -> None:
    with Engine.build(make_config(health={"nonfinite": "off"})) as engine:
        engine.prepare()
        Fault(engine).at = {1}
        engine.step(next(engine.epoch_groups()))
        assert not all(bool(p.isfinite().all()) for p in engine.method.parameters())


def test_the_diagnosis_says_where_it_begins(make_config) -> None:
    with Engine.build(make_config(train={"clip_grad_norm": 1.0})) as engine:
        engine.prepare()
        layer = engine.method.encoder.get_parameter("model.layer2.0.conv1.weight")
        layer.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
        group = next(engine.epoch_groups())
        with pytest.raises(NonFiniteError, match=r"first encoder\.model\.layer2\.0\.conv1\.weight") as stop:
            engine.step(group)
        found = stop.value.diagnosis
        assert found["ids"] == [group[0].ids.tolist()]
        assert found["gradients that are not finite"] == ["encoder.model.layer2.0.conv1.weight"]
        assert found["images that are not finite"] == [[]]
        assert found["losses"][0]["loss"] < 100
        assert {row["role"] for row in found["groups"]} == {"backbone", "head"}
        assert sum(row["not finite"] for row in found["groups"]) == 1
