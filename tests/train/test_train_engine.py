"""Whole runs on generated photos: what they leave behind, how they stop, how they go on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from mooring import Engine
from mooring.config.load import load_config
from mooring.errors import DataError, MooringError
from mooring.report.metrics_log import read_metrics
from mooring.train.inference import load_run


def state_of(engine: Engine) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in engine.method.state_dict().items()}


@pytest.mark.parametrize("method", ["fine_tune", "linear_probe", "lp_ft", "dr_tune"])
def test_a_run_leaves_everything_it_promises(make_config, method: str) -> None:
    settings = {"name": method, **({"bank_size": 16} if method == "dr_tune" else {})}
    config = make_config(method=settings)
    result = Engine.build(config).fit()
    run = result.run
    for name in (
        "config.toml",
        "environment.json",
        "metrics.jsonl",
        "result.json",
        "curves.png",
        "confusion.png",
    ):
        assert (run / name).stat().st_size > 0, name
    assert any((run / "tensorboard").iterdir())
    assert load_config(run / "config.toml", []).model_dump() == config.model_dump()
    records = read_metrics(run)
    assert [r.epoch for r in records if r.kind == "val"] == [0, 1]
    assert [r.kind for r in records].count("test") == 1
    assert result.test is not None and result.val is not None
    assert result.test.n == 12
    assert not result.interrupted
    with Image.open(run / "curves.png") as picture:
        assert picture.width > 400


@pytest.mark.parametrize("method", ["linear_probe", "dr_tune"])
def test_exported_model_gives_the_tested_predictions(make_config, method: str, photos: Path) -> None:
    """The folder that timm opens has the best epoch's accuracy on the test split, image by image."""
    settings = {"name": method, **({"bank_size": 16} if method == "dr_tune" else {})}
    result = Engine.build(make_config(method=settings)).fit()
    predictor = load_run(result.run)
    again = predictor.evaluate(None, "test")
    assert torch.equal(again.confusion, result.test.confusion)
    assert abs(again.nll - result.test.nll) < 1e-4
    files = sorted((photos / "test").rglob("*.jpg"))
    answers = predictor.predict_files(files)
    right = sum(answer[0][0] == file.parent.name for answer, file in zip(answers, files, strict=True))
    assert right == int(result.test.confusion.diagonal().sum())


def test_learns_the_colours(make_config) -> None:
    config = make_config(
        train={"epochs": 6, "batch_size": 6, "image_size": 32, "eval_size": 32, "device": "cpu"},
        optimizer={"lr": 2e-3},
    )
    assert Engine.build(config).fit().test.top1 > 0.8


