"""A part of the README that is drawn from records, between two lines that say so."""

from __future__ import annotations

import re


def with_block(readme: str, block: str) -> str:
    """The README with ``block`` in the place of the one that has the same first and last line.

    Raises:
        ValueError: it has no place for it.
    """
    lines = block.splitlines()
    begin, end = lines[0], lines[-1]
    place = re.compile(re.escape(begin) + r"\n.*?" + re.escape(end), flags=re.DOTALL)
    if not place.search(readme):
        raise ValueError(f"README.md must hold {begin} and {end}")
    return place.sub(lambda _: block, readme)
