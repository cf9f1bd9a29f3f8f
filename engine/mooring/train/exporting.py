"""The model of a run, from the run itself or from what it saved: then without its processes, data or first weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mooring.config.load import load_config
from mooring.config.method_settings import method_title
from mooring.config.schema import RunConfig
from mooring.data.manifest import Manifest
from mooring.errors import RunFolderError
from mooring.methods.base import Method, Needs, Resources
from mooring.methods.registry import build_method, needs_of
from mooring.models.batchnorm_sync import merged_buffers
from mooring.models.encoder import Encoder, build_encoder
from mooring.models.export import export
from mooring.models.front_door import save_front_door
from mooring.models.head import build_head
from mooring.report.run_folder import existing_run, is_run
from mooring.state.store import FOLDER, CheckpointRef, CheckpointStore, checkpoints_of
from mooring.state.tree import load_tree, previous_tree
from mooring.train import best_weights
from mooring.train.assembly import image_sizes
from mooring.train.checkpoint import SHARED, own_part


def write_model(
    method: Method,
    encoder: Encoder,
    head: nn.Linear,
    config: RunConfig,
    classes: tuple[str, ...],
    eval_size: int,
    folder: Path,
) -> None:
    """Writes what is left of a method for inference, as a folder that timm opens and ``load_run`` reads.

    Args:
        method: the one that was trained.
        encoder, head: its ``exported``, with whole weights.
        config: of its run.
        classes: C names, in logit order.
        eval_size: height = width in pixels of the images it is evaluated on.
        folder: created where missing; see ``mooring.models.export.export``.

    Raises:
        WeightsError, RunFolderError: as ``export``.
    """
    extra: dict[str, Any] = {"method": method_title(config.method)}
    if (beside := method.exported_front_door()) is not None:
        extra |= save_front_door(folder, *beside)
    export(encoder, head, folder, classes, data_config={"input_size": (3, eval_size, eval_size)}, extra=extra)


def export_saved(source: Path, out: Path) -> str:
    """Writes the model of a run's best epoch, or of one of its checkpoints, whatever divided it among ranks.

    Running statistics of ranks that each had their own are averaged, as they are for an evaluation; with a weight
    average, it is what is exported.

    Args:
        source: a run folder: its best epoch, or before the first validation its newest whole checkpoint; or the
            folder of a checkpoint, ``RUN/checkpoints/step-N``.
        out: a new or empty folder.

    Returns:
        Which state it is, for people.

    Raises:
        RunFolderError: there is no state, it is damaged, or ``out`` holds something.
        WeightsError: the architecture cannot be exported.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(f"--out: expected a new or empty folder, got {out}: choose another one")
    run, ref = _found(source)
    config = load_config(run / "config.toml")
    manifest = Manifest.load(run / "manifest")
    best = None
    if ref is None:
        saved = load_tree(run / best_weights.FOLDER)
        says = f"the best epoch ({saved['epoch'] + 1}) of {run}"
        weights = buffers = saved["method"]
        best = best_weights.identity(run, saved["epoch"])
    else:
        says = f"step {ref.step} ({ref.reason}) of {run}"
        weights, buffers = _weights_of(run, ref)
    method, eval_size = _built(config, manifest.classes, weights)
    _load(method, weights, buffers)
    encoder, head = method.eval().exported()
    assert isinstance(encoder, Encoder)  # as it was built
    write_model(method, encoder, head, config, manifest.classes, eval_size, out)
    if best is not None:
        best_weights.sign_model(out, best)
    return says


def _found(source: Path) -> tuple[Path, CheckpointRef | None]:
    """Run folder and checkpoint; None: its best epoch.

    Raises:
        RunFolderError: it is neither, or nothing whole was saved.
    """
    if source.parent.name == FOLDER and is_run(source.parent.parent):
        store = CheckpointStore(source.parent)
        ref = next((ref for ref in store.refs() if ref.folder.name == source.name), None)
        if ref is None:
            raise RunFolderError(f"{source}: expected a checkpoint that was written to its end, got none")
        store.check(ref)
        return source.parent.parent, ref
    existing_run(source)
    best = source / best_weights.FOLDER
    if best.is_dir() or previous_tree(best).is_dir():
        return source, None
    found = checkpoints_of(source).newest()
    found.require_whole()
    if found.ref is None:
        raise RunFolderError(
            f"{source}: expected a saved state, got none: the run was stopped before its first one"
        )
    return source, found.ref


def _weights_of(run: Path, ref: CheckpointRef) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Weights and buffers of a checkpoint, averaged over steps where the run does that, and over ranks."""
    store = checkpoints_of(run)
    shared = store.view(ref, SHARED)
    parts = [store.view(ref, own_part(rank)) for rank in range(store.facts(ref)["world"])]
    if shared["ema"] is None:
        return shared["method"], merged_buffers([part["buffers"] for part in parts])
    return shared["ema"]["parameters"], merged_buffers([part["ema_buffers"] for part in parts])


def _built(config: RunConfig, classes: tuple[str, ...], weights: Mapping[str, Tensor]) -> tuple[Method, int]:
    """The run's method with weights of no meaning, and the size of the images it is evaluated on."""
    needs = needs_of(config.method)
    encoder = build_encoder(
        config.model.name,
        weights="none",
        drop_rate=config.model.drop_rate,
        drop_path_rate=config.model.drop_path_rate,
        image_size=config.train.image_size,
    )
    head = build_head(encoder.feature_dim, len(classes))
    size = config.train.image_size or int(encoder.data_config["input_size"][-1])
    resources = _stand_ins(needs, classes, encoder.feature_dim, size, weights)
    return build_method(config.method, encoder, head, resources=resources), image_sizes(config, encoder)[1]


def _stand_ins(
    needs: Needs, classes: tuple[str, ...], width: int, image_size: int, weights: Mapping[str, Tensor]
) -> Resources:
    """Resources of the shapes that the saved weights tell; their content is loaded, or of no use any more."""

    def rows(ending: str) -> int:
        return next((int(weights[name].shape[0]) for name in weights if name.endswith(ending)), 1)

    text, source = None, None
    if needs.text_features:
        text = torch.ones(len(classes), rows("projection.project.weight"))
    if needs.source_head:
        source = nn.Linear(width, rows("source_head.weight"))
    return Resources(classes=classes, text_features=text, source_head=source, image_size=image_size)


@torch.no_grad()
def _load(method: Method, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """
    Raises:
        RunFolderError: they are of another model.
    """
    own: list[tuple[Tensor, str, Mapping[str, Tensor]]] = []
    own += [(p, name, weights) for name, p in method.named_parameters()]
    own += [(b, name, buffers) for name, b in method.named_buffers() if name in buffers]
    for tensor, name, given in own:
        saved = given.get(name)
        if saved is None or saved.shape != tensor.shape:
            got = "nothing" if saved is None else list(saved.shape)
            raise RunFolderError(
                f"the saved state is of another model than config.toml describes: {name} must be "
                f"{list(tensor.shape)}, got {got}"
            )
        tensor.copy_(saved)
