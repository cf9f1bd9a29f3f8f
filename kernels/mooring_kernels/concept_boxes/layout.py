"""How the positions of a feature map lie in memory."""

from __future__ import annotations

from torch import Tensor


def positions_in_line(feature_map: Tensor) -> tuple[Tensor, int]:
    """[B, D, H, W] with one stride from position to position, copied where it has none; and that stride.

    The stride of a dimension of size 1 says nothing, and ``contiguous()`` leaves it as it is.
    """
    rows, columns = feature_map.shape[2:]
    if rows > 1 and columns > 1 and feature_map.stride(2) != columns * feature_map.stride(3):
        feature_map = feature_map.contiguous()
    return feature_map, feature_map.stride(3 if columns > 1 else 2)
