"""A plan as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from mooring.capacity.partition import STAGES
from mooring.capacity.prediction import Advice, Cluster, Prediction, Predictor
from mooring.config.method_settings import method_title

GIGABYTE = 1e9


def plan_tables(predictor: Predictor, cluster: Cluster, advice: Advice) -> list[Table | str]:
    """Memory, traffic and time of every stage, and the recommendation. All of it predicted."""
    config, sizes = predictor.config, predictor.sizes
    work, title = predictor.workload(), method_title(config.method)
    again = (
        f"{predictor.workload(checkpointing=True).activations.each / 1e6:.1f} with checkpointing"
        if predictor.can_checkpoint
        else "no activation checkpointing for this architecture"
    )
    lines: list[Table | str] = [
        f"{escape(title)} on {escape(config.model.name)}: {sizes.parameters / 1e6:.1f} M parameters, "
        f"{work.flops.at(1) / 1e9:.1f} GFLOP an image, {work.activations.each / 1e6:.1f} MB of activations an "
        f"image ({again})"
    ]
    ways = []
    for stage in STAGES if cluster.world > 1 else STAGES[:1]:
        ways += [
            predictor.predict(cluster, stage, checkpointing=again)
            for again in ((False, True) if predictor.can_checkpoint else (False,))
        ]
    lines += [_memory(ways, cluster, predictor.precision), _step(ways)]
    if advice.chosen is not None:
        way = advice.chosen
        again = " backend.activation_checkpointing=true" if way.checkpointing else ""
        batch = way.batch * way.world
        lines.append(
            f"recommended: [bold]backend.zero_stage={way.stage} train.batch_size={batch} "
            f"train.accumulate={way.accumulate}{again}[/] on {way.world} GPUs: {way.memory / GIGABYTE:.1f} GB, "
            f"{1e3 * way.step_seconds:.0f} ms a step, {way.images_per_second:.0f} images/s"
        )
    lines += [f"- {escape(reason)}" for reason in advice.reasons]
    rates = predictor.rates
    lines.append(
        f"predicted, not measured, from {rates.matmul / 1e12:.3g} TFLOP/s, {rates.memory / 1e9:.3g} GB/s of memory, "
        f"{rates.link / 1e9:.3g} GB/s between nodes and {rates.node_link / 1e9:.3g} inside one"
    )
    return lines


def _memory(ways: Sequence[Prediction], cluster: Cluster, precision: str) -> Table:
    table = Table(
        "ZeRO", "ckpt", "param.", "grad.", "optim.", "buffers", "activ.", "frozen", "banks", "all", "fits",
        title=f"predicted for each of {cluster.world} GPUs, {precision}, memory in GB",
        caption="ckpt: activation checkpointing; activ.: on top of the others at the worst moment",
    )  # fmt: skip
    for way in ways:
        model, fits = way.model, way.fits(cluster)
        states = model.parameters, model.gradients, model.optimizer, model.buffers
        row = (*states, way.activations, way.constants, way.banks, way.memory)
        table.add_row(
            *_way(way), *map(_gigabytes, row), "yes" if fits else "no", style=None if fits else "red"
        )
    return table


def _step(ways: Sequence[Prediction]) -> Table:
    table = Table(
        "ZeRO", "ckpt", "gradients", "parameters", "banks", "sent", "ms", "images/s", "waits",
        title="a step; GB that each GPU sends",
        caption="waits: share of the step on the network",
    )  # fmt: skip
    for way in ways:
        sent, waits = way.sent, way.seconds["communication"] / way.step_seconds
        table.add_row(
            *_way(way),
            *map(_gigabytes, (sent.gradients, sent.parameters, sent.banks, sent.total)),
            f"{1e3 * way.step_seconds:.0f}",
            f"{way.images_per_second:.0f}",
            f"{waits:.0%}",
        )
    return table


def _way(way: Prediction) -> tuple[str, str]:
    return f"{way.stage}", "yes" if way.checkpointing else ""


def _gigabytes(count: float) -> str:
    gigabytes = count / GIGABYTE
    return f"{gigabytes:.2f}" if gigabytes >= 0.005 or count == 0 else f"{gigabytes:.1e}"
