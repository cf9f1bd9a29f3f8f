"""Every image decoded once, before a run: folders, lists or Parquet in, a manifest and a quarantine out."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa

from mooring.data.columns import Columns
from mooring.data.decoding_cost import check_file_size
from mooring.data.discover import SPLITS, Candidate, Discovered, discover_folder
from mooring.data.embedded import EMBEDDED, extract, image_column
from mooring.data.images import ImageFacts, check_signature, inspect
from mooring.data.lists import LIST_SUFFIXES, discover_list
from mooring.data.manifest import SCHEMA, Manifest, check_labels
from mooring.data.out_folder import writable
from mooring.data.quarantine import ImageProblem, Quarantined, Reason
from mooring.data.validation_split import check_settings, validation_rows
from mooring.errors import DataError
from mooring.regular_file import open_regular

MAX_PIXELS = 100_000_000
_HEAD = 64  # enough to tell a film or an archive from a picture without reading it
_BLOCK = 1024  # files handed to the pool at once; bounds memory for millions of files

Progress = Callable[[int, int], None]
Duplicates = Literal["drop", "across"]


@dataclass(frozen=True, slots=True)
class ScanReport:
    """What a scan found.

    Attributes:
        manifest: the images that can be used.
        out: folder that both were written to; None where none was asked for.
    """

    manifest: Manifest
    out: Path | None

    @property
    def quarantine(self) -> tuple[Quarantined, ...]:
        """The files that cannot be used, with a reason each."""
        return self.manifest.quarantine

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know, one sentence each."""
        return self.manifest.notes

    @property
    def reasons(self) -> dict[str, int]:
        """Quarantined files per reason, most frequent first."""
        return dict(Counter(row.reason.value for row in self.quarantine).most_common())

    def lines(self) -> list[str]:
        """The report as text, one fact a line."""
        counts = ", ".join(f"{count} {name}" for name, count in self.manifest.counts.items())
        lines = [f"{len(self.manifest.classes)} classes: {counts}"]
        if self.quarantine:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons.items())
            lines.append(f"{len(self.quarantine)} files left out: {reasons}")
        return [*lines, *self.notes]


@dataclass(frozen=True, slots=True)
class _Seen:
    """A candidate that decoded, with what the manifest keeps of it."""

    candidate: Candidate
    facts: ImageFacts
    byte_count: int
    sha256: str
    mtime_ns: int


