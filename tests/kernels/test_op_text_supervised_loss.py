"""text_supervised_loss: every implementation against the two-softmax definition in float64, and its properties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from implementations import IMPLEMENTATIONS
from torch import Tensor

from mooring_kernels import text_supervised_loss


def definition(
    logits: Tensor, cosines: Tensor, labels: Tensor, tau: float, lambda_v: float, lambda_t: float
) -> Tensor:
    """Two cross-entropies row by row, the first against a target that is written out."""
    total, count = (logits.sum() + cosines.sum()) * 0, 0
    for row, cosine, label in zip(logits, cosines, labels.tolist(), strict=True):
        if not 0 <= label < len(row):
            continue
        onehot = torch.nn.functional.one_hot(torch.tensor(label), len(row))
        target = (1 - lambda_v) * onehot + lambda_v * torch.softmax(cosine.detach() / tau, 0)
        torch.testing.assert_close(target.sum(), torch.ones_like(target.sum()))
        text_loss = -torch.log_softmax(cosine / tau, 0)[label]
        total = total - (target * torch.log_softmax(row, 0)).sum() + lambda_t * text_loss
        count += 1
    return total / max(count, 1)


def draw(
    batch: int,
    classes: int,
    generator: torch.Generator,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
) -> tuple[Tensor, Tensor, Tensor]:
    logits = (2 * torch.randn(batch, classes, generator=generator)).to(dtypes[0])
    cosines = (2 * torch.rand(batch, classes, generator=generator) - 1).to(dtypes[1])
    return logits, cosines, torch.randint(-1, classes + 1, (batch,), generator=generator)


def with_gradients(
    inputs: tuple[Tensor, Tensor, Tensor],
    options: tuple[float, float, float],
    call: Any,
    upstream: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    logits, cosines = (t.detach().clone().requires_grad_() for t in inputs[:2])
    loss = call(logits, cosines, inputs[2], *options)
    return (loss.detach(), *torch.autograd.grad(upstream * loss, (logits, cosines)))


def by(impl: Any) -> Any:
    return lambda *arguments: text_supervised_loss(*arguments, impl=impl)


FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("options", [(0.03, 0.1, 0.3), (0.01, 0.3, 1.0), (1.0, 1.0, 0.5)], ids=str)
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, FP32), (BF16, BF16)], ids=["fp32", "mixed", "bf16"])
@pytest.mark.parametrize("shape", [(5, 2), (7, 100), (1, 1), (3, 1000)], ids="B{0[0]}-C{0[1]}".format)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_forward_and_backward(
    impl: Any,
    shape: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    options: tuple[float, float, float],
    generator: torch.Generator,
    assert_within: Any,
) -> None:
    inputs = draw(*shape, generator, dtypes)
    inputs[2][0] = shape[1] - 1
    check_against_definition(impl, inputs, options, assert_within)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_many_classes(impl: Any, generator: torch.Generator, assert_within: Any) -> None:
    """C = 21841 takes several blocks of columns and ends within a vector."""
    logits, cosines, _ = draw(2, 21841, generator)
    check_against_definition(
        impl, (logits, cosines, torch.tensor([21840, 5000])), (0.01, 0.2, 0.4), assert_within
    )


def check_against_definition(
    impl: Any, inputs: tuple[Tensor, Tensor, Tensor], options: tuple[float, float, float], assert_within: Any
) -> None:
    tau, _, lambda_t = options
    given_before = [t.clone() for t in inputs]
    loss, *grads = with_gradients(inputs, options, by(impl), -1.7)
    exact_inputs = (inputs[0].double(), inputs[1].double(), inputs[2])
    exact, *exact_grads = with_gradients(exact_inputs, options, definition, -1.7)
    # a sum of C terms rounds some sqrt(C) times, a logit and a cosine / tau once each by their own size
    operations = inputs[0].shape[1] ** 0.5 + 24
    magnitude = 20.0 + 2.0 / tau
    assert loss.dtype == FP32 and loss.shape == ()
    assert_within(loss, exact, operations=operations, magnitude=magnitude)
    for grad, exact_grad, source, slope in zip(
        grads, exact_grads, inputs[:2], (1.7, 1.7 * lambda_t / tau), strict=True
    ):
        assert grad.dtype == source.dtype
        # an error of a log-sum-exp is a relative error of probabilities, which are at most 1
        assert_within(grad, exact_grad, operations=operations, magnitude=slope * magnitude)
    assert all(torch.equal(a, b) for a, b in zip(inputs, given_before, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_without_text_it_is_cross_entropy_and_forbidden_classes_stay_finite(
    impl: Any, generator: torch.Generator
) -> None:
    logits, cosines, labels = draw(6, 37, generator)
    labels = labels.clamp(0, 35)
    logits[:, 36] = -torch.inf
    loss, grad, text_grad = with_gradients((logits, cosines, labels), (0.03, 0.0, 0.0), by(impl))
    leaf = logits.requires_grad_()
    plain = torch.nn.functional.cross_entropy(leaf, labels)
    torch.testing.assert_close(loss, plain.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, torch.autograd.grad(plain, leaf)[0], rtol=1e-5, atol=1e-7)
    assert not text_grad.any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_target_sends_nothing_into_the_cosines(impl: Any, generator: torch.Generator) -> None:
    inputs = draw(5, 9, generator)
    for lambda_v in (0.1, 1.0):
        assert not with_gradients(inputs, (0.03, lambda_v, 0.0), by(impl))[2].any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_masked_rows_count_for_nothing(impl: Any, generator: torch.Generator) -> None:
    logits, cosines, labels = draw(6, 11, generator)
    labels[:] = torch.tensor([3, -1, 10, 11, -100, 0])
    kept = [0, 2, 5]
    loss, *grads = with_gradients((logits, cosines, labels), (0.03, 0.1, 0.3), by(impl))
    alone, *alone_grads = with_gradients(
        (logits[kept], cosines[kept], labels[kept]), (0.03, 0.1, 0.3), by(impl)
    )
    torch.testing.assert_close(loss, alone, rtol=1e-6, atol=0)
    for grad, alone_grad in zip(grads, alone_grads, strict=True):
        assert not grad[[1, 3, 4]].any()
        torch.testing.assert_close(grad[kept], alone_grad, rtol=1e-5, atol=1e-7)
    for rows in (slice(1, 2), slice(0, 0)):  # none valid; none at all
        results = with_gradients((logits[rows], cosines[rows], labels[rows]), (0.03, 0.1, 0.3), by(impl))
        assert not any(result.any() for result in results)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_masked_rows_are_not_read_and_a_nan_shows(impl: Any, generator: torch.Generator) -> None:
    logits, cosines, _ = draw(3, 37, generator)
    logits[0], cosines[0] = torch.nan, torch.nan
    options = (0.03, 0.1, 0.3)
    masked = with_gradients((logits, cosines, torch.tensor([-1, 4, 36])), options, by(impl))
    assert all(result.isfinite().all() for result in masked)
    for logit_row, cosine_row in ((0, 1), (1, 0)):  # a NaN in either row of two
        pair = (logits[[logit_row]], cosines[[cosine_row]], torch.tensor([4]))
        assert with_gradients(pair, options, by(impl))[0].isnan()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_small_cosines_at_a_low_temperature_do_not_underflow(impl: Any, generator: torch.Generator) -> None:
    """(1 - v) / tau is 1000 here, exp(-1000) is 0 in fp32 and in fp64; and a cosine may exceed 1 by rounding."""
    logits, cosines, labels = draw(4, 20, generator)
    labels = labels.clamp(0, 19)
    for inputs in ((logits, 0.001 * cosines, labels), (logits, cosines.sign() * (1 + 2.0**-20), labels)):
        got = with_gradients(inputs, (1e-3, 0.1, 0.3), by(impl))
        exact = with_gradients((inputs[0].double(), inputs[1].double(), labels), (1e-3, 0.1, 0.3), definition)
        for result, expected in zip(got, exact, strict=True):
            torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-3)
    tiny = text_supervised_loss(logits, cosines, labels, 1e-9, 0.1, 0.3, impl=impl)
    assert torch.equal(tiny, text_supervised_loss(logits, cosines, labels, 1e-3, 0.1, 0.3, impl=impl))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.integers(1, 5), classes=st.integers(1, 40), seed=st.integers(0, 99), shift=st.floats(-50, 50))
def test_permutation_shift_and_split(impl: Any, batch: int, classes: int, seed: int, shift: float) -> None:
    """Order of rows and names of classes are free; a shift of a row's logits changes nothing; means add up."""
    generator = torch.Generator().manual_seed(seed)
    logits, cosines, labels = draw(batch, classes, generator)
    options = (0.05, 0.3, 0.7)
    loss, *grads = with_gradients((logits, cosines, labels), options, by(impl))
    rows, names = torch.randperm(batch, generator=generator), torch.randperm(classes, generator=generator)
    inverse = torch.empty_like(names)
    inverse[names] = torch.arange(classes)
    valid = (labels >= 0) & (labels < classes)
    renamed = torch.where(valid, inverse[labels.clamp(0, classes - 1)], labels)[rows]
    moved = (logits[rows][:, names] + shift, cosines[rows][:, names], renamed)
    moved_loss, *moved_grads = with_gradients(moved, options, by(impl))
    torch.testing.assert_close(moved_loss, loss, rtol=1e-4, atol=2e-5)
    for moved_grad, grad in zip(moved_grads, grads, strict=True):
        torch.testing.assert_close(moved_grad, grad[rows][:, names], rtol=1e-4, atol=1e-4)
    cut = batch // 2
    parts = [
        text_supervised_loss(logits[part], cosines[part], labels[part], *options, impl=impl)
        * valid[part].sum()
        for part in (slice(0, cut), slice(cut, batch))
    ]
    torch.testing.assert_close(sum(parts) / valid.sum().clamp_min(1), loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strides_autocast_and_only_the_gradients_that_are_asked_for(
    impl: Any, generator: torch.Generator
) -> None:
    logits, cosines, labels = draw(8, 12, generator)
    options = (0.03, 0.1, 0.3)
    expected = with_gradients((logits, cosines, labels), options, by(impl))
    spread = torch.stack([logits, cosines], 2)
    with torch.autocast("cpu", dtype=BF16):
        strided = text_supervised_loss(
            spread[:, :, 0], cosines.T.contiguous().T, labels.repeat_interleave(2)[::2], *options, impl=impl
        )
    assert torch.equal(strided, expected[0])
    for wanted in (0, 1):
        leaves = [logits.clone(), cosines.clone()]
        leaves[wanted].requires_grad_()
        loss = text_supervised_loss(*leaves, labels, *options, impl=impl)
        assert torch.equal(torch.autograd.grad(loss, leaves[wanted])[0], expected[1 + wanted])


def test_bf16_logits_cost_less_than_a_thousandth(generator: torch.Generator) -> None:
    logits, cosines, labels = draw(64, 100, generator)
    exact = text_supervised_loss(logits, cosines, labels, 0.03, 0.1, 0.3)
    rounded = text_supervised_loss(logits.bfloat16(), cosines, labels, 0.03, 0.1, 0.3)
    assert (rounded - exact).abs() < 1e-3 * exact


def test_a_given_target_replaces_the_label(generator: torch.Generator) -> None:
    logits, cosines, labels = draw(5, 6, generator)
    labels[:] = torch.tensor([0, 3, -1, 5, 2])
    onehot = torch.nn.functional.one_hot(labels.clamp_min(0), 6).float()
    options = (0.05, 0.2, 0.4)
    expected = with_gradients((logits, cosines, labels), options, by("reference"))
    got = with_gradients(
        (logits, cosines, labels), options, lambda *a: text_supervised_loss(*a, target=onehot)
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    mixed = 0.3 * onehot + 0.7 * onehot.roll(1, 1)
    rolled = torch.where(labels < 0, -1, (labels + 1) % 6)
    blend = 0.3 * expected[0] + 0.7 * text_supervised_loss(logits, cosines, rolled, *options)
    loss = text_supervised_loss(logits, cosines, labels, *options, target=mixed)
    torch.testing.assert_close(loss, blend, rtol=1e-5, atol=1e-6)  # linear in the target
    with pytest.raises(ValueError, match="target needs impl='auto' or 'reference'; got 'native'"):
        text_supervised_loss(logits, cosines, labels, *options, target=mixed, impl="native")
