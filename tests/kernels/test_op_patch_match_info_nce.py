"""patch_match_info_nce: every implementation against loops over images and key sets in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patch_match_definition import Problem, definition, draw
from torch import Tensor

from mooring_kernels import _C, patch_match_info_nce

# B, C, K, P, D, M; likeness of a class's patches; options
SHAPES: list[tuple[tuple[int, int, int, int, int, int], float, dict[str, float]]] = [
    ((3, 4, 5, 9, 33, 3), 0.0, {}),
    ((2, 3, 6, 9, 20, 4), 3.0, {}),  # matched patches: plans near permutations
    ((2, 3, 3, 9, 16, 2), 9.0, {"epsilon": 0.004}),  # entries down to e^-250
    ((2, 2, 3, 4, 7, 2), 0.0, {"rounds": 1, "epsilon": 0.1, "negatives_per_set": 16}),
    ((2, 3, 2, 3, 5, 2), 0.0, {"rounds": 7}),  # fewer entries than negatives_per_set
    ((2, 2, 1, 1, 1, 1), 0.0, {}),
    ((2, 3, 0, 2, 5, 2), 0.0, {}),
    ((2, 2, 2, 11, 24, 1), 1.0, {"negatives_per_set": 4, "temperature": 0.5}),
]

RUNNABLE = ["reference", "native"]  # Triton: test_triton_patch_match_info_nce.py


def value_and_gradient(problem: Problem, impl: Any, upstream: float) -> tuple[Tensor, Tensor]:
    query = problem.query.clone().requires_grad_()
    loss = patch_match_info_nce(query, *list(problem)[1:], **problem.options, impl=impl)  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(upstream * loss, query)
    assert loss.shape == () and loss.dtype == torch.float32 and grad.dtype == query.dtype
    return loss.detach(), grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape[0])))
def test_forward_and_backward(
    shape: Any, dtype: torch.dtype, generator: torch.Generator, device: torch.device, assert_within: Any
) -> None:
    sizes, likeness, options = shape
    problem = draw(sizes, generator, likeness=likeness, dtype=dtype, **options)
    exact = problem.to(torch.float64)
    query = exact.query.clone().requires_grad_()
    expected = definition(replace(exact, query=query))
    (expected_grad,) = torch.autograd.grad(-1.7 * expected, query)
    moved = problem.to(device)
    width, largest = sizes[4], 1 / problem.temperature
    # a cosine is a sum of D terms; the softmax turns the logits' absolute error into a relative one
    operations = 2 * width**0.5 + 16
    for impl in RUNNABLE:  # one definition serves all
        loss, grad = value_and_gradient(moved, impl, -1.7)
        assert_within(loss, expected.detach(), operations=operations, magnitude=2 * largest)
        assert_within(grad, expected_grad, operations=operations, magnitude=1.7 * largest * (1 + largest))


def small(generator: torch.Generator, **options: float) -> Problem:
    return draw((3, 4, 3, 4, 9, 2), generator, epsilon=0.05, **options)  # type: ignore[misc]


@pytest.mark.parametrize("impl", RUNNABLE)
def test_no_valid_row_gives_zero_with_zero_gradients(impl: Any, generator: torch.Generator) -> None:
    problem = replace(small(generator), labels=torch.tensor([-1, 4, -7]))
    problem.query[1] = float("nan")
    loss, grad = value_and_gradient(problem, impl, 1.0)
    assert loss.item() == 0
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("impl", RUNNABLE)
def test_a_nan_is_not_hidden(impl: Any, generator: torch.Generator) -> None:
    problem = small(generator)
    problem.query[0, 2, 3] = float("nan")
    assert value_and_gradient(problem, impl, 1.0)[0].isnan()


def test_logits_may_rise_beyond_the_range_of_exp(generator: torch.Generator) -> None:
    """From group to group of key sets by over 103: what was summed before is then 0 in fp32, and must not stay."""

    def unit(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=-1)

    classes, slots = 80, 8  # more groups than slabs, so that a slab has several
    problem = Problem(
        unit(6, 2, 8),
        unit(6, 2, 8),
        torch.zeros(6, dtype=torch.int64),
        unit(classes, slots, 2, 8),
        torch.ones(classes, slots, dtype=torch.bool),
        torch.arange(classes).repeat(6, 1),
        torch.zeros(6, 1 + slots, dtype=torch.int64),
        temperature=0.0005,
        negatives_per_set=1,
        rounds=5,
    )
    (loss, grad), (expected, expected_grad) = (
        value_and_gradient(problem, impl, 1.0) for impl in ("native", "reference")
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-3 * float(expected_grad.abs().max()))


@pytest.mark.parametrize("impl", RUNNABLE)
def test_equal_entries_rank_by_flat_index(impl: Any) -> None:
    """All patches equal but for a part the query does not see: the pick names the query patch 0, 1 or 2's row."""
    query = torch.eye(4)[:1].repeat(3, 1)[None]
    own_key = query.clone()
    for pick in range(3):
        problem = Problem(
            query,
            own_key + torch.arange(3)[:, None] * torch.eye(4)[3],
            torch.zeros(1, dtype=torch.int64),
            torch.eye(4)[None, None, 1:].clone(),
            torch.ones(1, 1, dtype=torch.bool),
            torch.full((1, 1), -1),
            torch.tensor([[pick, 0]]),
        )
        _, grad = value_and_gradient(problem, impl, 1.0)
        # entries 0, 1, 2 are (patch 0, key 0 .. 2): key b carries b in its last component
        assert grad[0, 1:].count_nonzero() == 0
        share = torch.sigmoid(torch.tensor(1 / 0.07)) - 0.5
        torch.testing.assert_close(grad[0, 0, 3], share * pick / 0.07)


