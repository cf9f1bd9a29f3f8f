"""Trees of tensors and plain values as one JSON document and one safetensors file, bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from torch import Tensor

from mooring.parsing import parse_json
from mooring.regular_file import open_regular

# safetensors' names; what is not here cannot be stored
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL",
    torch.uint8: "U8", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
}  # fmt: skip

# what an entry of another form ends in
_WRONG = (SafetensorError, ArithmeticError, AttributeError, LookupError, TypeError)

# (name of the entry, tensor of the caller) -> dense CPU tensor that shares no memory with it
HostCopy = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class EncodedTree:
    """A tree whose tensors lie in host memory of their own.

    Attributes:
        document: the tree as JSON values, with names in place of tensors.
        tensors: dense CPU tensors by name.
    """

    document: Any
    tensors: Mapping[str, Tensor]


def fresh_copy(name: str, tensor: Tensor) -> Tensor:
    """A dense copy in new host memory."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def encode_tree(tree: Any, host_copy: HostCopy = fresh_copy) -> EncodedTree:
    """Takes a tree apart; nothing of the result changes when the caller's tensors do.

    Args:
        tree: dicts (keys str or int), lists and tuples, nested, of tensors (any device and strides), int, float,
            str, bool, None and bytes. Entries that are one and the same tensor (same memory, shape and strides)
            are stored once and come back as one; other overlaps come back separate.
        host_copy: how a tensor is copied.

    Raises:
        TypeError: a leaf of another type; the message names its place.
    """
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
            tensors[name] = host_copy(name, tensor)
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
            raw = torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else torch.empty(0)
            return {"bytes": store(raw)}
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

    return EncodedTree(node(tree, "tree"), tensors)


def document_bytes(encoded: EncodedTree) -> bytes:
    """The JSON file of an encoded tree."""
    return json.dumps(encoded.document, allow_nan=False).encode()


def tensor_bytes(encoded: EncodedTree) -> Iterator[bytes | memoryview]:
    """The safetensors file of an encoded tree, piece by piece, without a second copy of a tensor."""
    # wide items first, as safetensors itself does: every tensor then starts at a multiple of its item size
    ordered = sorted(encoded.tensors.items(), key=lambda item: -item[1].element_size())
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + math.prod(tensor.shape) * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for _, tensor in ordered:
        if tensor.numel():
            yield tensor.reshape(-1).view(torch.uint8).numpy().data


def decode_tree(document: bytes, tensors: bytes) -> Any:
    """The tree of the two files; tensors come back contiguous and on the CPU.

    Raises:
        ValueError: the files are not of this form.
    """
    try:
        return _decoded(parse_json(document), load_tensors(tensors))
    except (*_WRONG, RecursionError) as err:
        raise ValueError(f"{type(err).__name__}: {err}") from err


class TreeView(Mapping[Any, Any]):
    """A dict of an encoded tree whose entries are decoded, and whose tensors are read, when they are asked for.

    Every access reads anew: what the caller does not keep takes no memory.

    Raises:
        ValueError: the files are not of this form; from any access.
    """

    def __init__(self, entries: Any, tensors: Mapping[str, Tensor]) -> None:
        try:
            self._entries = dict(entries)
        except (TypeError, ValueError) as err:
            raise ValueError(f"{type(err).__name__}: {err}") from err
        self._tensors = tensors

    def __getitem__(self, key: Any) -> Any:
        child = self._entries[key]
        try:
            return _decoded(child, self._tensors, TreeView)
        except (*_WRONG, RecursionError) as err:
            raise ValueError(f"{key}: {type(err).__name__}: {err}") from err

    def __iter__(self) -> Iterator[Any]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class _TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for."""

    def __init__(self, file: Path) -> None:
        open_regular(file).close()  # a pipe would keep the library waiting
        self._file = safe_open(file, framework="pt")

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())


def view_tree(document: bytes, tensors: Path) -> TreeView:
    """The tree of the two files, for looking at parts of it without reading all.

    Args:
        document: the JSON file of a tree that is a dict.
        tensors: the safetensors file; kept open.

    Raises:
        ValueError: the files are not of this form.
    """
    try:
        view = _decoded(parse_json(document), _TensorFile(tensors), TreeView)
    except (*_WRONG, OSError, RecursionError) as err:
        raise ValueError(f"{type(err).__name__}: {err}") from err
    if not isinstance(view, TreeView):
        raise ValueError(f"expected a dict, got a {type(view).__name__}")
    return view


def read_all(tree: Any) -> Any:
    """The tree with plain dicts in place of views, every tensor read."""
    if isinstance(tree, Mapping):
        return {key: read_all(child) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(read_all(child) for child in tree)
    return tree


def _as_dict(entries: Any, tensors: Mapping[str, Tensor]) -> dict[Any, Any]:
    return {key: _decoded(child, tensors) for key, child in entries}


def _decoded(
    node: Any,
    tensors: Mapping[str, Tensor],
    mapping: Callable[[Any, Mapping[str, Tensor]], Mapping[Any, Any]] = _as_dict,
) -> Any:
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
            return mapping(value, tensors)
        case "list":
            return [_decoded(child, tensors, mapping) for child in value]
        case "tuple":
            return tuple(_decoded(child, tensors, mapping) for child in value)
    raise ValueError(f"unknown entry {kind!r}")