def test_same_seed_same_weights_and_another_seed_others(make_config, tmp_path: Path) -> None:
    finals = []
    for i, seed in enumerate((3, 3, 4)):
        engine = Engine.build(
            make_config(seed=seed, out=tmp_path / f"run{i}", method={"name": "dr_tune", "bank_size": 16})
        )
        engine.fit()
        finals.append(state_of(engine))
    assert all(torch.equal(a, b) for a, b in zip(finals[0].values(), finals[1].values(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(finals[0].values(), finals[2].values(), strict=True))


EXACT = {
    "sgd": {"optimizer": {"name": "sgd", "lr": 0.01}},
    "adamw-ema": {"train": {"ema_decay": 0.9, "batchnorm": "train"}},
    "lamb-accumulate-drop": {
        "optimizer": {"name": "lamb"},
        "train": {"accumulate": 2, "batch_size": 2},
        "model": {"drop_path_rate": 0.1},
    },
}


@pytest.mark.parametrize("source", ["torch", "dali"])
@pytest.mark.parametrize("method", ["fine_tune", "dr_tune"])
@pytest.mark.parametrize("case", list(EXACT))
def test_state_taken_mid_epoch_continues_bit_for_bit(
    make_config, tmp_path: Path, source: str, method: str, case: str
) -> None:
    settings = {"name": method, **({"bank_size": 16} if method == "dr_tune" else {})}
    options: dict = {**EXACT[case], "method": settings, "data": {"source": source}}
    if method == "fine_tune":
        options["train"] = {**options.get("train", {}), "mixup": 0.2}

    def steps(engine: Engine, count: int) -> None:
        while count:
            for group in engine.epoch_groups():
                engine.step(group)
                count -= 1
                if count == 0:
                    return

    whole = Engine.build(make_config(**options))
    steps(whole, 7)
    first = Engine.build(make_config(**options))
    steps(first, 3)
    ref = first.save("test")
    torch.randn(100)  # another process would have another random position
    second = Engine.build(make_config(**options, resume="auto"))
    second.resume(ref)
    steps(second, 4)
    assert second.global_step == whole.global_step == 7
    for (name, a), b in zip(state_of(whole).items(), state_of(second).values(), strict=True):
        assert torch.equal(a, b), name


def test_evaluation_measures_the_whole_split_whatever_was_read_before(make_config) -> None:
    with Engine.build(make_config(train={"batch_size": 2})) as engine:
        next(iter(engine.test_source))
        assert engine.evaluate(engine.test_source).n == 12


def test_with_an_average_the_engine_keeps_the_model_it_reports(make_config) -> None:
    engine = Engine.build(make_config(train={"epochs": 2, "ema_decay": 0.5}))
    result = engine.fit()
    again = engine.evaluate(engine.test_source)
    assert torch.equal(again.confusion, result.test.confusion) and again.nll == pytest.approx(result.test.nll)


def test_a_finished_run_can_be_resumed_without_changing_its_record(make_config) -> None:
    config = make_config()
    first = Engine.build(config).fit()
    before = json.loads((first.run / "result.json").read_text())
    again = Engine.build(config.model_copy(update={"resume": str(first.run)})).fit()
    after = json.loads((first.run / "result.json").read_text())
    assert torch.equal(first.test.confusion, again.test.confusion)
    assert after["test"] == before["test"] and after["images_per_second"] == before["images_per_second"]
    assert after["seconds"] >= before["seconds"] * 0.5
    assert [r.kind for r in read_metrics(first.run)].count("test") == 1
    repeated = load_config(first.run / "config.toml", [f"out={first.run.parent / 'again'}"])
    assert repeated.resume is None
    assert Engine.build(repeated).fit().test is not None


def test_the_default_batch_fits_a_small_data_set(make_config) -> None:
    config = make_config()
    train = config.train.model_dump(exclude={"batch_size"})
    with Engine.build(config.model_copy(update={"train": type(config.train)(**train)})) as engine:
        assert engine.config.train.batch_size == engine.plan().train_images < 32


def test_interrupt_keeps_a_valid_run_folder_and_resume_finishes_it(
    make_config, monkeypatch, tmp_path: Path
) -> None:
    config = make_config(train={"epochs": 3})
    engine = Engine.build(config)
    real, calls = engine.step, []

    def step(group):
        if len(calls) == engine.steps_per_epoch + 1:
            os.kill(os.getpid(), signal.SIGINT)  # in the middle of a step: the step is finished
        calls.append(1)
        return real(group)

    monkeypatch.setattr(engine, "step", step)
    result = engine.fit()
    assert result.interrupted
    assert json.loads((result.run / "result.json").read_text())["interrupted"] is True
    assert load_run(result.run).classes == ["class_0", "class_1", "class_2"]
    resumed = config.model_copy(update={"resume": str(result.run)})
    again = Engine.build(resumed)
    finished = again.fit()
    assert not finished.interrupted and finished.run == result.run
    steps = [r.step for r in read_metrics(finished.run) if r.kind == "train"]
    assert steps == sorted(set(steps))
    undisturbed = Engine.build(make_config(train={"epochs": 3}, out=tmp_path / "other"))
    undisturbed.fit()
    for (name, a), b in zip(state_of(again).items(), state_of(undisturbed).values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(finished.test.confusion, undisturbed.evaluate(undisturbed.test_source).confusion)


def test_interrupt_during_validation_validates_that_epoch_after_the_resume(make_config, monkeypatch) -> None:
    config = make_config(train={"epochs": 2})
    engine = Engine.build(config)
    real = engine.evaluate

    def evaluate(source, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return real(source, **options)

    monkeypatch.setattr(engine, "evaluate", evaluate)
    assert engine.fit().interrupted
    Engine.build(config.model_copy(update={"resume": str(config.out)})).fit()
    assert [r.epoch for r in read_metrics(config.out) if r.kind == "val"] == [0, 1]


def test_interrupt_before_the_first_validation_still_exports_a_model(make_config, monkeypatch) -> None:
    engine = Engine.build(make_config())

    real = engine.step

    def step(group):
        os.kill(os.getpid(), signal.SIGINT)
        return real(group)

    monkeypatch.setattr(engine, "step", step)
    result = engine.fit()
    assert engine.global_step == 1
    assert result.interrupted and result.val is None
    load_run(result.run)


def test_accumulation_counts_optimizer_steps(make_config) -> None:
    engine = Engine.build(make_config(train={"accumulate": 2, "batch_size": 4}))
    groups = [len(g) for g in engine.epoch_groups()]
    assert len(groups) == engine.steps_per_epoch
    assert set(groups[:-1]) == {2}


def test_step_in_a_loop_of_ones_own(make_config) -> None:
    engine = Engine.build(make_config(method={"name": "dr_tune", "bank_size": 16}))
    losses = [engine.step(batch).loss for batch in engine.train_source]
    assert len(losses) == engine.steps_per_epoch == engine.global_step
    assert all(loss.ndim == 0 and torch.isfinite(loss) for loss in losses)


@pytest.mark.parametrize(
    "options",
    [
        {"train": {"precision": "bf16"}},
        {"train": {"ema_decay": 0.9}},
        {"train": {"batchnorm": "train"}},
        {"train": {"label_smoothing": 0.1, "mixup": 0.2, "cutmix": 1.0}},
        {"train": {"clip_grad_norm": 1.0}},
        {"optimizer": {"name": "lamb", "layer_decay": 0.8}},
        {"optimizer": {"name": "sgd"}, "schedule": {"name": "step", "warmup_epochs": 0}},
        {"data": {"augment": "strong"}},
    ],
    ids=lambda o: "-".join(f"{k}.{n}" for k, t in o.items() for n in t),
)
def test_every_option_runs(make_config, options: dict) -> None:
    train = {"epochs": 1, **options.get("train", {})}
    result = Engine.build(make_config(**{**options, "train": train})).fit()
    assert result.val is not None and result.val.nll == result.val.nll


def test_mixing_is_refused_where_the_method_does_not_define_it(make_config) -> None:
    with pytest.raises(MooringError, match=r"dr_tune.*mixup"):
        Engine.build(make_config(method={"name": "dr_tune"}, train={"mixup": 0.2}))


def test_batch_larger_than_the_data(make_config) -> None:
    with pytest.raises(DataError, match="batch"):
        Engine.build(make_config(train={"batch_size": 64}))


def test_a_diverging_run_stops_with_advice(make_config) -> None:
    config = make_config(optimizer={"name": "sgd", "lr": 1e8}, report={"progress": "quiet", "log_every": 1})
    with pytest.raises(MooringError, match=r"loss is not finite.*optimizer\.lr"):
        Engine.build(config).fit()


@pytest.mark.slow
def test_a_compiled_encoder_trains_and_exports(make_config) -> None:
    result = Engine.build(make_config(train={"epochs": 1, "compile": True})).fit()
    again = load_run(result.run).evaluate(None, "test")
    assert again.n == result.test.n and abs(again.nll - result.test.nll) < 1e-3


def test_losses_of_micro_batches_are_averaged_and_a_term_over_the_steps_that_had_it() -> None:
    from mooring.methods.base import StepOutput
    from mooring.train.engine import _sum_metrics
    from mooring.train.running_mean import RunningMetrics

    def output(loss: float, term: float) -> StepOutput:
        scalars = {"loss": loss, "loss_source": term, "rows": 4.0, "correct": 2.0}
        values = {name: torch.tensor(value) for name, value in scalars.items()}
        return StepOutput(values["loss"], torch.zeros(4, 2), values)

    step = _sum_metrics([output(1.0, 3.0), output(2.0, 5.0)])
    assert {k: float(v) for k, v in step.items()} == {
        "loss": 1.5,
        "loss_source": 4.0,
        "rows": 8.0,
        "correct": 4.0,
    }
    running = RunningMetrics()
    running.add(step)
    running.add({k: v for k, v in step.items() if k != "loss_source"})
    assert running.drain() == {"loss": 1.5, "loss_source": 4.0, "top1": 0.5}
    assert running.drain() == {}
