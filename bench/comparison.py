"""Candidates of one op side by side, as the records have them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from bench.records import Record, deciding, deciding_seconds, threads_of

PUBLIC, AUTO = "public", "auto"
_OURS_OF_OLD = {"native", "triton", "polar", "auto"}  # the first records do not say what is ours


def is_ours(record: Record) -> bool:
    """Whether this package offers the candidate in place of the others."""
    return bool(record.get("ours", record["candidate"] in _OURS_OF_OLD))


def may_be_eager(record: Record) -> bool:
    """The first records of torch.compile do not say that it compiled: past dynamo's limit it ran eager code."""
    return record["candidate"] == "compile" and "graphs" not in record


def _fastest(records: list[Record]) -> Record | None:
    return min(records, key=lambda record: deciding_seconds(record)["p50"], default=None)


@dataclass(frozen=True)
class Comparison:
    """All candidates at one environment, op, size, dtype, pass and number of threads."""

    environment: str
    op: str
    size: str
    dtype: str
    which: str
    threads: int
    small: bool
    candidates: dict[str, Record] = field(default_factory=dict)

    @property
    def ours(self) -> Record | None:
        """What a user gets by default; in the first records the fastest of ours."""
        return self.candidates.get(AUTO) or _fastest([r for r in self.candidates.values() if is_ours(r)])

    @property
    def _baselines(self) -> list[Record]:
        return [r for r in self.candidates.values() if not is_ours(r) and r.get("same_function", True)]

    @property
    def eager_or_compiled(self) -> Record | None:
        """The faster of vectorised eager PyTorch, torch.compile and a CUDA graph."""
        return _fastest([r for r in self._baselines if not r["candidate"].startswith(PUBLIC)])

    @property
    def public(self) -> Record | None:
        """The public code's own algorithm."""
        return self.candidates.get(PUBLIC)

    @property
    def best_baseline(self) -> Record | None:
        """The fastest candidate that is not ours and computes the same function."""
        return _fastest(self._baselines)

    def faster_than(self, other: Record | None) -> dict[str, float] | None:
        """Quantiles of how many times ours is faster, paired round by round."""
        if other is None or self.ours is None:
            return None
        return deciding(self.ours).times_faster_than.get(other["candidate"])


def comparisons(newest: Iterable[Record]) -> list[Comparison]:
    """Timed measurements of ops, grouped, in the order of the files."""
    groups: dict[tuple[str, ...], Comparison] = {}
    for r in newest:
        if "times_faster_than" not in r:
            continue
        threads = threads_of(r)
        key = (r["environment"], r["op"], r["size"], r["dtype"], r["pass"], str(threads))
        if key not in groups:
            groups[key] = Comparison(*key[:5], threads, bool(r.get("small", False)))
        groups[key].candidates[r["candidate"]] = r
    return list(groups.values())


def headlines(all_comparisons: Iterable[Comparison], environment: str) -> list[Comparison]:
    """One per op: its first full size, float32 if there, both passes where there is a gradient, fewest threads."""
    chosen: dict[str, Comparison] = {}
    for c in all_comparisons:
        if c.environment != environment or c.small or c.ours is None:
            continue
        best = chosen.get(c.op)
        if best is None or (c.size == best.size and _rank(c) < _rank(best)):
            chosen[c.op] = c
    return list(chosen.values())


def _rank(c: Comparison) -> tuple[bool, bool, int]:
    return c.dtype != "float32", c.which != "both", c.threads
