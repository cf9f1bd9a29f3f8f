"""Saves a tree of tensors and plain values to a folder, whole or not at all, and reads it bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mooring.errors import RunFolderError
from mooring.parsing import parse_json
from mooring.regular_file import read_regular
from mooring.state.durable import read_checked, remedy, write_durably
from mooring.state.encoding import decode_tree, document_bytes, encode_tree, tensor_bytes
from mooring.syncing import make_folder, sync

TENSORS = "tensors.safetensors"
TREE = "tree.json"
MANIFEST = "manifest.json"
_FORMAT = 1
_PREVIOUS = ".previous"


def save_tree(folder: str | Path, tree: Any, *, replace: bool = False, aside: Path | None = None) -> Path:
    """Writes ``tree`` to a new folder.

    The folder appears under its name only when complete: files are written to ``<folder>.partial`` and
    synced, a manifest with their sizes and SHA-256 is added, the folder is renamed, its parent synced.

    Args:
        folder: must not exist unless ``replace``.
        tree: as ``mooring.state.encoding.encode_tree`` takes it.
        replace: take the place of an existing folder. The old one is kept as ``<folder>.previous`` until
            the new one stands, and ``load_tree`` finds it there if the process dies in between.
        aside: where the old one then goes, beside ``folder``; None: it is deleted.

    Returns:
        ``folder``.

    Raises:
        TypeError: a leaf of another type; the message names its place.
        RunFolderError: the folder exists, or cannot be written.
    """
    folder = Path(folder)
    encoded = encode_tree(tree)
    if folder.exists() and not replace:
        raise RunFolderError(f"{folder} exists already: choose another name, or remove it")
    partial = folder.with_name(folder.name + ".partial")
    try:
        make_folder(folder.parent)
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that died while writing
        partial.mkdir()
        with _removed_on_failure(partial):
            files = {
                TENSORS: write_durably(partial / TENSORS, tensor_bytes(encoded)),
                TREE: write_durably(partial / TREE, [document_bytes(encoded)]),
            }
            manifest = json.dumps({"format": _FORMAT, "files": files}, indent=1)
            write_durably(partial / MANIFEST, [manifest.encode()])
            sync(partial)
            _move_into_place(partial, folder, aside)
    except OSError as err:
        raise RunFolderError(
            f"cannot save to {folder} ({err}): nothing was changed; {remedy(err.errno)}"
        ) from err
    return folder


def previous_tree(folder: Path) -> Path:
    """Where the tree that ``save_tree(folder, ..., replace=True)`` is replacing stands meanwhile."""
    return folder.with_name(folder.name + _PREVIOUS)


def load_tree(folder: str | Path) -> Any:
    """Reads what ``save_tree`` wrote; tensors come back contiguous and on the CPU.

    Raises:
        RunFolderError: there is no such folder, it is incomplete, or a file is not what was written.
    """
    folder = Path(folder)
    if not folder.exists() and previous_tree(folder).exists():
        folder = previous_tree(folder)
    if not folder.is_dir():
        raise RunFolderError(f"{folder} does not exist: expected a folder with {MANIFEST}")
    files = _manifest(folder)
    content = {name: read_checked(folder / name, files[name]) for name in (TENSORS, TREE)}
    try:
        return decode_tree(content[TREE], content[TENSORS])
    except ValueError as err:
        raise RunFolderError(f"{folder} holds a tree this version cannot read ({err})") from err


def digest(folder: Path) -> str:
    """sha256 of the tensors of a saved tree, as its manifest has it.

    Raises:
        RunFolderError: there is no such tree.
    """
    return str(_manifest(folder)[TENSORS]["sha256"])


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        manifest = parse_json(read_regular(folder / MANIFEST))
        files = manifest["files"]
        kinds = {"size": int, "sha256": str}
        complete = manifest["format"] == _FORMAT and all(
            isinstance(files[name][key], kind) for name in (TENSORS, TREE) for key, kind in kinds.items()
        )
    except FileNotFoundError:
        raise RunFolderError(
            f"{folder} has no {MANIFEST}: it was not written to its end; use an earlier one"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise RunFolderError(
            f"{folder / MANIFEST} is damaged ({type(err).__name__}: {err}): use an earlier one"
        ) from err
    if not complete:
        raise RunFolderError(
            f"{folder / MANIFEST} has format {manifest['format']!r} or entries of another form; this version reads "
            f"{_FORMAT}: use the version that wrote it"
        )
    return files


def _move_into_place(partial: Path, folder: Path, aside: Path | None) -> None:
    previous = previous_tree(folder)
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    partial.rename(folder)
    sync(folder.parent)
    if aside is not None and previous.exists():
        shutil.rmtree(aside, ignore_errors=True)
        previous.rename(aside)
        sync(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


@contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:  # also Ctrl-C: half a checkpoint is worth nothing
        shutil.rmtree(folder, ignore_errors=True)
        raise
