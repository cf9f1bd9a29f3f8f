"""One copy of a run's state in host memory, in buffers that are used again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mooring.state.encoding import EncodedTree, encode_tree


class HostMemory:
    """Holds at most one snapshot; taking the next one overwrites it.

    Fresh memory costs a page fault for every 4 KiB, on top of the copy, and pinned memory far more: from the second
    snapshot on neither is paid.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, tree: dict[str, Any]) -> dict[str, EncodedTree]:
        """Copies each part of ``tree``; when this returns, the run may go on and change its tensors.

        Raises:
            TypeError: a leaf that cannot be stored; the message names its place.
        """
        used: dict[str, Tensor] = {}
        devices: set[torch.device] = set()

        def copier(part: str) -> Any:
            def host_copy(name: str, tensor: Tensor) -> Tensor:
                key = f"{part}/{name}"
                buffer = self._buffers.get(key)
                if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                    buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                if tensor.is_cuda:
                    devices.add(tensor.device)
                used[key] = buffer.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
                return buffer

            return host_copy

        parts = {part: encode_tree(branch, copier(part)) for part, branch in tree.items()}
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        self._buffers = used
        return parts
