"""The arithmetic of ZeRO, and what is recommended from it."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from mooring.capacity.partition import (
    STAGES,
    Numbers,
    bank_bytes,
    bank_traffic,
    numbers,
    states,
    traffic,
)
from mooring.capacity.prediction import Cluster, Line, Predictor, Workload, advise
from mooring.capacity.rates import Rates, measured
from mooring.capacity.step import Sizes, Traced
from mooring.cli import app
from mooring.config.load import load_config, shipped_recipes

M = 10**6
# no buffers to speak of: less than a bucket of everything
SIZES = Sizes(
    parameters=8 * M,
    trainable=8 * M,
    largest_block=M,
    block_count=8,
    frozen=32 * M,
    banks=4 * M,
    bank_row=2000,
)


def test_bytes_of_an_element() -> None:
    """fp32 weights and gradients, two moments with AdamW, and DeepSpeed's own fp32 copy of what a rank steps."""
    assert numbers("adamw", 0) == Numbers(4, 4, 8)
    assert numbers("adamw", 2) == Numbers(4, 4, 12)
    assert numbers("sgd", 0) == Numbers(4, 4, 4)
    assert numbers("sgd", 1, momentum=False) == Numbers(4, 4, 4)


@pytest.mark.parametrize("world", [1, 2, 64])
def test_each_stage_divides_one_thing_more(world: int) -> None:
    held = {stage: states(SIZES, Numbers(2, 2, 12), stage, world, accumulate=2) for stage in STAGES}
    psi = 8 * M
    # one micro-batch: what stage 1 reduces is a rank's part from then on
    once = states(SIZES, Numbers(2, 2, 12), 1, world)
    assert once.gradients == held[2].gradients
    assert held[0].total - held[0].buffers == 16 * psi
    assert held[1].total - held[1].buffers == pytest.approx(4 * psi + 12 * psi / world)
    assert held[2].total - held[2].buffers == pytest.approx(2 * psi + 14 * psi / world)
    assert held[3].total - held[3].buffers == pytest.approx(16 * psi / world)


def test_frozen_parameters_of_the_module_have_no_state() -> None:
    probe = Sizes(8 * M, M, M, 8, 0, 0, 0)
    held = states(probe, Numbers(4, 4, 8), 0, 1)
    assert (held.parameters, held.gradients, held.optimizer) == (32 * M, 4 * M, 8 * M)


def test_bytes_sent() -> None:
    """2, 3, 3 and 2 times the model, less one share: DeepSpeed reduces whole gradients at stages 1 and 2, and at 3
    keeps what it gathered; tests/distributed counts it. Beyond what it keeps, it gathers again."""
    each, world = Numbers(2, 2, 12), 8
    model = 2 * 8 * M * (world - 1) / world
    sent = [traffic(SIZES, each, stage, world, accumulate=1, bank=0).total for stage in STAGES]
    assert sent == pytest.approx([2 * model, 3 * model, 3 * model, 2 * model])
    thrice = [traffic(SIZES, each, stage, world, accumulate=3, bank=0).total for stage in STAGES]
    assert thrice == pytest.approx([2 * model, 3 * model, 7 * model, 6 * model])
    large = Sizes(2000 * M, 2000 * M, M, 8, 0, 0, 0)
    gathered = traffic(large, each, 3, world, accumulate=1, bank=0).parameters
    assert gathered == pytest.approx(1.5 * 2 * 2000 * M * (world - 1) / world)
    assert all(traffic(SIZES, each, stage, 1, accumulate=3, bank=0).total == 0 for stage in STAGES)


def test_banks_by_how_they_are_shared() -> None:
    assert [bank_bytes(SIZES, mode, 4) for mode in ("private", "gathered", "sharded")] == [4 * M, 4 * M, M]
    assert bank_traffic(SIZES, "private", 4, 32, 1000) == 0
    assert bank_traffic(SIZES, "gathered", 4, 32, 1000) == 3 * 32 * 2000
    assert bank_traffic(SIZES, "sharded", 4, 32, 1000) == 3 * 32 * 2000 + 1500
    assert bank_traffic(SIZES, "gathered", 1, 32, 1000) == 0


