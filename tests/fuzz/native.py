"""Calls every function of the native module with strange values, for a build under the address sanitizer.

    LD_PRELOAD=libasan.so python tests/fuzz/native.py FOLDER --seconds 60 [--seed 1]

FOLDER holds the sanitized ``_C*.so``. Buffers have exactly the promised size, so that one element more is seen; their
values are NaN, infinite, denormal or huge at times, labels and indices lie outside their range, sizes are zero, inputs
share one buffer. What numbers alone show to be wrong must raise ValueError or TypeError. Ends with a line of counts.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

Case = Callable[["Memory"], tuple[Any, ...]]
CASES: dict[str, Case] = {}
_WRONG_SIZES = (-1, -(2**40), -(2**63), 2**62, 2**63 - 1)
_LABELS = (-1, -2, 0, 1, 2, 5, 1000, 2**31, 2**40, 2**63 - 1, -(2**63))


class Address(int):
    """Where a buffer lies: no number to be replaced by a wrong one, since no one can see that it is."""


NONE = Address(0)


class Memory:
    """Buffers of one call: exactly as large as asked for, kept until the call is over."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.numbers = np.random.default_rng(rng.getrandbits(32))
        self.kept: list[np.ndarray] = []
        self.shared: dict[tuple[str, int], Address] = {}
        self.share = rng.random() < 0.15  # inputs of one size are one buffer

    def size(self, least: int = 0, most: int = 9) -> int:
        if self.rng.random() < 0.05:
            return self.rng.choice((16, 17, 33, 64, 65, 130))
        return self.rng.randint(least, most)

    def address(self, array: np.ndarray) -> Address:
        self.kept.append(array)
        return Address(array.ctypes.data) if array.size else NONE

    def _floats(self, count: int) -> np.ndarray:
        values = self.numbers.normal(0, 1, count).astype(np.float32)
        if count and self.rng.random() < 0.4:
            odd = np.asarray([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-42, 0.0, -0.0], np.float32)
            at = self.numbers.integers(0, count, max(1, count // 4))
            values[at] = self.numbers.choice(odd, len(at))
        return values

    def _input(self, kind: str, array: np.ndarray) -> Address:
        if not self.share:
            return self.address(array)
        key = (kind, array.nbytes)
        if key not in self.shared:
            self.shared[key] = self.address(array)
        return self.shared[key]

    def f32(self, count: int) -> Address:
        return self._input("f32", self._floats(count))

    def dtype(self) -> int:
        return self.rng.randrange(2)

    def matrix(self, count: int, dtype: int) -> Address:
        values = self._floats(count)
        return self._input(
            f"m{dtype}", values if dtype == 0 else (values.view(np.uint32) >> 16).astype(np.uint16)
        )

    def out(self, count: int, dtype: int = 0) -> Address:
        return self.address(np.full(count, 0xCD, np.uint32 if dtype == 0 else np.uint16))

    def i64(self, count: int, below: int) -> Address:
        """Integers that are meant to be in 0..below-1, and at times are not."""
        values = self.numbers.integers(-1, max(1, below), count)
        if count and self.rng.random() < 0.5:
            at = self.numbers.integers(0, count, max(1, count // 3))
            values[at] = self.numbers.choice(np.asarray(_LABELS, np.int64), len(at))
        return self._input("i64", values.astype(np.int64))

    def out_i64(self, count: int) -> Address:
        return self.address(np.full(count, -7, np.int64))

    def u8(self, count: int) -> Address:
        return self._input("u8", self.numbers.integers(0, 3, count).astype(np.uint8))

    def number(self) -> float:
        odd = (0.0, -1.0, 1e-30, 1e30, float("nan"), float("inf"), -float("inf"))
        return self.rng.choice(odd) if self.rng.random() < 0.2 else self.rng.uniform(0.01, 2)

    def threads(self) -> int:
        return self.rng.randint(1, 3)


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


@case
def row_normalise_forward(m: Memory):
    n, d, t = m.size(), m.size(1), m.dtype()
    return m.matrix(n * d, t), t, m.number(), m.out(n * d, t), m.out(n), n, d, m.threads()


@case
def row_normalise_backward(m: Memory):
    n, d, t = m.size(), m.size(1), m.dtype()
    rows = m.matrix(n * d, t), m.f32(n), m.matrix(n * d, t), m.f32(n)
    return *rows, t, m.number(), m.out(n * d, t), n, d, m.threads()


def _layer(m: Memory, c: int):
    return m.f32(c), m.f32(c), m.rng.choice((NONE, m.f32(c))), m.rng.choice((NONE, m.f32(c))), abs(m.number())


@case
def batchnorm_statistics_planes(m: Memory):
    b, c, p, t = m.size(1), m.size(1), m.size(1), m.dtype()
    n = b * c * p
    return m.matrix(n, t), t, _layer(m, c), m.out(n, t), m.out(c), m.out(c), b, c, p, m.threads()


@case
def batchnorm_statistics_rows(m: Memory):
    r, c, t = m.size(1), m.size(1), m.dtype()
    return m.matrix(r * c, t), t, _layer(m, c), m.out(r * c, t), m.out(c), m.out(c), r, c, m.threads()


@case
def ring_push(m: Memory):
    k = m.size(1)
    b = m.rng.randint(0, k)
    fields = []
    for _ in range(m.rng.randint(0, 3)):
        d, t, u = m.size(1), m.dtype(), m.dtype()
        fields.append((m.out(k * d, t), t, m.matrix(b * d, u), u, d))
    head = m.rng.randrange(k)
    return fields, m.out_i64(k), m.i64(b, 4), k, b, head, m.rng.random() < 0.5, m.threads()


@case
def class_ring_push(m: Memory):
    c, k, b = m.size(1), m.size(1), m.size()
    fields = []
    for _ in range(m.rng.randint(0, 2)):
        p, d, t, u = m.size(1, 3), m.size(1), m.dtype(), m.dtype()
        fields.append((m.out(c * k * p * d, t), t, m.matrix(b * p * d, u), u, p, d))
    integers = m.out_i64(c * k), m.i64(c, k), m.i64(b, c), m.out_i64(b)
    return fields, integers, (c, k, b), m.rng.random() < 0.5, m.threads()


@case
def class_statistics(m: Memory):
    k, d, c, t, u = m.size(), m.size(1), m.size(1), m.dtype(), m.dtype()
    given = m.matrix(k * d, t), t, m.matrix(k * d, u), u, m.i64(k, c), m.f32(c * d), m.number()
    return *given, m.out(c * d), m.out(c * d), m.out(c), k, d, c, m.threads()


@case
def calibrate_residual(m: Memory):
    k, d, c, t = m.size(), m.size(1), m.size(1), m.dtype()
    return m.matrix(k * d, t), t, m.i64(k, c), m.f32(c * d), m.out(k * d), k, d, c, m.threads()


@case
def calibrate_place(m: Memory):
    k, d, c = m.size(), m.size(1), m.size(1)
    return m.out(k * d), m.i64(k, c), m.f32(c * d), m.number(), k, d, c, m.threads()


@case
def calibrate_translate(m: Memory):
    k, d, c, t = m.size(), m.size(1), m.size(1), m.dtype()
    means = m.f32(c * d), m.f32(c * d)
    return m.matrix(k * d, t), t, m.i64(k, c), *means, m.number(), m.out(k * d), k, d, c, m.threads()


@case
def softmax_cross_entropy_in_place(m: Memory):
    n, c = m.size(), m.size(1)
    stride = c + m.rng.choice((0, 0, 1, 5))
    rows = m.address(m._floats(n * stride))
    return rows, stride, m.i64(n, c), m.number(), m.rng.random() < 0.5, m.out(n), n, c, m.threads()


def _supervision(m: Memory):
    return m.number(), m.number(), m.number()


@case
def text_supervised_loss_forward(m: Memory):
    b, c, t, u = m.size(), m.size(1), m.dtype(), m.dtype()
    given = m.matrix(b * c, t), t, m.matrix(b * c, u), u, m.i64(b, c), _supervision(m)
    return *given, m.out(1), m.out(1), m.out(b), m.out(b), b, c, m.threads()


@case
def text_supervised_loss_backward(m: Memory):
    b, c, t, u = m.size(), m.size(1), m.dtype(), m.dtype()
    given = m.matrix(b * c, t), t, m.matrix(b * c, u), u, m.i64(b, c), m.f32(b), m.f32(b), _supervision(m)
    grads = m.rng.choice((NONE, m.out(b * c, t))), m.rng.choice((NONE, m.out(b * c, u)))
    return *given, m.number(), *grads, b, c, m.threads()


def _head(m: Memory):
    rows, c, t = m.size(), m.size(1), m.dtype()
    return m.matrix(rows * c, t), t, m.i64(rows, c), rows, c


@case
def two_head_cross_entropy_forward(m: Memory):
    first, second = _head(m), _head(m)
    losses = m.out(1), m.out(1), m.out(1)
    return first, second, m.number(), m.number(), losses, m.out(2), m.out(first[3] + second[3]), m.threads()


@case
def two_head_cross_entropy_backward(m: Memory):
    first, second = _head(m), _head(m)
    grads = tuple(m.rng.choice((NONE, m.out(head[3] * head[4], head[1]))) for head in (first, second))
    scales = m.number(), m.number(), m.number()
    return first, second, m.f32(first[3] + second[3]), *scales, *grads, m.threads()


@case
def concept_boxes(m: Memory):
    b, d, rows, columns, c, t = m.size(), m.size(1), m.size(1, 5), m.size(1, 5), m.size(1), m.dtype()
    patches, rank_stride = m.size(1, 4), m.size(0, 2)
    group = d - (patches - 1) * rank_stride
    if group < 1:
        patches, group = 1, d
    rivals, negatives = m.rng.randrange(c), m.rng.randrange(c)
    strides = (d * rows * columns, rows * columns, 1)
    if m.rng.random() < 0.5:  # channels last
        strides = (d * rows * columns, 1, d)
    side = m.size(1, 64)
    rule = [
        patches,
        m.rng.randint(1, group),
        rank_stride,
        rivals,
        negatives,
        m.size(1, 64),
        m.size(1, 64),
        side,
    ]
    given = m.matrix(b * d * rows * columns, t), t, strides, m.f32(b * c), m.i64(b, c), m.f32(c * d)
    out = m.out(b * patches * 4), m.out_i64(b * negatives)
    return *given, (b, d, rows, columns, c), rule, m.rng.random() < 0.5, *out, m.threads()


def _anchored(m: Memory):
    items = []
    for _ in range(m.rng.randint(0, 3)):
        n, t, u = m.size(), m.dtype(), m.dtype()
        items.append((m.matrix(n, t), t, m.rng.choice((NONE, m.matrix(n, u))), u, n))
    return items


@case
def l2_sp_forward(m: Memory):
    return _anchored(m), m.threads()


@case
def l2_sp_backward(m: Memory):
    items = _anchored(m)
    return items, [m.out(n, t) for _, t, _, _, n in items], m.number(), m.threads()


@case
def lerp_from_bf16(m: Memory):
    sizes = [m.size() for _ in range(m.rng.randint(0, 3))]
    return [(m.address(m._floats(n)), m.matrix(n, 1), n) for n in sizes], m.number(), m.threads()


@case
def patch_match_info_nce(m: Memory):
    b, c, k, p, d, count, t = (
        m.size(),
        m.size(1),
        m.size(),
        m.rng.randint(1, 4),
        m.size(1),
        m.size(0, 4),
        m.dtype(),
    )
    given = m.f32(b * p * d), m.f32(b * p * d), m.i64(b, c), m.matrix(c * k * p * d, t), t, m.u8(c * k)
    picked = m.i64(b * count, c), m.i64(b * (1 + k), 3)
    rule = abs(m.number()), m.rng.randint(1, p * p), abs(m.number()), m.rng.randint(1, 4)
    out = m.out(b), m.rng.choice((NONE, m.out(b * p * d)))
    return *given, *picked, *rule, *out, b, c, k, p, d, count, m.threads()


@case
def queue_info_nce_workspace(m: Memory):
    return m.size(), m.size(), m.size(1), m.rng.random() < 0.5, m.threads()


@case
def queue_info_nce(m: Memory):
    b, n, d, t, threads = m.size(), m.size(), m.size(1), m.dtype(), m.threads()
    queries = m.f32(b * d), m.rng.choice((NONE, m.f32(b * d))), m.i64(b, 4)
    queue = m.matrix(n * d, t), t, m.i64(n, 4)
    results = m.out(b), m.out(b), m.rng.choice((NONE, m.out(b * d))), m.rng.choice((NONE, m.out(b * d)))
    # a gradient of the own key exists only where there is one
    results = (*results[:3], results[3] if queries[1] and results[2] else NONE)
    needed = MODULE.queue_info_nce_workspace(b, n, d, results[2] != 0, threads)
    return queries, queue, (b, n, d), m.number(), results, m.out(needed), threads


MODULE: ModuleType


def load(folder: Path) -> ModuleType:
    (file,) = folder.glob("_C*.so")
    spec = importlib.util.spec_from_file_location("_C", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _numbers(value: Any, place: tuple[int, ...] = ()) -> Any:
    """Places of whole numbers: sizes, strides, codes, counts."""
    for at, inner in enumerate(value):
        if isinstance(inner, tuple | list):
            yield from _numbers(inner, (*place, at))
        elif isinstance(inner, int) and not isinstance(inner, bool | Address):
            yield (*place, at)


def _with(value: Any, place: tuple[int, ...], new: Any) -> Any:
    first, *rest = place
    changed = list(value)
    changed[first] = _with(changed[first], tuple(rest), new) if rest else new
    return type(value)(changed)


def refused(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bool:
    try:
        function(*arguments)
    except (ValueError, TypeError):
        return True
    return False


def main() -> int:
    global MODULE
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*")
    options = parser.parse_args()
    MODULE = load(options.folder)
    capabilities = MODULE.cpu_capabilities()
    functions = {name for name in dir(MODULE) if not name.startswith("_")} - {
        "cpu_capability", "cpu_capabilities", "set_cpu_capability",
    }  # fmt: skip
    assert functions == set(CASES), f"no case, or no function, for {sorted(functions ^ set(CASES))}"
    assert refused(MODULE.set_cpu_capability, ("pentium",))
    counts: Counter[str] = Counter()
    end = time.monotonic() + options.seconds
    for number in itertools.count():
        if number >= 50 and time.monotonic() > end:
            break
        MODULE.set_cpu_capability(capabilities[number % len(capabilities)])
        for name in options.only or sorted(CASES):
            rng = random.Random(f"{options.seed} {number} {name}")
            function = getattr(MODULE, name)
            print(f"{name} {options.seed} {number}", file=sys.stderr)  # the last line where the process dies
            memory = Memory(rng)
            arguments = CASES[name](memory)
            # a temperature of NaN and the like may be refused; what is taken must stay inside its buffers
            counts["calls"] += not refused(function, arguments)
            places = list(_numbers(arguments))
            wrong = _with(arguments, rng.choice(places), rng.choice(_WRONG_SIZES)) if places else arguments
            counts["wrong numbers refused"] += refused(function, wrong)
            counts["wrong arguments refused"] += refused(function, arguments[:-1])
    print(f"{len(CASES)} functions, " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