def scan(
    source: Path | str,
    *,
    out: Path | None = None,
    val_fraction: float = 0.15,
    seed: int = 0,
    workers: int = 2,
    max_pixels: int = MAX_PIXELS,
    duplicates: Duplicates = "drop",
    image_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
    for_evaluation: bool = False,
    classes: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> ScanReport:
    """Decodes every image of a source once and writes a manifest.

    The image at fault is left out, never the scan: each goes to the quarantine list with its reason.
    Of images with the same bytes the first in train, val, test order is kept.

    Args:
        source: ``class/image`` or ``train|val|test/class/image`` folders; a CSV, TSV or Parquet list
            (path, label, optionally split; paths relative to the list's folder); or Parquet with image bytes.
        out: manifest folder to write; needed for Parquet with image bytes, which are extracted there.
        val_fraction: share of each train class used for validation where the source has no val split.
        seed: of that choice.
        workers: decoding threads (Pillow decodes outside the interpreter lock).
        max_pixels: images with more are left out, undecoded.
        duplicates: ``drop`` every exact copy, or only those ``across`` splits.
        image_column, label_column, split_column: of a table, where the usual names do not find them.
        for_evaluation: nothing is trained on it: no training images or second class are needed, no
            validation split is made, and images without a split form the split ``test``.
        classes: the class list, in order, of the run that is evaluated; only with ``for_evaluation``.
            None: the labels found. Classes without an image are fine, labels beyond the list are not.
        progress: called with (done, total) files.

    Raises:
        DataError: there is nothing to train on, or the splits do not fit together.
        RunFolderError: ``out`` cannot be written, lies inside the source or holds another source's scan.
    """
    check_arguments(val_fraction, seed, for_evaluation, classes)
    source = source_path(source)
    if source.is_dir() and Manifest.is_manifest(source):
        raise DataError(
            f"expected images or a list; got {source}, which is already a scan: train with data={source}"
        )
    columns = Columns(image_column, label_column, split_column)

    def run(out: Path | None) -> ScanReport:
        found = discover(source, columns, out, needs_train=not for_evaluation)
        seen, quarantine = _inspect_all(found, workers, max_pixels, progress)
        kept, copies = _without_copies(seen, duplicates)
        quarantine = [*found.quarantined, *quarantine, *copies]
        if not kept:
            raise _nothing(source, quarantine)
        if for_evaluation:
            manifest = _assemble_evaluation(source, found, kept, quarantine, classes)
        else:
            manifest = _assemble(source, found, kept, quarantine, val_fraction, seed)
        if out is not None:
            _remove_unused(found, manifest)
            manifest.save(out)
        return ScanReport(manifest, out)

    if out is None:
        return run(None)
    with writable(out, source):
        return run(out)


def check_arguments(
    val_fraction: float, seed: int, for_evaluation: bool, classes: Sequence[str] | None
) -> None:
    """Refuses arguments of ``scan`` that cannot be right for any source.

    Raises:
        DataError: saying which.
    """
    check_settings(val_fraction, seed)
    if classes is not None and not for_evaluation:
        raise DataError("expected a class list for evaluation only; got one for training: leave classes out")


def source_path(source: Path | str) -> Path:
    """The path of a source.

    Raises:
        DataError: the text is empty; as a path it would mean the working directory.
    """
    if not str(source).strip():
        raise DataError("expected a path; got empty text (an unset shell variable?)")
    return Path(source)


def discover(source: Path, columns: Columns, out: Path | None, *, needs_train: bool = True) -> Discovered:
    """The candidates of a source, whatever its kind.

    Args:
        source, columns, out: as ``scan``.
        needs_train: whether split folders without a training split are refused.

    Raises:
        DataError: the source is none of the kinds that can be read.
    """
    if not source.exists():
        raise DataError(
            f"expected a folder of images or a list at {source}; got nothing there: check the path"
        )
    if source.is_dir():
        try:
            return discover_folder(source, needs_train=needs_train)
        except OSError as err:
            raise DataError(f"cannot list {err.filename or source}: {err.strerror}") from None
    if source.suffix.lower() not in LIST_SUFFIXES:
        raise DataError(
            f"expected a folder, or a list ending in {', '.join(LIST_SUFFIXES)}; got the file {source}: "
            "give the folder that holds the class folders"
        )
    if source.suffix.lower() == ".parquet" and image_column(source, columns.image) is not None:
        if out is None:
            raise DataError(
                f"{source} holds image bytes, which are extracted to files: give a manifest folder, out="
            )
        return extract(source, out, columns)
    return discover_list(source, columns)


def _inspect_all(
    found: Discovered, workers: int, max_pixels: int, progress: Progress | None
) -> tuple[list[_Seen], list[Quarantined]]:
    # kept copies go train, val, test first; sorted() is stable, so listing order decides inside a split
    candidates = sorted(found.candidates, key=lambda candidate: SPLITS.index(candidate.split))
    seen: list[_Seen] = []
    quarantine: list[Quarantined] = []

    def one(candidate: Candidate) -> _Seen | Quarantined:
        return _inspect_one(found.root, candidate, max_pixels)

    # Threads, not processes: reading, hashing and decoding all run outside the interpreter lock, and a
    # user's script needs no __main__ guard.
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="mooring-scan") as pool:
        for start in range(0, len(candidates), _BLOCK):
            for done, result in enumerate(pool.map(one, candidates[start : start + _BLOCK]), start + 1):
                if isinstance(result, _Seen):
                    seen.append(result)
                else:
                    quarantine.append(result)
                if progress is not None:
                    progress(done, len(candidates))
    return seen, quarantine


def _inspect_one(root: Path, candidate: Candidate, max_pixels: int) -> _Seen | Quarantined:
    try:
        with open_regular(root / candidate.path) as stream:
            status = os.fstat(stream.fileno())
            mtime_ns = status.st_mtime_ns
            data = stream.read(_HEAD)
            check_signature(data)
            check_file_size(status.st_size, max_pixels)
            data += stream.read()
        facts = inspect(data, max_pixels)
    except ImageProblem as problem:
        return Quarantined(candidate.listed_as, problem.reason, problem.detail)
    except FileNotFoundError:
        return Quarantined(candidate.listed_as, Reason.MISSING, "no such file")
    except OSError as err:
        return Quarantined(candidate.listed_as, Reason.UNREADABLE, err.strerror or str(err))
    return _Seen(candidate, facts, len(data), hashlib.sha256(data).hexdigest(), mtime_ns)


def _without_copies(seen: list[_Seen], duplicates: Duplicates) -> tuple[list[_Seen], list[Quarantined]]:
    first: dict[str, _Seen] = {}
    kept: list[_Seen] = []
    copies: list[Quarantined] = []
    for item in seen:
        original = first.setdefault(item.sha256, item)
        same_split = original.candidate.split == item.candidate.split
        if original is item or (same_split and duplicates == "across"):
            kept.append(item)
            continue
        reason = Reason.DUPLICATE if same_split else Reason.DUPLICATE_ACROSS
        of = original.candidate
        copies.append(
            Quarantined(item.candidate.listed_as, reason, f"same bytes as {of.listed_as} ({of.label})")
        )
    return kept, copies


