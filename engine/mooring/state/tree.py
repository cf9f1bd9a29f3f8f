"""Saves a tree of tensors and plain values to a folder, whole or not at all, and reads it bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor

from mooring.errors import RunFolderError

TENSORS = "tensors.safetensors"
TREE = "tree.json"
MANIFEST = "manifest.json"
_FORMAT = 1
_PREVIOUS = ".previous"
_DTYPES = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.bool,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
}  # fmt: skip


def save_tree(folder: str | Path, tree: Any, *, replace: bool = False) -> Path:
    """Writes ``tree`` to a new folder.

    The folder appears under its name only when complete: files are written to ``<folder>.partial`` and
    synced, a manifest with their sizes and SHA-256 is added, the folder is renamed, its parent synced.

    Args:
        folder: must not exist unless ``replace``.
        tree: dicts (keys str or int), lists and tuples, nested, of tensors (any device and strides),
            int, float, str, bool, None and bytes. Entries that are one and the same tensor (same memory,
            shape and strides) are stored once and come back as one; other overlaps come back separate.
        replace: take the place of an existing folder. The old one is kept as ``<folder>.previous`` until
            the new one stands, and ``load_tree`` finds it there if the process dies in between.

    Returns:
        ``folder``.

    Raises:
        TypeError: a leaf of another type; the message names its place.
        RunFolderError: the folder exists, or cannot be written.
    """
    folder = Path(folder)
    document, tensors = _encode(tree)
    if folder.exists() and not replace:
        raise RunFolderError(f"{folder} exists already: choose another name, or remove it")
    partial = folder.with_name(folder.name + ".partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that died while writing
        partial.mkdir()
        with _removed_on_failure(partial):
            save_file(tensors, partial / TENSORS)
            (partial / TREE).write_text(json.dumps(document, allow_nan=False), encoding="utf-8")
            files = {name: _described(partial / name) for name in (TENSORS, TREE)}
            (partial / MANIFEST).write_text(
                json.dumps({"format": _FORMAT, "files": files}, indent=1), encoding="utf-8"
            )
            for name in (TENSORS, TREE, MANIFEST):
                _sync(partial / name)
            _sync(partial)
            _move_into_place(partial, folder)
    except (OSError, SafetensorError) as err:
        raise RunFolderError(
            f"cannot save to {folder} ({err}): nothing was changed; free space or choose another place"
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
    content = {name: _verified(folder / name, files[name]) for name in (TENSORS, TREE)}
    try:
        tensors = load_tensors(content[TENSORS])
        return _decode(json.loads(content[TREE]), tensors)
    except (SafetensorError, ValueError, KeyError, TypeError) as err:
        raise RunFolderError(
            f"{folder} holds a tree this version cannot read ({type(err).__name__}: {err})"
        ) from err


def _encode(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    stored: dict[tuple[Any, ...], str] = {}
    keep: list[Tensor] = []  # a freed tensor's address could be taken by the next one

    def store(tensor: Tensor) -> str:
        key = (
            tensor.device,
            tensor.data_ptr(),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
            tensor.is_neg(),
        )
        if tensor.numel() == 0 or key not in stored:
            stored[key] = name = f"t{len(tensors)}"
            keep.append(tensor)
            # clone: safetensors wants dense tensors that share no memory
            tensors[name] = tensor.detach().cpu().resolve_neg().clone(memory_format=torch.contiguous_format)
        return stored[key]

    def node(value: Any, place: str) -> Any:
        if value is None or isinstance(value, bool | str):
            return value
        if type(value) is int:
            return {"int": str(value)}  # JSON readers may round large integers
        if type(value) is float:
            return {"float": value.hex()}
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.dtype not in _DTYPES or value.is_quantized:
                raise TypeError(f"{place}: cannot store a tensor of {value.dtype} and layout {value.layout}")
            return {"tensor": store(value)}
        if isinstance(value, bytes):
            return {
                "bytes": store(
                    torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else torch.empty(0)
                )
            }
        if isinstance(value, Mapping):
            entries = []
            for key, child in value.items():
                if type(key) not in (str, int):
                    raise TypeError(f"{place}: keys must be str or int; got {key!r} ({type(key).__name__})")
                entries.append([key, node(child, f"{place}.{key}")])
            return {"dict": entries}
        if type(value) in (list, tuple, torch.Size):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [node(child, f"{place}[{i}]") for i, child in enumerate(value)]}
        raise TypeError(
            f"{place}: cannot store a {type(value).__name__}; expected a dict, list, tuple, tensor, int, "
            "float, str, bool, None or bytes"
        )

    return node(tree, "tree"), tensors


def _decode(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    ((kind, value),) = node.items()
    match kind:
        case "int":
            return int(value)
        case "float":
            return float.fromhex(value)
        case "tensor":
            return tensors[value]
        case "bytes":
            return tensors[value].to(torch.uint8).numpy().tobytes()
        case "dict":
            return {key: _decode(child, tensors) for key, child in value}
        case "list":
            return [_decode(child, tensors) for child in value]
        case "tuple":
            return tuple(_decode(child, tensors) for child in value)
    raise ValueError(f"unknown entry {kind!r}")


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        complete = manifest["format"] == _FORMAT and all(
            {"size", "sha256"} <= set(files[name]) for name in (TENSORS, TREE)
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
            f"{folder / MANIFEST} has format {manifest['format']!r}; this version reads {_FORMAT}: "
            "use the version that wrote it"
        )
    return files


def _verified(file: Path, expected: Mapping[str, Any]) -> bytes:
    try:
        content = file.read_bytes()
    except OSError as err:
        raise RunFolderError(f"{file} cannot be read ({err.strerror}), but the manifest lists it") from err
    if len(content) != expected["size"]:
        raise RunFolderError(
            f"{file} is damaged: expected {expected['size']} bytes, got {len(content)}: use an earlier one"
        )
    digest = hashlib.sha256(content).hexdigest()
    if digest != expected["sha256"]:
        raise RunFolderError(
            f"{file} is damaged: expected sha256 {expected['sha256']}, got {digest}: use an earlier one"
        )
    return content


def _described(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"size": file.stat().st_size, "sha256": digest}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(partial: Path, folder: Path) -> None:
    previous = previous_tree(folder)
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    partial.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


@contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:  # also Ctrl-C: half a checkpoint is worth nothing
        shutil.rmtree(folder, ignore_errors=True)
        raise
