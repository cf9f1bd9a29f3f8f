"""The best epoch's weights on the disk: those of the run as it is, and those that a saved state would go on with.

``best/`` is written before the checkpoint that names its epoch, so a process that dies between the two leaves weights
that no saved state knows of. What ``best/`` held before therefore stays as ``best-E/``, E its epoch counted from 1, as
long as a checkpoint names that epoch; a run that goes on from such a checkpoint puts it back.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from mooring.errors import RunFolderError
from mooring.parsing import parse_json
from mooring.regular_file import read_regular
from mooring.report.records import write_json_atomic
from mooring.state.store import LATER, CheckpointRef, CheckpointStore
from mooring.state.tree import digest, load_tree, previous_tree, save_tree
from mooring.syncing import sync

FOLDER = "best"
FACT = "best_epoch"  # of a checkpoint: the epoch, from 0, whose weights it goes on with
_EARLIER = re.compile(rf"{FOLDER}-(\d+)")
_LEAVING = ".leaving"
_OF_MODEL = "epoch.json"


def keep(run: Path, best: Mapping[str, Any], before: int | None) -> None:
    """Writes ``best/``; what it held becomes ``best-E/``.

    Args:
        run: the run folder.
        best: the tree, with its ``epoch``.
        before: the epoch whose weights ``best/`` holds; None: it is not there.

    Raises:
        RunFolderError: it cannot be written; what was there stays.
    """
    aside = None if before is None else _earlier(run, before)
    save_tree(run / FOLDER, dict(best), replace=True, aside=aside)


def identity(run: Path, epoch: int) -> dict[str, Any]:
    """What ``best/`` holds, to tell later what was computed with it: its epoch, from 0, and a sha256.

    Raises:
        RunFolderError: it is not there.
    """
    best = run / FOLDER
    return {"epoch": epoch, "sha256": digest(best if best.exists() else previous_tree(best))}


# ---------------------------------------------------------------- going on


def require(run: Path, epoch: int | None, store: CheckpointStore, ref: CheckpointRef) -> None:
    """Looks, before a run goes on, whether the weights are there that the saved state calls the best.

    Args:
        run: the run folder.
        epoch: of those weights, from 0; None: no epoch was validated yet.
        store, ref: the state to go on from.

    Raises:
        RunFolderError: they are not, or damaged: the run would train to its end and could not be tested. Says which
            older state could be continued.
    """
    if epoch is None or _find(run, epoch) is not None:
        return
    seen = [problem for folder in _candidates(run, epoch) if (problem := _problem(folder, epoch)) is not None]
    problems = "\n  ".join(seen or [f"there is no {run / FOLDER}"])
    text = f"the weights of epoch {epoch + 1}, the best one when {ref.folder} was saved, are not there:\n  {problems}\n"
    for older in store.refs():
        if older.place < ref.place:
            known, best = best_epoch_of(store, older)
            if known and (best is None or _find(run, best) is not None):
                raise RunFolderError(
                    f"{text}put {run / FOLDER} back from a copy; or move {ref.folder} and what is newer than "
                    f"{older.folder.name} out of {store.folder}, and continue from there (step {older.step}): what "
                    "followed is trained again"
                )
    raise RunFolderError(
        f"{text}put {run / FOLDER} back from a copy, or start a new run with out=FOLDER: no older state is kept that "
        "goes on with other weights"
    )


def settle(run: Path, epoch: int | None, named: set[int] | None, later: Set[int] = frozenset()) -> None:
    """Makes ``best/`` that of the state that the run goes on from; ``require`` has found it.

    Args:
        run: the run folder.
        epoch: of that state.
        named: as ``best_epochs`` found them; None: everything stays.
        later: epochs that checkpoints named which were set aside: so are their weights.
    """
    best = run / FOLDER
    found = None if epoch is None else _find(run, epoch)
    if found != best and best.is_dir():
        other = _epoch_in(best)
        _move(best, best.with_name(f"{FOLDER}.damaged") if other is None else _earlier(run, other))
    if found is not None and found != best:
        found.rename(best)
    before = _epoch_in(previous_tree(best)) if previous_tree(best).is_dir() else None
    if before is not None:
        _move(previous_tree(best), _earlier(run, before))
    sync(run)
    for folder, of in _earlier_ones(run):
        if of in later:
            _move(folder, folder.with_name(folder.name + LATER))
    prune(run, named)
    for leftover in (
        previous_tree(best),
        *run.glob(f"{FOLDER}*{_LEAVING}"),
        best.with_name(f"{FOLDER}.partial"),
    ):
        shutil.rmtree(leftover, ignore_errors=True)


def prune(run: Path, named: set[int] | None) -> None:
    """Deletes ``best-E/`` of epochs that no checkpoint names.

    Args:
        run: the run folder.
        named: as ``best_epochs`` found them; None: nothing is deleted.
    """
    for folder, epoch in _earlier_ones(run):
        if named is not None and epoch not in named:
            leaving = folder.with_name(folder.name + _LEAVING)  # a process may die while it deletes
            _move(folder, leaving)
            shutil.rmtree(leaving, ignore_errors=True)


def best_epochs(store: CheckpointStore) -> set[int] | None:
    """The epochs, from 0, whose weights some checkpoint goes on with; None where one does not say."""
    found: set[int] = set()
    for folder in store.folders():
        try:
            known, epoch = best_epoch_of(store, CheckpointRef(folder, 0))
        except RunFolderError:
            return None
        if not known:
            return None
        found |= set() if epoch is None else {epoch}
    return found


def best_epoch_of(store: CheckpointStore, ref: CheckpointRef) -> tuple[bool, int | None]:
    """Whether a checkpoint says which epoch's weights it goes on with, and which: from 0, None for none yet.

    Raises:
        RunFolderError: its manifest cannot be read.
    """
    facts = store.facts(ref)
    epoch = facts.get(FACT)
    return FACT in facts and (epoch is None or isinstance(epoch, int)), epoch


# ---------------------------------------------------------------- the exported model


def model_is_of(model: Path, best: Mapping[str, Any]) -> bool:
    """Whether the exported model was written to its end, with the weights of that ``identity``."""
    try:
        return bool(parse_json(read_regular(model / _OF_MODEL)) == best)
    except (OSError, ValueError):
        return False


def forget_model(model: Path) -> None:
    """Before a model is written: until ``sign_model`` it is nobody's."""
    (model / _OF_MODEL).unlink(missing_ok=True)
    if model.is_dir():
        sync(model)