@pytest.mark.parametrize("impl", RUNNABLE)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000))
def test_relabelling_and_row_permutation_change_nothing(impl: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    problem = small(generator)
    loss, grad = value_and_gradient(problem, impl, 1.0)
    rows, names = torch.randperm(3, generator=generator), torch.randperm(4, generator=generator)
    new_name = torch.cat([names.argsort(), torch.tensor([4, -1])])  # indices 4 and -1 stay no class
    renamed = replace(
        problem,
        query=problem.query[rows],
        own_key=problem.own_key[rows],
        labels=new_name[problem.labels[rows]],
        queue=problem.queue[names],
        queue_valid=problem.queue_valid[names],
        negative_classes=new_name[problem.negative_classes[rows]],
        positive_pick=problem.positive_pick[rows],
    )
    renamed_loss, renamed_grad = value_and_gradient(renamed, impl, 1.0)
    torch.testing.assert_close(renamed_loss, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(renamed_grad, grad[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", RUNNABLE)
def test_splitting_the_batch_gives_the_weighted_mean(impl: Any, generator: torch.Generator) -> None:
    problem = replace(small(generator), labels=torch.tensor([3, 1, 0]))

    def part(rows: slice) -> Problem:
        names = ("query", "own_key", "labels", "negative_classes", "positive_pick")
        return replace(problem, **{name: getattr(problem, name)[rows] for name in names})

    whole, first, rest = (
        value_and_gradient(p, impl, 1.0)[0] for p in (problem, part(slice(1)), part(slice(1, 3)))
    )
    torch.testing.assert_close(whole, (first + 2 * rest) / 3, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", RUNNABLE)
def test_only_the_query_gets_a_gradient_and_layout_does_not_matter(
    impl: Any, generator: torch.Generator
) -> None:
    problem = small(generator)
    expected = value_and_gradient(problem, impl, 1.0)
    strided = replace(
        problem,
        query=problem.query.transpose(1, 2).contiguous().transpose(1, 2),
        own_key=problem.own_key.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_(),
        queue=problem.queue.transpose(0, 3).contiguous().transpose(0, 3).requires_grad_(),
        queue_valid=problem.queue_valid.T.contiguous().T,
        positive_pick=problem.positive_pick.T.contiguous().T,
    )
    for got, want in zip(value_and_gradient(strided, impl, 1.0), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    loss = patch_match_info_nce(*strided, **strided.options, impl=impl)  # type: ignore[arg-type, misc]
    assert not loss.requires_grad or impl == "reference"


def test_more_patches_than_the_kernels_take_run_by_the_reference(generator: torch.Generator) -> None:
    problem = draw((1, 2, 1, 17, 24, 1), generator, epsilon=0.1)
    loss = patch_match_info_nce(*problem, **problem.options)  # type: ignore[arg-type, misc]
    assert loss.isfinite()
    with pytest.raises(ValueError, match=r"impl='native' takes P <= 16; got 17"):
        patch_match_info_nce(*problem, impl="native")  # type: ignore[misc]


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(1)

    def unit(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)

    problem = Problem(
        unit(3, 9, 12),
        unit(3, 9, 12),
        torch.tensor([0, 5, 7]),
        unit(8, 40, 9, 12),
        torch.ones(8, 40, dtype=torch.bool),
        torch.arange(8).repeat(3, 1),
        torch.zeros(3, 41, dtype=torch.int64),
    )
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(value_and_gradient(problem, "native", 1.0))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_every_instruction_set_selects_the_same_pairs(generator: torch.Generator) -> None:
    problem = draw((2, 3, 6, 9, 20, 4), generator, likeness=2.0)
    before, results = _C.cpu_capability(), []
    try:
        for name in _C.cpu_capabilities():
            _C.set_cpu_capability(name)
            results.append(value_and_gradient(problem, "native", 1.0))
    finally:
        _C.set_cpu_capability(before)
    for loss, grad in results:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, results[0][1], rtol=1e-4, atol=1e-5)


def test_each_rows_own_loss(generator: torch.Generator) -> None:
    problem = draw((5, 4, 3, 4, 12, 2), generator)
    labels = torch.tensor([0, 1, -1, 2, 3])
    rows = [problem.query, problem.own_key, labels, *list(problem)[3:]]
    for impl in RUNNABLE:
        options: dict[str, Any] = {**problem.options, "impl": impl}
        each = patch_match_info_nce(*rows, **options, reduction="none")  # type: ignore[arg-type]
        assert each.shape == (5,) and each[2] == 0
        torch.testing.assert_close(each.sum() / 4, patch_match_info_nce(*rows, **options))  # type: ignore[arg-type]