def predictor(*, activations: float = 10 * M, rates: Rates | None = None, **settings: Any) -> Predictor:
    """On a made-up workload, so that nothing is traced."""
    overrides = ["data=x", "train.batch_size=256", *(f"{key}={value}" for key, value in settings.items())]
    found = Predictor(load_config(None, overrides), 100, rates=rates or Rates(), overhead=0)
    line = Line(M, activations)

    def traced(batch: int, checkpointing: bool) -> Traced:
        peak = round(line.at(batch) / (10 if checkpointing else 1))
        return Traced(batch, peak, peak, peak, 0, 0, 0)

    vars(found).update(sizes=SIZES, feature_dim=64, can_checkpoint=True, _traced=traced)
    found._workloads.update(
        {
            False: Workload(line, line, Line(0, 1e9), Line(0, 1e8), 100),
            True: Workload(
                Line(M, activations / 10), Line(M, activations / 10), Line(0, 1.3e9), Line(0, 1.3e8), 130
            ),
        }
    )
    return found


def test_more_machines_more_images_and_less_each() -> None:
    found = predictor()
    worlds = [found.predict(Cluster(nodes, 8, 80e9), 1, batch=32) for nodes in (1, 2, 16, 128)]
    rates = [way.images_per_second for way in worlds]
    assert rates == sorted(rates)
    each = [way.images_per_second / way.world for way in worlds]
    assert each == sorted(each, reverse=True)
    assert [way.memory for way in worlds] == sorted((way.memory for way in worlds), reverse=True)


def test_what_fits_as_configured_stays_as_configured() -> None:
    advice = advise(predictor(**{"train.batch_size": 256}), Cluster(1, 8, 80e9))
    assert advice.chosen is not None
    assert (advice.chosen.batch, advice.chosen.accumulate, advice.chosen.checkpointing) == (32, 1, False)


def test_memory_decides() -> None:
    """Each cluster one sort of relief smaller than the one before."""
    found = predictor(**{"train.batch_size": 256})
    # ZeRO-0 has the smallest buffer here, a copy of the gradients: 160 MB in all for the model
    sizes = (620e6, 330e6, 270e6)
    ways = [advise(found, Cluster(1, 8, size)).chosen for size in sizes]
    assert all(way is not None for way in ways)
    assert [way.accumulate > 1 or way.checkpointing for way in ways if way] == [False, True, True]
    for way, size in zip(ways, sizes, strict=True):
        assert way is not None
        assert way.memory <= size
        assert way.batch * way.accumulate == 32
    nothing = advise(found, Cluster(1, 8, 50e6))
    assert nothing.chosen is None
    assert "nothing fits" in nothing.reasons[-1]
    assert any("ZeRO 3 as configured needs" in reason for reason in nothing.reasons)


def test_a_slow_network_is_told() -> None:
    advice = advise(predictor(rates=Rates(link=1e7)), Cluster(2, 8, 80e9))
    assert "waits for the network" in advice.reasons[-1]


def test_measured_rates_are_rates() -> None:
    import torch

    matmul, memory = measured(torch.device("cpu"), torch.float32)
    assert 0 < matmul < 1e16
    assert 0 < memory < 1e14


# ---------------------------------------------------------------- the command


def run(*words: str) -> Any:
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, ["plan", *words])


def test_the_command_needs_no_data() -> None:
    result = run("model.name=resnet10t", "train.image_size=64", "--nodes", "2", "--gpus-per-node", "4")
    assert result.exit_code == 0, result.output
    assert "each of 8 GPUs" in result.stdout
    assert "recommended: backend.zero_stage=" in result.stdout
    assert "predicted, not measured" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.epoch=3"], "the nearest is train.epochs"),
        (["model.name=vit_hug_patch14_224"], "timm has no model"),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("recipe", "parameters"), [("vit_base", 86e6), ("vit_large", 304e6), ("vit_huge", 631e6)]
)
def test_the_recipes_of_large_models_describe_them(recipe: str, parameters: float) -> None:
    from mooring.capacity.step import build_subject, sizes

    assert recipe in shipped_recipes()
    config = load_config(recipe, ["data=x"])
    assert sizes(build_subject(config, 100)).trainable == pytest.approx(parameters, rel=0.01)