def sign_model(model: Path, best: Mapping[str, Any]) -> None:
    """After a model was written: keeps whose weights it has."""
    write_json_atomic(model / _OF_MODEL, best)


# ---------------------------------------------------------------- folders


def _earlier(run: Path, epoch: int) -> Path:
    return run / f"{FOLDER}-{epoch + 1}"


def _earlier_ones(run: Path) -> Iterator[tuple[Path, int]]:
    for entry in list(run.iterdir()):
        found = _EARLIER.fullmatch(entry.name)
        if found is not None and entry.is_dir():
            yield entry, int(found[1]) - 1


def _candidates(run: Path, epoch: int) -> list[Path]:
    best = run / FOLDER
    return [folder for folder in (best, previous_tree(best), _earlier(run, epoch)) if folder.exists()]


def _find(run: Path, epoch: int) -> Path | None:
    return next((folder for folder in _candidates(run, epoch) if _problem(folder, epoch) is None), None)


def _problem(folder: Path, epoch: int) -> str | None:
    try:
        held = load_tree(folder)["epoch"]
    except (RunFolderError, LookupError, TypeError) as err:
        return str(err)
    return None if held == epoch else f"{folder} holds epoch {held + 1}"


def _epoch_in(folder: Path) -> int | None:
    try:
        return int(load_tree(folder)["epoch"])
    except (RunFolderError, LookupError, TypeError, ValueError):
        return None


def _move(folder: Path, to: Path) -> None:
    shutil.rmtree(to, ignore_errors=True)
    folder.rename(to)
