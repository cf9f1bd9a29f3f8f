"""ema_: every implementation against the formula in float64, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import IMPLEMENTATIONS
from torch import Tensor

from mooring_kernels import ema_

SHAPES = [(), (0,), (3,), (5, 7), (2, 3, 4, 5), (40_001,)]


def draw(
    generator: torch.Generator, source: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor]]:
    targets = [torch.randn(shape, generator=generator) for shape in SHAPES]
    sources = [torch.randn(shape, generator=generator).to(source) for shape in SHAPES]
    return targets, sources


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_against_the_formula(
    impl: Any,
    source: torch.dtype,
    momentum: float,
    as_tensor: bool,
    generator: torch.Generator,
    assert_within: Any,
    guard: Any,
) -> None:
    targets, sources = draw(generator, source)
    targets = [guard(t) for t in targets]
    before = [t.clone() for t in targets]
    given = torch.tensor(momentum, dtype=torch.float64) if as_tensor else momentum
    ema_(targets, sources, given, impl=impl)
    for t, old, s in zip(targets, before, sources, strict=True):
        expected = momentum * old.double() + (1 - momentum) * s.double()
        assert_within(t, expected, operations=4, magnitude=old.abs() + s.float().abs())
        if momentum in (0.0, 1.0):
            assert torch.equal(t, old if momentum == 1.0 else s.float())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_mixed_list(impl: Any, generator: torch.Generator) -> None:
    """Buffers are copied, float64 stays float64, layouts may differ; the sources' gradients stay out of it."""
    image = torch.randn(2, 3, 4, 5, generator=generator)
    flat = torch.zeros(12)
    targets = [
        torch.tensor(7),
        torch.tensor([True, False]),
        torch.zeros(4, dtype=torch.float64),
        torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.zeros(2, 3, 4, 5),
        flat[:5],
        flat[5:9],
        torch.zeros(6, 4).T,
    ]
    sources = [
        torch.tensor(9),
        torch.tensor([False, True]),
        torch.ones(4),
        image.bfloat16().to(memory_format=torch.channels_last),
        image.to(memory_format=torch.channels_last).bfloat16(),
        torch.ones(5, requires_grad=True),
        torch.ones(4, dtype=torch.bfloat16),
        torch.arange(24.0).reshape(4, 6).bfloat16(),
    ]
    ema_(targets, sources, 0.75, impl=impl)
    assert targets[0].item() == 9 and targets[1].tolist() == [False, True]
    assert targets[2].tolist() == [0.25] * 4 and targets[2].dtype == torch.float64
    for t in targets[3:5]:
        assert torch.equal(t, 0.25 * image.bfloat16().float())
    assert flat.tolist() == [0.25] * 9 + [0.0] * 3
    assert torch.equal(targets[7], torch.arange(24.0).reshape(4, 6) / 4)
    assert not flat.requires_grad


def test_a_thousand_small_steps_arrive(generator: torch.Generator) -> None:
    """What a bf16 average cannot do: at m = 0.999 it would still stand where it began."""
    target, source = torch.ones(33), torch.full((33,), 1.5, dtype=torch.bfloat16)
    for _ in range(1000):
        ema_([target], [source], 0.999)
    torch.testing.assert_close(target, torch.full((33,), 1.5 - 0.5 * 0.999**1000), rtol=0, atol=1e-4)
    coarse = [torch.ones(3, dtype=torch.bfloat16)]
    with pytest.raises(
        TypeError, match=r"targets\[0\] must be float32; got torch.bfloat16: at momentum 0.999"
    ):
        ema_(coarse, [torch.full((3,), 1.5)], 0.999)
    ema_(coarse, [torch.full((3,), 1.5)], 0.999, allow_low_precision=True)
    assert coarse[0].tolist() == [1.0] * 3
    ema_(coarse, [torch.full((3,), 1.5)], 0.5, allow_low_precision=True)
    assert coarse[0].tolist() == [1.25] * 3


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 50), min_size=1, max_size=5),
    momentum=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_one_list_or_one_by_one(sizes: list[int], momentum: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    start = [torch.randn(n, generator=generator) for n in sizes]
    sources = [torch.randn(n, generator=generator).bfloat16() for n in sizes]
    together, alone = [t.clone() for t in start], [t.clone() for t in start]
    ema_(together, sources, momentum, impl="native")
    for t, s in zip(alone, sources, strict=True):
        ema_([t], [s], momentum, impl="native")
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_shared_memory_is_named() -> None:
    flat = torch.zeros(10)
    with pytest.raises(
        ValueError, match=r"targets\[0\] and targets\[2\] share memory: list tied weights once"
    ):
        ema_([flat[4:8], torch.zeros(1), flat[:5]], [torch.zeros(4), torch.zeros(1), torch.zeros(5)], 0.9)


def test_nothing_to_do() -> None:
    ema_([], [], 0.9)
