"""Damage: to bytes, to text, and to the values of a JSON document whose form stays whole."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

_NUMBERS = (0, 1, -1, 2, 7, 255, 256, 65535, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63), 10**30)
_TEXTS = (
    "", " ", "0", "none", "nan", "..", "../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "é" * 40, "x" * 5000,
    "[", "{", "%s%n", "\r\n", "local-dir:/", "hf-hub:a/b", "http://example.invalid/x", "$(id)", "`id`", "-1", "1e999",
)  # fmt: skip


def strange(rng: random.Random) -> Any:
    """A value that nobody asked for."""
    return rng.choice(
        (
            None, True, False, rng.choice(_NUMBERS), rng.choice(_NUMBERS), rng.random() * 10 ** rng.randint(-300, 300),
            float("nan"), float("inf"), -0.0, rng.choice(_TEXTS), rng.choice(_TEXTS), [], {}, [[]], [None], {"": None},
            {"name": []}, [rng.choice(_NUMBERS)] * 3, {"a": {"b": rng.choice(_TEXTS)}},
        )
    )  # fmt: skip


def damaged_value(document: Any, rng: random.Random) -> Any:
    """A copy of a JSON value in which a few places are changed, removed, moved or added."""
    document = copy.deepcopy(document)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(document))
        if not places:
            return strange(rng)
        holder, key = rng.choice(places)
        match rng.randrange(5):
            case 0 | 1:
                holder[key] = strange(rng)
            case 2:
                del holder[key]
            case 3:
                other, at = rng.choice(places)
                if at in other if isinstance(other, dict) else at < len(other):
                    holder[key] = copy.deepcopy(other[at])
            case 4:
                if isinstance(holder, dict):
                    holder[rng.choice(_TEXTS)] = strange(rng)
                else:
                    holder.insert(rng.randint(0, len(holder)), strange(rng))
    return document


def _places(document: Any) -> Any:
    pairs = (
        document.items()
        if isinstance(document, dict)
        else enumerate(document)
        if isinstance(document, list)
        else ()
    )
    for key, value in list(pairs):
        yield document, key
        yield from _places(value)


def damaged_json(text: bytes, rng: random.Random) -> bytes:
    """A JSON document with other values in it, or with other bytes."""
    if rng.random() < 0.25:
        return damaged_bytes(text, rng)
    return json.dumps(damaged_value(json.loads(text), rng)).encode("utf-8", "surrogatepass")


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """A copy with bytes changed, cut out, repeated, inserted, or cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randint(0, len(changed)) if rng.random() < 0.6 else rng.randint(0, min(64, len(changed)))
        length = rng.choice((1, 1, 2, 4, 8, 64))
        match rng.randrange(7):
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at : at + length] = rng.randbytes(length)
            case 2:
                del changed[at : at + length]
            case 3:
                changed[at:at] = changed[at : at + length] * rng.choice((1, 2, 50))
            case 4:
                value = rng.choice(_NUMBERS) % 2**32
                changed[at : at + 4] = value.to_bytes(4, rng.choice(("little", "big")))
            case 5 if rng.random() < 0.3:
                del changed[at:]
            case _:
                changed[at:at] = rng.choice(_TEXTS).encode("utf-8", "surrogatepass")
    return bytes(changed)
