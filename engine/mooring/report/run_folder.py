"""The folder of one run: where it lies, whether it can be written, and its small files."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mooring.config.method_settings import method_title
from mooring.config.schema import RunConfig
from mooring.errors import RunFolderError
from mooring.parsing import parse_json
from mooring.regular_file import read_regular
from mooring.report.records import is_unfinished, write_json_atomic, write_text_atomic
from mooring.report.run_lock import LOCK
from mooring.syncing import make_folder

# What logs, pictures and TensorBoard events of a long run may take; weights come on top.
LOG_BYTES = 64 << 20
# folders of small files that a continued run writes over; checkpoints are only added, read and deleted
_WRITTEN_OVER = ("tensorboard", "heartbeat", "model", "manifest")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run folder that exists.

    It holds ``config.toml`` (resolved), ``environment.json``, ``metrics.jsonl``, ``result.json``,
    ``confusion.json``, ``tensorboard/``, pictures, ``manifest/``, ``checkpoints/``, ``saved.txt`` (a checkpoint once
    stood), ``best/``, ``best-E/`` (what an older checkpoint would go on with), ``test/``, ``extra_test/`` and
    ``model/``.
    """

    path: Path

    def write_text(self, name: str, text: str) -> None:
        """Writes a small file as a whole."""
        write_text_atomic(self.path / name, text)

    def write_json(self, name: str, value: Any) -> None:
        """Writes strict JSON as a whole; non-finite numbers become words."""
        write_json_atomic(self.path / name, value)

    def remove_unfinished(self) -> None:
        """Deletes what killed processes left of small files that they were writing; nobody else writes here now."""
        for entry in list(self.path.iterdir()):
            if is_unfinished(entry.name):
                entry.unlink()

    def read_json(self, name: str) -> Any:
        """The content of a JSON file.

        Raises:
            RunFolderError: it is not there, or not JSON.
        """
        try:
            return parse_json(read_regular(self.path / name))
        except FileNotFoundError:
            raise RunFolderError(f"{self.path}: expected {name}, got none: the run did not end") from None
        except OSError as err:
            raise RunFolderError(f"{self.path / name}: expected JSON, got {err.strerror}") from None
        except ValueError as err:
            raise RunFolderError(f"{self.path / name}: expected JSON, got {err}") from None


def default_run_name(config: RunConfig, now: datetime | None = None) -> str:
    """``<data>-<model>-<method>-<time>``, safe as a folder name on every system."""
    model = Path(config.model.name.removeprefix("local-dir:")).name
    words = [data_name(config.data.path), model, method_title(config.method)]
    safe = [re.sub(r"[^\w.]+", "_", word).strip("._") or "x" for word in words]
    return "-".join([*(word[:40] for word in safe), (now or datetime.now()).strftime("%Y%m%d-%H%M%S")])


def data_name(data: Path) -> str:
    """What to call a data set after its path: the folder's name, or the list's without its ending."""
    return re.sub(r"\.(csv|tsv|parquet)$", "", data.resolve().name, flags=re.IGNORECASE) or "data"


def check_run_folder(path: Path, *, resume: bool = False) -> None:
    """Looks, without creating anything, whether ``path`` can become or continue a run folder.

    Raises:
        RunFolderError: it is a file, holds something else, or links that lead a continued run to files of others.
    """
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"out: expected a folder, got the file {path}: choose another out=")
    if resume:
        _require_run(path)
        _refuse_links(path)
    elif path.is_dir() and not all(
        entry.name == LOCK or is_unfinished(entry.name) for entry in path.iterdir()
    ):
        raise RunFolderError(
            f"out: expected a new or empty folder, got {path}, which is not empty: choose another out=, "
            f"or continue that run with resume={path}"
        )


def open_run_folder(path: Path, *, resume: bool = False, need_bytes: int = LOG_BYTES) -> RunFolder:
    """Creates the folder of a fresh run, or opens that of a run to continue.

    Args:
        path: the run folder; parents are made.
        resume: the folder holds an earlier part of this run; otherwise it must be empty or absent.
        need_bytes: free disk space to insist on.

    Raises:
        RunFolderError: it is a file, holds something else, cannot be written, or the disk is nearly full.
    """
    check_run_folder(path, resume=resume)
    otherwise = "put that right: a run goes on in its own folder" if resume else "choose another out="
    try:
        make_folder(path)
        with tempfile.TemporaryFile(dir=path):
            pass  # permission bits lie (root, network file systems, quotas): only a write tells
    except OSError as err:
        raise RunFolderError(
            f"out: expected a folder that can be written, got {path}: {err.strerror}; {otherwise}"
        ) from None
    free = shutil.disk_usage(path).free
    if free < need_bytes:
        raise RunFolderError(
            f"out: expected at least {need_bytes / 1e6:.0f} MB free for {path}, got {free / 1e6:.0f} MB: "
            f"free some space{'' if resume else ', or choose another out='}"
        )
    return RunFolder(path)


def existing_run(path: Path) -> RunFolder:
    """The folder of a finished or interrupted run, for reading.

    Raises:
        RunFolderError: it is not a run folder.
    """
    _require_run(path)
    return RunFolder(path)


def is_run(path: Path) -> bool:
    """Whether ``mooring train`` has begun to write this folder."""
    return (path / "config.toml").is_file()


def _refuse_links(path: Path) -> None:
    """A run folder may come from elsewhere: what a continued run writes over, cuts or deletes must lie in it."""
    try:
        own = [path / "metrics.jsonl", *(entry for entry in path.iterdir() if entry.name.startswith("."))]
        for folder in (path / name for name in _WRITTEN_OVER):
            own += [folder] if folder.is_symlink() or not folder.is_dir() else folder.iterdir()
    except OSError as err:
        raise RunFolderError(
            f"{err.filename}: expected a folder that can be read, got {err.strerror}"
        ) from None
    for entry in own:
        if entry.is_symlink():
            raise RunFolderError(
                f"{entry}: expected a part of the run itself, which is written over when the run goes on; got a "
                f"symbolic link to {os.path.realpath(entry)}: put what it leads to in its place, or remove it"
            )


def _require_run(path: Path) -> None:
    if is_run(path):
        return
    if not path.exists():
        got = "nothing"
    else:
        got = "a folder without config.toml" if path.is_dir() else "a file"
    raise RunFolderError(f"{path}: expected a run folder (written by mooring train), got {got}")
