"""How boxes are searched and drawn, with every size resolved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

WIDTH_OF_RULE = 2048  # the feature width for which the public code fixes the two numbers below
GROUP_WIDTH, RANK_STRIDE = 30, 250


class BoxRule(NamedTuple):
    """Numbers of one search; ``rivals`` and ``negatives`` are below the number of classes."""

    patches: int
    group_width: int
    rank_stride: int
    rivals: int
    negatives: int
    image_height: int
    image_width: int
    patch_side: int
    centred: bool

    @classmethod
    def of(cls, numbers: Sequence[int]) -> BoxRule:
        """From a list of integers, which is what an operator takes."""
        return cls._make((*numbers[:-1], bool(numbers[-1])))

    def shifted(self) -> BoxRule:
        """The same with boxes that are shifted inside the image instead of cut."""
        return self._replace(centred=True)


def default_group_width(width: int) -> int:
    """Channels of a group for a feature width of ``width``: 30 of 2048, at least 1."""
    return max(1, round(GROUP_WIDTH * width / WIDTH_OF_RULE))


def default_rank_stride(width: int) -> int:
    """Ranks from one group to the next for a feature width of ``width``: 250 of 2048."""
    return RANK_STRIDE * width // WIDTH_OF_RULE