def _assemble(
    source: Path,
    found: Discovered,
    kept: list[_Seen],
    quarantine: Sequence[Quarantined],
    val_fraction: float,
    seed: int,
) -> Manifest:
    classes, notes = _classes(source, kept, found)
    splits = [item.candidate.split for item in kept]
    made: dict[str, object] | None = None
    if "val" not in splits:
        train = [row for row, split in enumerate(splits) if split == "train"]
        chosen = validation_rows(
            [kept[row].candidate.label for row in train],
            [kept[row].sha256 for row in train],
            val_fraction,
            seed,
        )
        for row in chosen:
            splits[train[row]] = "val"
        made = {"from": "train", "fraction": val_fraction, "seed": seed, "images": len(chosen)}
        notes.append(
            f"no validation split was given: {len(chosen)} of {len(train)} train images were set aside "
            f"(stratified, fraction {val_fraction}, seed {seed})"
        )
        with_val = {item.candidate.label for item, split in zip(kept, splits, strict=True) if split == "val"}
        alone = set(classes) - with_val
        if alone:
            notes.append(f"classes with one image have no validation image: {_names(alone)}")
    return Manifest(
        found.root,
        classes,
        _table(kept, splits, classes),
        _described(source, found),
        tuple(notes),
        made,
        tuple(quarantine),
    )


def _assemble_evaluation(
    source: Path,
    found: Discovered,
    kept: list[_Seen],
    quarantine: Sequence[Quarantined],
    classes: Sequence[str] | None,
) -> Manifest:
    labels = {item.candidate.label for item in kept}
    known = tuple(sorted(labels)) if classes is None else tuple(classes)
    check_labels(labels, known, source)
    splits = [item.candidate.split if found.splits_given else "test" for item in kept]
    notes = list(found.notes)
    if set(known) - labels:
        notes.append(f"classes without an image here: {_names(set(known) - labels)}")
    table = _table(kept, splits, known)
    described = _described(source, found)
    return Manifest(found.root, known, table, described, tuple(notes), None, tuple(quarantine))


def _nothing(source: Path, quarantine: Sequence[Quarantined]) -> DataError:
    reasons = Counter(row.reason.value for row in quarantine)
    seen = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    return DataError(f"expected images in {source}; got none that can be used ({seen or 'no files at all'})")


def _described(source: Path, found: Discovered) -> dict[str, str]:
    return {"kind": found.kind, "path": str(source.resolve())}


def _classes(source: Path, kept: list[_Seen], found: Discovered) -> tuple[tuple[str, ...], list[str]]:
    notes = list(found.notes)
    by_split: dict[str, set[str]] = {name: set() for name in SPLITS}
    for item in kept:
        by_split[item.candidate.split].add(item.candidate.label)
    train = by_split["train"]
    if not train:
        given = _names(name for name in SPLITS if by_split[name])
        raise DataError(f"expected training images in {source}; got images for {given} only")
    for name in ("val", "test"):
        extra = by_split[name] - train
        if extra:
            raise DataError(
                f"classes must be the same in all splits of {source}; {_names(extra)} in {name} "
                "without a usable training image: add some, or remove the class"
            )
        if by_split[name] and train - by_split[name]:
            notes.append(f"{name} has no image of {_names(train - by_split[name])}")
    listed = {candidate.label for candidate in found.candidates}
    if listed - train:
        notes.append(f"classes without a usable image were left out: {_names(listed - train)}")
    if len(train) == 1:
        raise DataError(
            f"expected at least two classes in {source}; got one, {_names(train)}: nothing to tell apart"
        )
    return tuple(sorted(train)), notes


def _table(kept: list[_Seen], splits: list[str], classes: tuple[str, ...]) -> pa.Table:
    """Rows in train, val, test order; inside a split as listed."""
    order = sorted(range(len(kept)), key=lambda row: SPLITS.index(splits[row]))
    items = [kept[row] for row in order]
    index = {name: place for place, name in enumerate(classes)}
    columns = {
        "id": list(range(len(items))),
        "path": [item.candidate.path for item in items],
        "label": [item.candidate.label for item in items],
        "class": [index[item.candidate.label] for item in items],
        "split": [splits[row] for row in order],
        "width": [item.facts.width for item in items],
        "height": [item.facts.height for item in items],
        "bytes": [item.byte_count for item in items],
        "sha256": [item.sha256 for item in items],
        "format": [item.facts.format for item in items],
        "mode": [item.facts.mode for item in items],
        "native": [item.facts.native for item in items],
        "mtime_ns": [item.mtime_ns for item in items],
    }
    return pa.table(columns, schema=SCHEMA)


def _remove_unused(found: Discovered, manifest: Manifest) -> None:
    """Deletes extracted bytes that turned out to be no usable image."""
    if found.kind != EMBEDDED:
        return
    used = set(manifest.table["path"].to_pylist())
    for candidate in found.candidates:
        if candidate.path not in used:
            (found.root / candidate.path).unlink(missing_ok=True)


def _names(names: Iterable[str], limit: int = 8) -> str:
    ordered = sorted(names)
    shown = ", ".join(repr(name) for name in ordered[:limit])
    return shown if len(ordered) <= limit else f"{shown} and {len(ordered) - limit} more"
