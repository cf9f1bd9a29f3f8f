"""``python -m bench.scaling_on_paper``: large ViTs on 8 to 1,024 GPUs, as ``mooring plan`` predicts them.

Nothing here is measured: the record says so, and the picture too. Steps are traced on tensors without content; rates
are the assumptions of ``mooring.capacity.rates.Rates``. ``--draw`` draws the picture from the record alone.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECORD, PICTURE = HERE / "records" / "scaling_predicted.json", HERE / "plots" / "scaling_predicted.png"
# model -> images of a GPU and step, and ZeRO stage
MODELS = {
    "vit_large_patch16_224": (64, 1),
    "vit_huge_patch14_224": (32, 1),
    "vit_giant_patch14_224": (16, 3),
}
WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024)
_COLOURS = ("#0072B2", "#E69F00", "#009E73")  # Okabe and Ito


def predict() -> dict[str, Any]:
    """Weak scaling: a GPU's images stay, their sum grows."""
    from mooring.capacity.prediction import Cluster, Predictor
    from mooring.capacity.rates import Rates
    from mooring.config.load import load_config

    rates = Rates()
    curves = []
    for model, (batch, stage) in MODELS.items():
        predictor = Predictor(load_config(None, ["data=photos", f"model.name={model}"]), 1000, rates=rates)
        alone = predictor.predict(Cluster(1, 1, 80e9), 0, batch=batch).images_per_second
        points = []
        for world in WORLDS:
            way = predictor.predict(Cluster(world // 8, 8, 80e9), stage, batch=batch)  # type: ignore[arg-type]
            points.append(
                {
                    "gpus": world,
                    "images_per_second": way.images_per_second,
                    "efficiency": way.images_per_second / world / alone,
                    "gigabytes": way.memory / 1e9,
                    "fits_80_GB": way.fits(Cluster(1, 8, 80e9)),
                    "sent_gigabytes": way.sent.total / 1e9,
                    "milliseconds": {name: 1e3 * value for name, value in way.seconds.items()},
                }
            )
        curves.append(
            {
                "model": model,
                "parameters": predictor.sizes.parameters,
                "method": "dr_tune",
                "images_per_gpu": batch,
                "zero_stage": stage,
                "one_gpu_images_per_second": alone,
                "points": points,
            }
        )
    return {
        "kind": "predicted, not measured",
        "command": "python -m bench.scaling_on_paper",
        "precision": "bf16 autocast, fp32 weights",
        "rates": asdict(rates),
        "curves": curves,
    }


def draw(record: dict[str, Any]) -> None:
    """Images per second against perfect scaling, and efficiency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    figure, (rate, share) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for curve, colour in zip(record["curves"], _COLOURS, strict=True):
        gpus = [point["gpus"] for point in curve["points"]]
        label = (
            f"{curve['model'].split('_patch')[0].replace('vit_', 'ViT-')}, {curve['parameters'] / 1e6:.0f} M, "
            f"ZeRO {curve['zero_stage']}, {curve['images_per_gpu']} images a GPU"
        )
        rate.plot(gpus, [p["images_per_second"] for p in curve["points"]], "o-", color=colour, label=label)
        rate.plot(
            gpus, [curve["one_gpu_images_per_second"] * n for n in gpus], ":", color=colour, linewidth=1
        )
        share.plot(gpus, [100 * p["efficiency"] for p in curve["points"]], "o-", color=colour)
    for axes in (rate, share):
        axes.set_xscale("log", base=2)
        axes.set_xticks(WORLDS)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel("GPUs, 8 a node")
        axes.grid(alpha=0.3)
    rate.set_yscale("log")
    rate.set_ylabel("images per second (dotted: one GPU's, times n)")
    rate.legend(fontsize=8)
    share.set_ylim(0, 115)
    share.set_ylabel("efficiency against one GPU, %\n(above 100: the optimizer's work is divided)")
    rates = record["rates"]
    figure.suptitle(
        "DR-Tune, weak scaling: predicted on paper, not measured\n"
        f"assumed {rates['matmul'] / 1e12:.0f} TFLOP/s, {rates['memory'] / 1e9:.0f} GB/s of memory, "
        f"{rates['link'] / 1e9:.0f} GB/s a GPU between nodes, {rates['node_link'] / 1e9:.0f} inside",
        fontsize=10,
    )
    figure.savefig(PICTURE, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draw", action="store_true", help="draw from the record; predict nothing")
    if not parser.parse_args().draw:
        RECORD.write_text(json.dumps(predict(), indent=1) + "\n", encoding="utf-8")
    draw(json.loads(RECORD.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
