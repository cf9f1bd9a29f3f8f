"""Tensors of a safetensors file without a copy of it: mapped into memory, private to the process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

_LENGTH_BYTES = 8  # of the header, in front of it
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def map_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file; its pages are read when they are used, and the system may drop them again.

    Raises:
        SafetensorError, OSError, ValueError: not a safetensors file, or a dtype that torch computes nothing with.
    """
    with safe_open(path, "pt"):  # checks lengths, offsets and names
        pass
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    content = np.memmap(path, np.uint8, mode="c", offset=0)[_LENGTH_BYTES + length :]
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{name} is of dtype {entry['dtype']}")
        dtype = _DTYPES[entry["dtype"]]
        begin, end = entry["data_offsets"]
        if begin == end:
            found[name] = torch.empty(entry["shape"], dtype=dtype)
            continue
        raw = content[begin:end]
        if raw.ctypes.data % dtype.itemsize:  # the format allows it, and no writer does it
            raw = raw.copy()
        found[name] = torch.from_numpy(raw).view(dtype).view(entry["shape"])
    return found
