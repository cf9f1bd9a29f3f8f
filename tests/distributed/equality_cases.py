"""A few steps of a method through a backend, on one process or on a rank's share of the same global batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from method_cases import at, context, make_batch, make_method, selected, trained_parameters

from mooring.config.schema import RunConfig
from mooring.data.batch import Batch
from mooring.distributed import ALONE, Ranks
from mooring.models.batchnorm import freeze_statistics
from mooring.models.batchnorm_sync import synchronise_statistics_
from mooring.traffic import TRAFFIC
from mooring.train.data_parallel_backend import DataParallelBackend
from mooring.train.local_backend import LocalBackend

ROWS = 16  # of a global batch
CPU = torch.device("cpu")


def share(batch: Batch, ranks: Ranks) -> Batch:
    """This rank's rows of a global batch, and how many there are in all."""
    rows = batch.labels.shape[0] // ranks.world
    own = selected(batch, slice(ranks.rank * rows, (ranks.rank + 1) * rows))
    if batch.source is not None:
        rows = batch.source.labels.shape[0] // ranks.world
        own = replace(own, source=selected(batch.source, slice(ranks.rank * rows, (ranks.rank + 1) * rows)))
    if ranks.world == 1:
        return own
    return replace(own, mean_rows=(batch.labels >= 0).sum().float() / ranks.world)


def make_backend(ranks: Ranks, backend: str, **settings: Any) -> Any:
    if backend == "local":
        return LocalBackend(CPU, "fp32")
    if backend == "ddp":
        return DataParallelBackend(CPU, "fp32", ranks)
    from mooring.train.deepspeed_backend import DeepSpeedBackend

    tables = {"data": "nowhere", "train": {"clip_grad_norm": settings.pop("clip")}, "backend": settings}
    made = DeepSpeedBackend(RunConfig.model_validate(tables), CPU, "fp32", ranks)
    # by default it leaves what is small whole, and here everything is
    made.settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
    return made


def train(
    method: str,
    kind: str = "vit",
    *,
    backend: str = "local",
    classes: int = 4,
    steps: int = 3,
    micros: int = 1,
    padded: int = 0,
    clip: float | None = None,
    optimizer: str = "sgd",
    backend_settings: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Losses by step, weights at the end, and what was sent; ``backend="local"`` takes the whole batches.

    Returns:
        losses [steps], averaged over ranks; norms; weights; bank: labels, ids, fingerprint of the first bank; bytes
        sent in the last step.
    """
    ranks = ALONE if backend == "local" else Ranks.here()
    made = make_method(method, kind, classes, ranks=ranks, **changes)
    if made.requirements.batchnorm != "train":  # as train.batchnorm=auto
        freeze_statistics(made.encoder)
    for module in (made, *made.followers()):
        if ranks.world > 1:
            synchronise_statistics_(module, ranks)
    batches = [share(make_batch(ROWS, classes, seed=s, padded=padded), ranks) for s in range(steps * micros)]
    warm_up = [share(make_batch(ROWS, classes, seed=50 + s), ranks) for s in range(2)]
    made.train()
    made.setup(replace(context(warm_up, steps=steps), batch_size=ROWS))
    groups = [
        {"params": [p], "lr": 0.01 if optimizer == "sgd" else 1e-3, "weight_decay": 1e-3, "role": role}
        for role, parameters in made.parameter_roles().items()
        for p in parameters
    ]
    groups = merged(groups)
    chosen: torch.optim.Optimizer = (
        torch.optim.SGD(groups, momentum=0.9) if optimizer == "sgd" else torch.optim.AdamW(groups)
    )
    running = make_backend(ranks, backend, clip=clip, **(backend_settings or {}))
    running.prepare(made, chosen)
    rates = [group["lr"] for group in chosen.param_groups]
    start = {name: tensor.clone() for name, tensor in running.weights().items()}
    losses, norms = [], []
    for step in range(steps):
        before = TRAFFIC.bytes.copy()
        group = batches[step * micros : (step + 1) * micros]
        factors = made.lr_factors(at(step, steps=steps))
        for entry, rate in zip(chosen.param_groups, rates, strict=True):
            entry["lr"] = rate * factors.get(entry["role"], 1.0)
        made.train()
        made.before_step(at(step, steps=steps, micros=micros))
        outputs = []
        for micro, batch in enumerate(group):
            outputs.append(running.forward(batch, at(step, steps=steps, micro=micro, micros=micros)))
            running.backward(outputs[-1].loss / micros, last=micro == micros - 1)
        if clip is not None:
            norms.append(float(running.clip(clip)))
        running.step()
        made.after_step(outputs, group, at(step, steps=steps, micros=micros))
        loss = torch.stack([out.loss.detach() for out in outputs]).mean()
        losses.append(float(ranks.all_reduce_(loss.clone()) / ranks.world))
    sent = TRAFFIC.since(before)
    weights = {name: tensor.clone() for name, tensor in running.weights().items()}
    return {
        "losses": losses,
        "norms": norms,
        "start": start,
        "weights": weights,
        "bank": _bank(made),
        "bytes": sent,
    }


def merged(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One group for each role."""
    by_role: dict[str, dict[str, Any]] = {}
    for group in groups:
        by_role.setdefault(group["role"], {**group, "params": []})["params"] += group["params"]
    return list(by_role.values())


def _bank(method: Any) -> dict[str, Any] | None:
    bank = getattr(method, "_bank", None) or getattr(method, "_queue", None)
    if bank is None and getattr(method, "_queues", None):
        bank = next(iter(method._queues.values()))
    if bank is None:
        return None
    view = bank.view()
    return {"labels": view.labels.clone(), "ids": view.ids.clone(), "fingerprint": bank.fingerprint()}


def trained_names(method: str, kind: str) -> set[str]:
    made = make_method(method, kind)
    trained = {id(p) for p in trained_parameters(made)}
    return {name for name, p in made.named_parameters() if id(p) in trained}
