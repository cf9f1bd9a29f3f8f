"""A run that goes on with another number of processes, backend or ZeRO stage is the undisturbed one, up to rounding."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from other_ranks_cases import losses, part
from ranks import RankFailure, RankPool, rank_pool
from resume_cases import METHODS, write_inputs
from safetensors.torch import load_file
from typer.testing import CliRunner

from mooring.cli import app
from mooring.state.store import checkpoints_of

STOP = 5  # in the middle of the second epoch
# Sums of rows in another order round otherwise, and every step builds on the one before.
LOSS = {"rel": 1e-4, "abs": 1e-5}
WEIGHTS = {"rtol": 1e-3, "atol": 2e-5}
# Batch statistics of eight rows make a step many times as sensitive to the one before.
BATCH_STATISTICS = {"concept_tuning", "daft", "stoch_norm", "tes"}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # before the ranks start: they inherit it
        patch.setenv("MOORING_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder, world=2)
    # stages 1 and 2 put parameters in another order, stage 3 into several flat tensors
    odd = {"round_robin_gradients": True, "sub_group_size": 3000, "stage3_param_persistence_threshold": 0}
    (folder / "odd.json").write_text(json.dumps({"zero_optimization": odd}))
    return folder


class Places:
    """Where a part of a run can be: ``local``, or ddp, zero0 to zero3, odd1 to odd3 (in an order of their own), cpu1 to
    cpu3 (with what the optimizer keeps in host memory), parts3 (loaded in parts), and the number of processes."""

    def __init__(self, inputs: Path, request: pytest.FixtureRequest) -> None:
        self.inputs, self._request = inputs, request

    def call(self, place: str, function: str, **arguments: Any) -> list[Any]:
        name, world = (place, 1) if place == "local" else (place[:-2], int(place[-1]))
        backend: dict[str, Any] = {"name": name}
        if name[-1].isdecimal():
            file = "odd.json" if name.startswith("odd") else "divided.json"
            backend = {
                "name": "deepspeed",
                "zero_stage": int(name[-1]),
                "deepspeed_config": str(self.inputs / file),
                "offload_optimizer": name.startswith("cpu"),
                "sharded_loading": name.startswith("parts"),
            }
        arguments |= {"inputs": str(self.inputs), "backend": backend}
        pool: RankPool = self._request.getfixturevalue(f"ranks_{world}")
        return pool.run(f"other_ranks_cases:{function}", **arguments)


@pytest.fixture(scope="module")
def ranks_1() -> Iterator[RankPool]:
    with rank_pool(1) as pool:
        yield pool


@pytest.fixture(scope="module")
def ranks_2(two_ranks: RankPool) -> RankPool:
    return two_ranks


@pytest.fixture(scope="module")
def ranks_4() -> Iterator[RankPool]:
    with rank_pool(4) as pool:
        yield pool


@pytest.fixture
def places(inputs: Path, request: pytest.FixtureRequest) -> Places:
    return Places(inputs, request)


def rate_of(method: str) -> float:
    """A learning rate at which rounding does not grow as fast as the loss falls."""
    return 0.001 if {"feature_map", *BATCH_STATISTICS} & set(method.split("+")) else 0.01


@cache
def undisturbed(inputs: Path, folder: Path, method: str, settings: str) -> tuple[list[float], Any, list[Any]]:
    """Losses, weights and ids of the run on one process that nothing interrupts."""
    out = folder / f"whole-{method}-{abs(hash(settings))}"
    ids = part(
        inputs=str(inputs), out=str(out), method=method, backend={"name": "local"}, **json.loads(settings)
    )
    return losses(str(out)), load_file(out / "model" / "model.safetensors"), ids


def continued(
    places: Places, folder: Path, tmp_path: Path, first: str, then: str, method: str, **settings: Any
) -> float:
    """Both parts of the run against the undisturbed one; returns the largest difference of a loss."""
    wanted, model, ids = undisturbed(places.inputs, folder, method, json.dumps(settings))
    out = str(tmp_path / "run")
    seen = places.call(first, "part", out=out, method=method, stop=STOP, **settings)
    again = places.call(then, "part", out=out, method=method, resume="auto", allow_inexact=True, **settings)
    for parts, expected in ((seen, ids[:STOP]), (again, ids[STOP:])):
        # of one batch after the other, the ranks' shares side by side
        assert [list(chain(*share)) for share in zip(*parts, strict=True)] == expected
    found = losses(out)
    sensitive = bool(set(method.split("+")) & BATCH_STATISTICS)
    assert found == pytest.approx(wanted, **({"rel": 1e-3, "abs": 1e-4} if sensitive else LOSS))
    if not sensitive:
        got = load_file(Path(out) / "model" / "model.safetensors")
        assert got.keys() == model.keys()
        for name in model:
            torch.testing.assert_close(got[name], model[name], **WEIGHTS, msg=lambda m, n=name: f"{n}: {m}")
    (recorded,) = json.loads((Path(out) / "result.json").read_text())["inexact"]
    assert recorded["step"] == STOP
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("undisturbed")


WAYS = [
    # always
    ("zero1x2", "local", "gathered"),
    ("local", "zero3x2", "sharded"),
    ("zero3x2", "zero2x1", "sharded"),
    ("odd2x2", "odd3x2", "gathered"),
]
SLOW_WAYS = [
    *((f"zero{s}x2", f"zero{s}x1", scope) for s in (1, 2, 3) for scope in ("gathered", "sharded")),
    *((f"zero{s}x1", f"zero{s}x2", scope) for s in (1, 2, 3) for scope in ("gathered", "sharded")),
    *((f"zero{s}x2", f"zero{s}x4", scope) for s in (1, 2, 3) for scope in ("gathered", "sharded")),
    *((f"zero{s}x4", f"zero{s}x2", scope) for s in (1, 2, 3) for scope in ("gathered", "sharded")),
    *((f"zero{a}x2", f"zero{b}x2", "gathered") for a in range(4) for b in range(4) if a != b),
    *((f"zero{s}x4", "local", "sharded") for s in range(4)),
    *(("local", f"zero{s}x4", "sharded") for s in range(4)),
    *((f"odd{s}x2", "ddpx4", "gathered") for s in (1, 2, 3)),
    *(("ddpx4", f"odd{s}x2", "sharded") for s in (1, 2, 3)),
    *(("local", f"cpu{s}x2", "gathered") for s in (1, 2, 3)),
    *((f"cpu{s}x2", "local", "sharded") for s in (1, 2, 3)),
]


@pytest.mark.parametrize(
    "first, then, scope",
    [pytest.param(*way, id="-".join(way)) for way in WAYS]
    + [pytest.param(*way, id="-".join(way), marks=pytest.mark.slow) for way in SLOW_WAYS],
)
def test_the_rest_is_that_of_the_undisturbed_run(
    places: Places,
    folder: Path,
    tmp_path: Path,
    record_property: Any,
    first: str,
    then: str,
    scope: str,
) -> None:
    bank = {"bank_size": 16, "rotation_period": 2, "bank_scope": scope}
    optimizer = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.05}
    furthest = continued(
        places, folder, tmp_path, first, then, "dr_tune", model="test_vit", settings=bank, optimizer=optimizer,
        train={"clip_grad_norm": 1.0},
    )  # fmt: skip
    record_property("furthest", furthest)


# what always runs: a bank and a source stream, a queue by class with a momentum encoder, streams that all draw from
ALWAYS = ("bi_tuning", "soft_fine_tuning", "stoch_norm")


@pytest.mark.parametrize(
    "first, then", [("ddpx2", "local"), pytest.param("local", "ddpx2", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(m, marks=() if m in ALWAYS else pytest.mark.slow)
        for m in (*METHODS, "dr_tune+tes", "daft+bi_tuning")
    ],
)
def test_every_method_goes_on(
    places: Places, folder: Path, tmp_path: Path, record_property: Any, method: str, first: str, then: str
) -> None:
    """With batch statistics where the method wants them, over the images of all ranks."""
    sgd = {"name": "sgd", "lr": rate_of(method)}
    record_property("furthest", continued(places, folder, tmp_path, first, then, method, optimizer=sgd))


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [("parts3x2", "local"), ("zero1x2", "parts3x2")])
def test_parameters_loaded_in_parts_go_on(
    places: Places, folder: Path, tmp_path: Path, first: str, then: str
) -> None:
    adamw = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.05}
    plain = {"ema_decay": None}
    continued(places, folder, tmp_path, first, then, "fine_tune", optimizer=adamw, train=plain)


@pytest.mark.parametrize(
    "first, then", [("ddpx2", "local"), pytest.param("local", "zero3x2", marks=pytest.mark.slow)]
)
def test_images_from_dali_go_on(places: Places, folder: Path, tmp_path: Path, first: str, then: str) -> None:
    sgd = {"name": "sgd", "lr": 0.01}
    continued(places, folder, tmp_path, first, then, "fine_tune", source="dali", optimizer=sgd)


@pytest.mark.parametrize(
    "first, then, method",
    [
        ("zero3x2", "local", "bi_tuning"),
        pytest.param("local", "zero1x2", "bi_tuning", marks=pytest.mark.slow),
        pytest.param("ddpx2", "ddpx4", "bi_tuning", marks=pytest.mark.slow),
        pytest.param("zero2x4", "ddpx2", "bi_tuning", marks=pytest.mark.slow),
        pytest.param("ddpx2", "local", "concept_tuning", marks=pytest.mark.slow),
    ],
)
def test_sharded_queues_go_on(
    places: Places, folder: Path, tmp_path: Path, first: str, then: str, method: str
) -> None:
    settings = {"queue_scope": "sharded"}
    sgd = {"name": "sgd", "lr": rate_of(method)}
    continued(places, folder, tmp_path, first, then, method, settings=settings, optimizer=sgd)


@pytest.mark.parametrize(
    "scope", ["private", *(pytest.param(s, marks=pytest.mark.slow) for s in ("sharded", "gathered"))]
)
def test_a_ranks_own_statistics_and_banks_go_on(places: Places, tmp_path: Path, scope: str) -> None:
    """From two ranks with BatchNorm statistics of their own: the mean of them; of private banks, the newest rows."""
    arguments = {
        "method": "dr_tune", "settings": {"bank_size": 12, "bank_scope": scope}, "batchnorm": "train",
        "train": {"sync_batchnorm": False}, "out": str(tmp_path / "run"),
    }  # fmt: skip
    places.call("ddpx2", "part", stop=STOP, **arguments)
    ref = checkpoints_of(tmp_path / "run").newest().ref
    assert ref is not None
    both = [checkpoints_of(tmp_path / "run").read(ref, f"rank-{rank}") for rank in (0, 1)]
    name = next(name for name in both[0]["buffers"] if name.endswith("running_mean"))
    assert not torch.equal(both[0]["buffers"][name], both[1]["buffers"][name])
    (found,) = places.call("local", "carried", ref=str(tmp_path / "run"), **arguments)
    mean = (both[0]["buffers"][name] + both[1]["buffers"][name]) / 2
    torch.testing.assert_close(found["weights"][name], mean)
    ids = found["extra"]["bank"]["ids"]
    banks = [part["extra"]["bank"]["ids"] for part in both]
    if scope == "private":  # each rank's six newest of twelve
        assert len(set(ids.tolist()) & set(banks[0].tolist())) >= 6
        assert len(set(ids.tolist()) & set(banks[1].tolist())) >= 6
        assert len(ids) == 12 and ids.min() >= 0
    else:
        whole = banks[0] if scope == "gathered" else torch.stack(banks, 1).flatten()
        assert torch.equal(ids, whole)
    two = places.call("ddpx2", "part", resume="auto", allow_inexact=True, **arguments)
    assert len(two[0]) == 9 - STOP  # and the checkpoint is what it was


@pytest.mark.parametrize(
    "then", ["odd3x2", "local", *(pytest.param(p, marks=pytest.mark.slow) for p in ("zero3x1", "zero1x2"))]
)
def test_groups_and_steps_are_their_own(places: Places, tmp_path: Path, then: str) -> None:
    """DeepSpeed's own way gives every group the first one's numbers, and all flat tensors one and the same step."""
    adamw = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.05}
    arguments = {"method": "fine_tune", "model": "test_vit", "out": str(tmp_path / "run"), "optimizer": adamw}
    places.call("zero3x2", "part", stop=STOP, **arguments)
    found = places.call(then, "carried", ref=str(tmp_path / "run"), **arguments)
    decays = {"decay": 0.05, "no_decay": 0.0}
    for rank in found:
        assert rank["step"] == STOP and rank["steps"] and set(rank["steps"]) == {float(STOP)}
        assert rank["own steps"] == len(rank["steps"])
        assert all(decay == decays[name.split("/")[-1]] for name, decay, _ in rank["groups"])
    again = places.call(then, "carried", ref=str(tmp_path / "run"), **arguments)
    assert [rank["drawn"] for rank in again] == [rank["drawn"] for rank in found]
    assert len({rank["drawn"] for rank in found}) == len(found)


def test_it_is_declared_inexact(places: Places, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = {"method": "fine_tune", "out": str(out)}
    places.call("zero2x2", "part", stop=STOP, **arguments)
    (names,) = places.call("local", "what_differs", **arguments)
    assert {"processes", "backend.name"} <= set(names)
    assert {"backend.zero_stage"} <= set(places.call("zero3x2", "what_differs", **arguments)[0])
    assert places.call("zero2x2", "what_differs", **arguments) == [[], []]
    local = ["backend.name=local", "backend.deepspeed_config=none"]
    checked = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["resume", str(out), "--check", *local])
    assert checked.exit_code == 1
    rows = {line.split()[1]: line for line in checked.stdout.splitlines() if line.startswith("│")}
    assert (
        "2" in rows["processes"] and "deepspeed" in rows["backend.name"] and "local" in rows["backend.name"]
    )
    assert f"would not continue bit for bit (--allow-inexact goes on) from step {STOP}" in checked.stdout
    refused = CliRunner().invoke(app, ["resume", str(out), *local])
    assert refused.exit_code == 2 and "processes: saved 2, now 1" in refused.stderr


def test_another_batch_is_refused(places: Places, tmp_path: Path) -> None:
    arguments = {"method": "fine_tune", "out": str(tmp_path / "run")}
    places.call("ddpx2", "part", stop=STOP, **arguments)
    with pytest.raises(
        RankFailure, match=r"batches of 4 rows on all processes together; got 8: keep train.batch_size"
    ):
        places.call("local", "carried", ref=str(tmp_path / "run"), train={"batch_size": 4}, **arguments)
