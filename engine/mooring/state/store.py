"""The checkpoints of a run: each whole or not there, found again whatever ended the process that wrote them.

A checkpoint ``step-N/`` is written in two phases. First every rank writes its files into ``step-N.partial/`` and
waits until they are on the disk. When all ranks say so, rank 0 adds the manifest (size and sha256 of every file, and a
hash of itself), syncs the folder, renames it to ``step-N/``, syncs its parent and replaces the pointer ``latest``.
A process may die between any two of these: either the rename is on the disk and the manifest vouches for every byte,
or the folder has no name that counts.

Where the run folder is on several file systems, each has the files of the ranks that see it: the first of these keeps
it, with the same manifest as everywhere. A checkpoint is whole when its files are, wherever they lie; before it is
read, each file system gets what its ranks lack.

Order is by step and by a serial number for several checkpoints of one step (``step-N``, ``step-N-1``); no clock is
asked. The pointer is for people and for a warning: what is continued from is the newest folder that its own manifest
vouches for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from mooring.distributed import ALONE, Ranks
from mooring.errors import RunFolderError
from mooring.parsing import parse_json
from mooring.regular_file import read_regular
from mooring.state.durable import damage, is_absent, read_checked, remedy, write_durably
from mooring.state.encoding import (
    EncodedTree,
    TreeView,
    decode_tree,
    document_bytes,
    tensor_bytes,
    view_tree,
)
from mooring.state.file_systems import keepers, send_file
from mooring.state.retention import Retention
from mooring.syncing import make_folder, sync

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
POINTER = "latest"
_FORMAT = 1
_NAME = re.compile(r"step-(\d+)(?:-(\d+))?")
_PARTIAL, _DAMAGED = ".partial", ".damaged"
LATER = ".later"  # what another course of the run saved, set aside
_LOGGER = logging.getLogger("mooring")
_T = TypeVar("_T")
_Problem = tuple[int, str]  # the system's number of an error (0: none), and its words


class DamagedError(RunFolderError):
    """A checkpoint that is not what was written; others are of another version, or cannot be read just now."""


@dataclass(frozen=True, slots=True)
class CheckpointRef:
    """A checkpoint on the disk.

    Attributes:
        folder: ``.../step-N`` or ``.../step-N-SERIAL``.
        step: optimizer steps done.
        reason: why it was written, for people.
        score: validation top-1 and loss where the step was validated.
        serial: counts the checkpoints of one step from 0.
    """

    folder: Path
    step: int
    reason: str = ""
    score: tuple[float, float] | None = None
    serial: int = field(default=0, compare=False)

    @property
    def place(self) -> tuple[int, int]:
        """What checkpoints are ordered by."""
        return self.step, self.serial


@dataclass(frozen=True, slots=True)
class Found:
    """What a search came to.

    Attributes:
        ref: the newest whole checkpoint; None: there is none.
        notes: what was passed over, and why.
        damaged: folders that are not what was written.
    """

    ref: CheckpointRef | None
    notes: list[str]
    damaged: list[Path]

    def require_whole(self) -> None:
        """For a run that is to go on: with nothing saved it begins anew, with nothing whole it must not.

        Raises:
            RunFolderError: there are checkpoints, and none is whole.
        """
        if self.ref is None and self.damaged:
            raise RunFolderError(
                "none of the saved states is whole:\n  "
                + "\n  ".join(self.notes)
                + "\nstart a new run with out=FOLDER"
            )


class CheckpointStore:
    """Writes, finds and deletes the checkpoints of one run.

    Args:
        folder: ``RUN/checkpoints``; made with the first checkpoint.
        ranks: the processes that write together. Calls of ``write``, ``newest``, ``fetch``, ``check`` and
            ``tidy`` are collective.
        keepers: for each rank the one that keeps its file system (``file_systems.keepers``); None: rank 0, for all.
        keep: what stays when a new checkpoint stands.
        stage: called with the name of each stage of a write before it is entered: the place where tests die.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks = ALONE,
        *,
        keepers: tuple[int, ...] | None = None,
        keep: Retention | None = None,
        stage: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.folder = folder
        self.ranks = ranks
        self.keepers = keepers or (0,) * ranks.world
        self.keep = keep or Retention()
        self._stage = stage

    # ---------------------------------------------------------------- writing

    def write(
        self,
        step: int,
        reason: str,
        parts: Mapping[str, EncodedTree],
        *,
        facts: Mapping[str, Any] | None = None,
        score: tuple[float, float] | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> CheckpointRef:
        """Writes one checkpoint; returns when it is on the disk under its name, on every rank.

        What fails after that (the pointer, old ones that stay) is a warning: the checkpoint stands.

        Args:
            step: optimizer steps done.
            reason: for people.
            parts: what this rank has to keep, by name; the names of all ranks differ.
            facts: JSON values that can be read without reading the parts.
            score: validation top-1 and loss of this step, where it was validated.
            before: brings to the disk what the checkpoint counts on; called on every rank before it is committed.

        Raises:
            RunFolderError: it could not be written; on every rank, whichever of them failed. The checkpoints before
                it stay.
        """
        name = self._name(step)
        self._on_keepers(lambda: self._begin(name))
        partial = self.folder / (name + _PARTIAL)
        written: dict[str, Any] = {}
        problem: _Problem | None = None
        try:
            before()
            if not partial.is_dir():
                raise RunFolderError(
                    f"{partial}: expected the folder that rank {self.keepers[self.ranks.rank]} made, got nothing: is "
                    "out still on the same file system?"
                )
            for part, encoded in parts.items():
                for ending, content in (("safetensors", tensor_bytes), ("json", document_bytes)):
                    self._stage(f"write {part}.{ending}")
                    pieces = content(encoded)
                    written[f"{part}.{ending}"] = write_durably(
                        partial / f"{part}.{ending}", [pieces] if isinstance(pieces, bytes) else pieces
                    )
        except (OSError, RunFolderError) as err:
            problem = _problem(err)
        self._stage("wait for the other ranks")
        found = self.ranks.gather((written, problem))
        failed = next((theirs for _, theirs in found if theirs is not None), None)
        if failed is not None:
            if self._is_keeper:
                shutil.rmtree(partial, ignore_errors=True)
            self._give_up(failed)
        ref = CheckpointRef(self.folder / name, step, reason, score, _place(name)[1])
        manifest = {
            "format": _FORMAT,
            "step": step,
            "reason": reason,
            "score": None if score is None else [value.hex() for value in score],
            "world": self.ranks.world,
            "facts": dict(facts or {}),
            "files": {file: described for files, _ in found for file, described in files.items()},
        }
        self._on_keepers(lambda: self._commit(ref, manifest))
        if self._tried(
            self._sync_parent
        ):  # else the name may be lost with the power: what is older must stay
            self._tried(lambda: self._point_at(ref))  # only now: it stands everywhere
            self._delete_old(ref)
        self._stage("done")
        return ref

    @property
    def _is_keeper(self) -> bool:
        return self.keepers[self.ranks.rank] == self.ranks.rank

    @property
    def _is_shared(self) -> bool:
        """Whether all ranks see one folder."""
        return len(set(self.keepers)) == 1

    def _name(self, step: int) -> str:
        """A name that is free on every file system."""

        def serials() -> list[int]:
            self._stage("make the folder")
            make_folder(self.folder)
            places = [_place(entry.name) for entry in self.folder.iterdir()]
            return [serial for of_step, serial in places if of_step == step]

        taken = [serial for found in self._on_keepers(serials) for serial in found or []]
        serial = max(taken, default=-1) + 1
        return f"step-{step}" + (f"-{serial}" if serial else "")

    def _begin(self, name: str) -> None:
        """Makes the empty folder of a new checkpoint."""
        partial = self.folder / (name + _PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that died while writing
        partial.mkdir()

    def _commit(self, ref: CheckpointRef, manifest: dict[str, Any]) -> None:
        partial = ref.folder.with_name(ref.folder.name + _PARTIAL)
        try:
            self._stage("write the manifest")
            signed = manifest | {"manifest_sha256": _digest(manifest)}
            write_durably(partial / MANIFEST, [json.dumps(signed, indent=1).encode()])
            self._stage("sync the folder")
            sync(partial)
            self._stage("rename")
            partial.rename(ref.folder)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _sync_parent(self) -> None:
        self._stage("sync the parent")
        sync(self.folder)

    def _point_at(self, ref: CheckpointRef) -> None:
        self._stage("replace the pointer")
        fresh = self.folder / f".{POINTER}"
        fresh.unlink(missing_ok=True)
        write_durably(fresh, [f"{ref.folder.name}\n".encode()])
        fresh.replace(self.folder / POINTER)
        sync(self.folder)

    def _delete_old(self, newest: CheckpointRef) -> None:
        def may_delete() -> None:
            self._stage("delete old checkpoints")
            refs = self.refs()
            kept = self._kept(refs, newest)
            if len(kept) == len(refs) or any(self._damage(refs[i].folder) is None for i in sorted(kept)):
                return
            # what is older may be the last good one
            raise RunFolderError("nothing of what would stay can be read back: older checkpoints are kept")

        if self._tried(may_delete):
            self._tried(lambda: self._delete(newest))

    def _kept(self, refs: list[CheckpointRef], newest: CheckpointRef) -> set[int]:
        """What stays, the one just written in any case: it may be of an earlier step than others."""
        return self.keep.kept(refs) | {i for i, ref in enumerate(refs) if ref.place == newest.place}

    def _delete(self, newest: CheckpointRef) -> None:
        refs = self.refs()
        kept = self._kept(refs, newest)
        for i, ref in enumerate(refs):
            if i not in kept:
                # under a name that does not count, and that is tidied up where this process dies
                leaving = ref.folder.with_name(ref.folder.name + _PARTIAL)
                ref.folder.rename(leaving)
                self._stage("remove")
                shutil.rmtree(leaving, ignore_errors=True)

    def _on_keepers(
        self, work: Callable[[], _T], failing: Callable[[_Problem], NoReturn] | None = None
    ) -> list[_T | None]:
        """Every keeper does the work; all ranks have what it came to, by rank, or raise the first one's error."""
        results, failed = self._gathered(work)
        if failed is not None:
            (failing or self._give_up)(failed)
        return results

    def _tried(self, work: Callable[[], object]) -> bool:
        """Whether every keeper could do the work; what it came to otherwise is a warning."""
        _, failed = self._gathered(work)
        if failed is not None and self.ranks.is_first:
            _LOGGER.warning("the checkpoint is saved, but: %s", failed[1])
        return failed is None

    def _gathered(self, work: Callable[[], _T]) -> tuple[list[_T | None], _Problem | None]:
        result: _T | None = None
        problem: _Problem | None = None
        if self._is_keeper:
            try:
                result = work()
            except (OSError, RunFolderError) as err:
                problem = _problem(err)
        told = self.ranks.gather((result, problem))
        failed = next((theirs for _, theirs in told if theirs is not None), None)
        return [theirs for theirs, _ in told], failed

    def _give_up(self, problem: _Problem) -> NoReturn:
        number, text = problem
        raise RunFolderError(
            f"cannot save a checkpoint to {self.folder} ({text}): the checkpoints before it are unchanged; "
            f"{remedy(number)} and continue the run"
        ) from (OSError(number, text) if number else None)

    def _cannot_read(self, problem: _Problem) -> NoReturn:
        """Nothing says that what cannot be read just now is damaged: nothing is set aside for it."""
        number, text = problem
        if not number:
            raise RunFolderError(text)
        raise RunFolderError(
            f"cannot read the checkpoints in {self.folder} ({text}): nothing was changed; {remedy(number)} and try "
            "again, or move what cannot be read out of there to continue from the checkpoint before it"
        ) from OSError(number, text)

    # ---------------------------------------------------------------- finding

    def refs(self) -> list[CheckpointRef]:
        """The checkpoints that were committed, newest first, by their manifests alone; files are not read."""
        found = []
        for folder in self._folders():
            try:
                found.append(_ref(folder, _manifest(folder)))
            except RunFolderError:
                continue
        return sorted(found, key=lambda ref: ref.place, reverse=True)

    def newest(self) -> Found:
        """The newest checkpoint all of whose files are what was written; reads every byte of it, where it lies.

        Raises:
            RunFolderError: a newer one cannot be read just now, or is of another version: it may be whole.
        """
        notes: list[str] = []
        damaged: list[Path] = []
        names = {
            name
            for found in self._on_keepers(
                lambda: [folder.name for folder in self._folders()], self._cannot_read
            )
            for name in found or []
        }
        for name in sorted(names, key=_place, reverse=True):
            folder = self.folder / name
            told = self._on_keepers(partial(self._look, folder), self._cannot_read)
            looked = [found for found in told if found is not None]
            problem = _not_whole(looked)
            if problem is not None:
                notes.append(f"{name} cannot be used: {problem}")
                damaged.append(folder)
                continue
            ref = _ref(folder, next(found.manifest for found in looked if found.manifest is not None))
            if notes:
                notes.append(f"continuing from {name}, the newest checkpoint that is whole")
            return Found(ref, notes, damaged)
        return Found(None, notes, damaged)

    def _look(self, folder: Path) -> _Look:
        """What this file system has of a checkpoint."""
        if not self._is_shared and not folder.is_dir():
            return _Look(None, frozenset(), None)
        try:
            manifest = _manifest(folder)
        except DamagedError as err:
            return _Look(None, frozenset(), str(err))
        files = manifest["files"]
        there = frozenset(name for name in files if self._is_shared or (folder / name).is_file())
        problem = next((found for name in there if (found := damage(folder / name, files[name]))), None)
        return _Look(manifest, there, problem)

    def fetch(self, ref: CheckpointRef, parts: Sequence[str] | None = None) -> None:
        """Brings what this rank will read, and its file system lacks, from wherever it lies.

        Args:
            ref: of ``newest``.
            parts: those that this rank reads; None: all.

        Raises:
            RunFolderError: it cannot be brought.
        """
        if self._is_shared:
            return
        mine = ref.folder / MANIFEST
        raw = next(text for text in self.ranks.gather(read_regular(mine) if mine.is_file() else None) if text)
        if self._is_keeper and not mine.is_file():
            ref.folder.mkdir(parents=True, exist_ok=True)
            write_durably(mine, [raw])
        self.ranks.barrier()
        files = _manifest(ref.folder)["files"]
        wanted = [name for name in files if parts is None or name.rpartition(".")[0] in parts]
        there = [name for name in files if (ref.folder / name).is_file()]
        told = self.ranks.gather((wanted, there))
        for name in files:
            lacking = {
                self.keepers[rank]
                for rank, (want, have) in enumerate(told)
                if name in want and name not in have
            }
            if lacking:
                source = next(rank for rank, (_, have) in enumerate(told) if name in have)
                here = self.ranks.rank in lacking
                send_file(ref.folder / name, files[name]["size"], self.ranks, source=source, here=here)

    def facts(self, ref: CheckpointRef) -> dict[str, Any]:
        """What ``write`` was given as ``facts``, and ``world``.

        Raises:
            RunFolderError: the manifest is not what was written.
        """
        manifest = _manifest(ref.folder)
        return {**manifest["facts"], "world": manifest["world"]}

    def read(self, ref: CheckpointRef, part: str) -> Any:
        """One part of a checkpoint; tensors come back contiguous and on the CPU.

        Raises:
            RunFolderError: there is no such part, or it is not what was written.
        """
        document, tensors = (
            read_checked(file, described) for file, described in self._files(ref, part).items()
        )
        try:
            return decode_tree(document, tensors)
        except ValueError as err:
            raise RunFolderError(f"{ref.folder} holds a state this version cannot read ({err})") from err

    def view(self, ref: CheckpointRef, part: str) -> TreeView:
        """One part, of which only what is looked at is read; its tensors are not compared with the manifest.

        Raises:
            RunFolderError: there is no such part, or it is not of this form.
        """
        (document, described), (tensors, _) = self._files(ref, part).items()
        try:
            return view_tree(read_checked(document, described), tensors)
        except ValueError as err:
            raise RunFolderError(f"{ref.folder} holds a state this version cannot read ({err})") from err

    def check(self, ref: CheckpointRef) -> None:
        """Reads every byte of a checkpoint, on every file system what it has of it; every rank calls it.

        Raises:
            RunFolderError: it is not what was written; on every rank.
        """
        problems = self._on_keepers(lambda: self._damage(ref.folder))
        problem = next((found for found in problems if found is not None), None)
        if problem is not None:
            raise RunFolderError(f"{problem}: use another checkpoint")

    def _files(self, ref: CheckpointRef, part: str) -> dict[Path, dict[str, Any]]:
        """The document and the tensors of a part, as the manifest describes them."""
        files = _manifest(ref.folder)["files"]
        names = [f"{part}.json", f"{part}.safetensors"]
        if not set(names) <= set(files):
            raise RunFolderError(f"{ref.folder} has no {part}: it was written by another number of processes")
        return {ref.folder / name: files[name] for name in names}

    def tidy(self, damaged: list[Path]) -> None:
        """Before a run goes on: deletes what an unfinished write left, and sets damaged checkpoints aside.

        Args:
            damaged: of ``newest``; they become ``NAME.damaged``, so that their names are free and a person can look.
        """
        self._on_keepers(lambda: self._tidy(damaged))

    def set_later_aside(self, ref: CheckpointRef) -> None:
        """Before a run goes on from ``ref``: what another course of it saved later becomes ``NAME.later``."""
        self._on_keepers(lambda: self._set_later_aside(ref))

    def _set_later_aside(self, ref: CheckpointRef) -> None:
        for folder in self._folders():
            if _place(folder.name) > ref.place:
                _set_aside(folder, LATER)
        sync(self.folder)

    def _tidy(self, damaged: list[Path]) -> None:
        for entry in list(self.folder.iterdir()) if self.folder.is_dir() else []:
            if entry.name.endswith(_PARTIAL) and _NAME.fullmatch(entry.name.removesuffix(_PARTIAL)):
                shutil.rmtree(entry, ignore_errors=True)
        for folder in damaged:
            if not folder.is_dir():  # it is on another file system
                continue
            _set_aside(folder, _DAMAGED)

    def folders(self) -> list[Path]:
        """Those of the checkpoints on this file system, whole or damaged."""
        return self._folders()

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [entry for entry in self.folder.iterdir() if _NAME.fullmatch(entry.name) and entry.is_dir()]

    def _damage(self, folder: Path) -> str | None:
        try:
            files = _manifest(folder)["files"]
        except RunFolderError as err:
            return str(err)
        there = [name for name in files if self._is_shared or (folder / name).is_file()]
        try:
            return next((found for name in there if (found := damage(folder / name, files[name]))), None)
        except OSError as err:
            return _problem(err)[1]


def checkpoints_of(run: Path, ranks: Ranks = ALONE) -> CheckpointStore:
    """The checkpoints of a run folder, for reading; with several ranks, all of them call this."""
    return CheckpointStore(run / FOLDER, ranks, keepers=keepers(run, ranks))


@dataclass(frozen=True, slots=True)
class _Look:
    """What one file system has of a checkpoint: its manifest, the files that are there, what is wrong with them."""

    manifest: dict[str, Any] | None
    there: frozenset[str]
    problem: str | None


def _not_whole(looked: list[_Look]) -> str | None:
    """Why what all file systems have of a checkpoint is not the whole of it."""
    problem = next((look.problem for look in looked if look.problem is not None), None)
    if problem is not None:
        return problem
    manifests = [look.manifest for look in looked if look.manifest is not None]
    if any(manifest != manifests[0] for manifest in manifests):
        return "the file systems of the ranks have different checkpoints of this name"
    missing = sorted(set(manifests[0]["files"]) - frozenset().union(*(look.there for look in looked)))
    if missing:
        return f"{', '.join(missing)}: on the file system of no rank"
    return None


def _set_aside(folder: Path, ending: str) -> None:
    aside = folder.with_name(folder.name + ending)
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def _place(name: str) -> tuple[int, int]:
    """Step and serial number of a checkpoint's folder, finished or partial; (-1, -1) of anything else."""
    found = _NAME.fullmatch(name.removesuffix(_PARTIAL))
    return (-1, -1) if found is None else (int(found[1]), int(found[2] or 0))


def _ref(folder: Path, manifest: Mapping[str, Any]) -> CheckpointRef:
    score = manifest["score"]
    return CheckpointRef(
        folder,
        manifest["step"],
        manifest["reason"],
        None if score is None else _score(score),
        _place(folder.name)[1],
    )


def _manifest(folder: Path) -> dict[str, Any]:
    """The checked manifest of a checkpoint.

    Raises:
        DamagedError: there is none, or it is not what was written.
        RunFolderError: it cannot be read just now, or it is of another version.
    """
    file = folder / MANIFEST
    try:
        manifest = parse_json(read_regular(file))
        signature = manifest.pop("manifest_sha256")
        if signature != _digest(manifest):
            raise ValueError("its own sha256 is another")
        known = manifest["format"] == _FORMAT
    except FileNotFoundError:
        raise DamagedError(f"{folder} has no {MANIFEST}: it was not written to its end") from None
    except OSError as err:
        if is_absent(err):
            raise DamagedError(f"{file} is damaged ({err})") from err
        raise RunFolderError(
            f"{file} cannot be read ({err.strerror}): {remedy(err.errno)} and try again, or move {folder} away to "
            "continue from the checkpoint before it"
        ) from err
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise DamagedError(f"{file} is damaged ({type(err).__name__}: {err})") from err
    if not known:
        raise RunFolderError(
            f"{file} has format {manifest['format']!r}; this version reads {_FORMAT}: use the version that wrote it"
        )
    if not _well_formed(manifest):
        raise DamagedError(f"{file} is no manifest of a checkpoint: use another one")
    return manifest


def _well_formed(manifest: Mapping[str, Any]) -> bool:
    """Whether every entry has its type; a file of the checkpoint is a plain name, never a path."""
    kinds = {"step": int, "reason": str, "world": int, "facts": dict, "files": dict}
    if (
        not all(isinstance(manifest.get(name), kind) for name, kind in kinds.items())
        or "score" not in manifest
    ):
        return False
    score = manifest["score"]
    try:
        if score is not None:
            _score(score)
    except (ValueError, TypeError, OverflowError):
        return False
    return all(
        "/" not in name
        and "\\" not in name
        and name not in (".", "..")
        and isinstance(described, dict)
        and isinstance(described.get("size"), int)
        and isinstance(described.get("sha256"), str)
        for name, described in manifest["files"].items()
    )


def _score(written: Any) -> tuple[float, float]:
    top1, loss = written
    return float.fromhex(top1), float.fromhex(loss)


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _problem(err: Exception) -> _Problem:
    if isinstance(err, OSError):
        return err.errno or 0, f"{err.strerror}: {err.filename}" if err.filename else str(err.strerror or err)
    return 0, str(err)
