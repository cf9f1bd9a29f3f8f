"""What holds for every op: torch.library's own checks, torch.compile, choice of implementation, messages."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from implementations import draw_bank
from torch import Tensor

import mooring_kernels
from mooring_kernels import (
    bank_cross_entropy,
    batchnorm_statistics,
    calibrate,
    channel_attention,
    class_ring_push_,
    class_statistics,
    concept_boxes,
    convert_batchnorm_,
    cpu_capability,
    dr_tune_loss,
    ema_,
    l2_sp,
    patch_match_info_nce,
    procrustes_rotation,
    queue_info_nce,
    ring_push_,
    row_normalise,
    text_supervised_loss,
    two_head_cross_entropy,
)
from mooring_kernels.bank_cross_entropy import op as bank_cross_entropy_op
from mooring_kernels.batchnorm_statistics import op as batchnorm_statistics_op
from mooring_kernels.calibrate import op as calibrate_op
from mooring_kernels.class_ring_push import op as class_ring_push_op
from mooring_kernels.class_statistics import op as class_statistics_op
from mooring_kernels.concept_boxes import op as concept_boxes_op
from mooring_kernels.convert_batchnorm import op as convert_batchnorm_op
from mooring_kernels.dr_tune_loss import op as dr_tune_loss_op
from mooring_kernels.ema import op as ema_op
from mooring_kernels.l2_sp import op as l2_sp_op
from mooring_kernels.patch_match_info_nce import op as patch_match_info_nce_op
from mooring_kernels.procrustes_rotation import op as procrustes_rotation_op
from mooring_kernels.queue_info_nce import op as queue_info_nce_op
from mooring_kernels.ring_push import op as ring_push_op
from mooring_kernels.row_normalise import op as row_normalise_op
from mooring_kernels.text_supervised_loss import op as text_supervised_loss_op
from mooring_kernels.two_head_cross_entropy import op as two_head_cross_entropy_op

_C = pytest.importorskip("mooring_kernels._C")

FROZEN, TUNED, LABELS, HEAD = draw_bank(9, 6, 4, torch.Generator().manual_seed(3))
MAP, MAP_HEAD = torch.randn(2, 8, 2, 2), torch.randn(4, 8)
MAPS = MAP.to(memory_format=torch.channels_last)
# running mean, running variance, weight, bias of 6 channels; the order that convert_batchnorm_ takes
LAYER = (HEAD[0], HEAD[1].square() + 0.5, HEAD[2], HEAD[3])
LAYER_TENSORS = (LAYER[2], LAYER[3], LAYER[0], LAYER[1])
IMAGES = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(4)).to(
    memory_format=torch.channels_last
)
FEATURES, BIAS, ROTATION = FROZEN[:5] * 2, HEAD[:, 0] * 3, torch.eye(6)

# own keys, labels, queue, valid slots, negative classes and picks of five images of two patches
CONCEPTS = (
    TUNED[:5].reshape(5, 2, 3),
    LABELS[:5],
    torch.cat([FROZEN[:8], TUNED[:8]]).reshape(4, 4, 2, 3),
    torch.ones(4, 4, dtype=torch.bool),
    torch.tensor([[0, 1, 2, 3]] * 5),
    torch.ones(5, 5, dtype=torch.int64),
)


def fresh() -> dict[str, Tensor]:
    """Leaves of their own for each use."""
    return {
        name: t.clone().requires_grad_()
        for name, t in (("features", FEATURES), ("weight", 50 * HEAD), ("bias", BIAS))
    }


def opcheck_cases() -> list[Any]:
    leaf = fresh()
    head_rows = (leaf["features"], LABELS[:5], FROZEN, LABELS, leaf["weight"], leaf["bias"], 0.1)
    block = (leaf["features"], LABELS[:5], FROZEN, TUNED, LABELS, leaf["weight"], leaf["bias"])
    weight_alone = (FEATURES, *head_rows[1:5], BIAS, 0.1)
    cases = [
        (row_normalise_op._forward, (leaf["features"], 1e-12, "native")),
        (row_normalise_op._backward, (FEATURES, torch.ones(5), FEATURES, torch.ones(5), 1e-12, "native")),
        (
            ring_push_op._forward,
            (
                [torch.zeros(7, 6)],
                torch.zeros(7, dtype=torch.int64),
                [FEATURES],
                LABELS[:5],
                4,
                True,
                "native",
            ),
        ),
        (
            class_ring_push_op._forward,
            (
                *([torch.zeros(4, 2, 6)], torch.full((4, 2), -1), torch.zeros(4).long()),
                *([FEATURES], LABELS[:5], True, "native"),
            ),
        ),
        (class_statistics_op.class_statistics_forward, (FROZEN, TUNED, LABELS, HEAD, 1.0, "native")),
        (calibrate_op._forward, (FROZEN, TUNED, LABELS, HEAD, HEAD, ROTATION, torch.ones(()), "native")),
        (calibrate_op._forward, (FROZEN, TUNED, LABELS, HEAD, HEAD, None, torch.ones(()), "native")),
        (procrustes_rotation_op._forward, (FROZEN, TUNED, LABELS, 1e-3, "newton", True, False)),
        (procrustes_rotation_op._forward, (FROZEN, TUNED, LABELS, 1e-3, "polar", True, False)),
        (procrustes_rotation_op._forward, (FROZEN, TUNED, LABELS, 0.0, "svd", True, True)),
        (batchnorm_statistics_op._forward, (FEATURES, *LAYER, 1e-5, "native")),
        (batchnorm_statistics_op._forward, (IMAGES, *LAYER[:2], None, None, 1e-5, "native")),
        (batchnorm_statistics_op._forward, (IMAGES[:, :, 1:], *LAYER, 1e-5, "native")),
        (
            convert_batchnorm_op._convert,
            (*([t.clone()] for t in (*LAYER_TENSORS, *LAYER[:2])), [1e-5], 3.0),
        ),
        (bank_cross_entropy_op._forward, (*head_rows, True, [True, True, True], "native")),
        (
            dr_tune_loss_op._forward,
            (*block, ROTATION, torch.ones(()), 1.0, 0.1, True, [True, True, True], "native"),
        ),
        (bank_cross_entropy_op._forward, (*weight_alone, False, [False, True, False], "native")),
        (
            queue_info_nce_op._forward,
            (
                *(leaf["features"], leaf["features"].detach()[:, :] / 2, LABELS[:5], FROZEN, LABELS),
                *(0.1, [True, False], "native"),
            ),
        ),
        (
            queue_info_nce_op._forward,
            (FEATURES, leaf["features"], LABELS[:5], FROZEN, LABELS, 0.1, [False, True], "native"),
        ),
        (
            text_supervised_loss_op._forward,
            (leaf["features"], leaf["weight"].new_ones(5, 6), LABELS[:5], 0.03, 0.1, 0.3, "native"),
        ),
        (
            text_supervised_loss_op._backward,
            (
                *(FEATURES, FEATURES, LABELS[:5], torch.ones(()), torch.ones(5), torch.ones(5)),
                *(torch.ones(()), 0.03, 0.1, 0.3, [True, False], "native"),
            ),
        ),
        (
            two_head_cross_entropy_op._forward,
            (leaf["features"], LABELS[:5], leaf["weight"], LABELS[:4], torch.ones(()), 0.0, 0.1, "native"),
        ),
        (
            two_head_cross_entropy_op._backward,
            (
                *(FEATURES, LABELS[:5], HEAD, LABELS[:4], None, torch.ones(2), torch.ones(9)),
                *(torch.ones(()), None, torch.ones(()), 0.5, 0.1, [False, True], "native"),
            ),
        ),
        (
            concept_boxes_op._forward,
            (MAP, torch.randn(2, 4), LABELS[:2], MAP_HEAD, [2, 2, 1, 3, 2, 64, 64, 24, 1], "native"),
        ),
        (
            ema_op._forward,
            (
                [torch.zeros(5, 6), torch.zeros(3)],
                [FEATURES.bfloat16(), torch.ones(3)],
                torch.full((), 0.9, dtype=torch.float64),
                "native",
            ),
        ),
        (l2_sp_op._forward, ([leaf["features"], leaf["bias"]], [FEATURES + 1], [True, False], 0.1, "native")),
        (l2_sp_op._forward, ([leaf["weight"]], [], [False], 0.1, "triton")),
        (l2_sp_op._backward, ([FEATURES, BIAS], [FEATURES + 1], [True, False], torch.ones(()), "native")),
        *(
            # the gradient lies as the parameter does, whatever the anchor
            (l2_sp_op._backward, ([FEATURES.T, MAPS], [FEATURES.T.contiguous(), MAPS.contiguous()], *rest))
            for rest in (([True, True], torch.ones(()), impl) for impl in ("native", "triton"))
        ),
        (l2_sp_op._backward, ([FEATURES.T], [], [False], torch.ones(()), "native")),
        (
            patch_match_info_nce_op._forward,
            (leaf["features"].reshape(5, 2, 3), *CONCEPTS, 0.1, 4, 0.05, 5, True, "native"),
        ),
    ]
    return [
        pytest.param(op, arguments, id=f"{op._name}-{index}") for index, (op, arguments) in enumerate(cases)
    ]


@pytest.mark.parametrize("op,arguments", opcheck_cases())
def test_opcheck(op: Any, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(op, arguments)


def push(field: Tensor) -> Tensor:
    bank, labels = torch.zeros(7, 6), torch.full((7,), -1)
    head = ring_push_([bank], labels, [field], LABELS[:5], 4)
    return torch.cat([bank.flatten(), labels.float(), torch.full((1,), float(head))])


def averaged(x: Tensor) -> Tensor:
    targets = [torch.ones(5, 6), torch.ones(2, 6)]
    ema_(targets, [x, x[:2].bfloat16()], 0.75)
    return torch.cat(targets)


@torch.no_grad()
def statistics(x: Tensor) -> Tensor:
    return torch.cat([t.flatten() for t in batchnorm_statistics(x, *LAYER, impl="native")])


def convert(x: Tensor) -> Tensor:
    own = [[t.clone()] for t in LAYER_TENSORS]
    (ratio,) = convert_batchnorm_(*own, [x[0]], [x[1].square()], [1e-5])
    return torch.cat([ratio, *(t for (t,) in own)])


def push_by_class(field: Tensor) -> Tensor:
    bank, labels, heads = torch.zeros(4, 2, 6), torch.full((4, 2), -1), torch.zeros(4, dtype=torch.int64)
    slots = class_ring_push_([bank], labels, heads, [field], LABELS[:5])
    return torch.cat([bank.flatten(), labels.flatten().float(), heads.float(), slots.float()])


PROGRAMS: dict[str, Callable[[Tensor], Tensor]] = {
    "row_normalise": lambda x: torch.cat([t.flatten() for t in row_normalise(x)]),
    "ring_push_": push,
    "class_ring_push_": push_by_class,
    "class_statistics": lambda x: torch.cat(
        [t.flatten() for t in class_statistics(x, TUNED[:5], LABELS[:5], HEAD)]
    ),
    "batchnorm_statistics": statistics,
    "convert_batchnorm_": convert,
    "calibrate": lambda x: calibrate(x, TUNED[:5], LABELS[:5], HEAD, ROTATION, x.detach().norm(dim=1).mean()),
    "procrustes_rotation": lambda x: procrustes_rotation(x, TUNED[:5], LABELS[:5]),
    "dr_tune_loss": lambda x: dr_tune_loss(
        x, LABELS[:5], FROZEN, TUNED, LABELS, HEAD, BIAS, ROTATION, x.detach().norm(dim=1).mean()
    ),
    "concept_boxes": lambda x: torch.cat(
        [
            t.flatten().float()
            for t in concept_boxes(
                x.view(5, 6, 1, 1).expand(-1, -1, 2, 3),
                x[:, :4],
                LABELS[:5],
                HEAD,
                image_size=(64, 96),
                patches=2,
            )
        ]
    ),
    "channel_attention": lambda x: channel_attention(x.view(1, 5, 6)),
    "ema_": averaged,
    "l2_sp": lambda x: l2_sp([x, x[0]], [FEATURES, None], 0.3),
    "bank_cross_entropy": lambda x: bank_cross_entropy(
        x, LABELS[:5], FROZEN, LABELS, HEAD, BIAS, impl="native"
    ),
    "queue_info_nce": lambda x: queue_info_nce(x, x / 2, LABELS[:5], FROZEN, LABELS, 0.1),
    "text_supervised_loss": lambda x: text_supervised_loss(x, x / 4, LABELS[:5], 0.03, 0.1, 0.3),
    "two_head_cross_entropy": lambda x: sum(
        two_head_cross_entropy(x, LABELS[:5], 3 * x[:, :4], LABELS[:5], x.detach()[0, 0])[:2]
    ),
    "patch_match_info_nce": lambda x: patch_match_info_nce(x.view(5, 2, 3), *CONCEPTS, 0.1),
}


@pytest.mark.parametrize("name", list(PROGRAMS))
def test_compiles_in_one_graph(name: str) -> None:
    """`aot_eager` traces forward, backward, fakes and mutation as the full compiler does, without its C++."""
    results = []
    for program in (PROGRAMS[name], torch.compile(PROGRAMS[name], fullgraph=True, backend="aot_eager")):
        x = FEATURES.clone().requires_grad_()
        value = program(2 * x)
        if value.requires_grad:
            value.square().sum().backward()
        results.append((value.detach(), x.grad))
    (eager, eager_grad), (compiled, compiled_grad) = results
    assert torch.equal(eager, compiled)
    assert (eager_grad is None) == (compiled_grad is None)
    if eager_grad is not None:
        torch.testing.assert_close(eager_grad, compiled_grad)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: bank_cross_entropy(x, LABELS[:5], FROZEN, LABELS, HEAD, BIAS, impl="native"),
        lambda x: dr_tune_loss(x, LABELS[:5], FROZEN, TUNED, LABELS, HEAD, BIAS, None, 1.0),
        lambda x: queue_info_nce(x, x / 2, LABELS[:5], FROZEN, LABELS, 0.1),
        lambda x: patch_match_info_nce(x.view(5, 2, 3), *CONCEPTS, 0.1, negatives_per_set=4),
        lambda x: l2_sp([x], [None], 0.3),
        lambda x: text_supervised_loss(x, x / 4, LABELS[:5], 0.03, 0.1, 0.3),
        lambda x: two_head_cross_entropy(x, LABELS[:5], x, LABELS[:5], 0.5)[0],
    ],
    ids=["bank", "dr_tune", "queue", "patch_match", "l2_sp", "text", "two_head"],
)
def test_a_second_derivative_is_refused_not_left_out(loss: Callable[[Tensor], Tensor]) -> None:
    x = FEATURES.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"differentiated once|no autograd formula"):
        (grad,) = torch.autograd.grad(loss(x), x, create_graph=True)
        (x.sum() + grad.square().sum()).backward()


def test_every_op_is_covered_here() -> None:
    assert set(PROGRAMS) == set(mooring_kernels.__all__) - {"Impl", "cpu_capability"}


def test_float64_takes_the_reference_and_other_names_are_refused() -> None:
    unit, norm = row_normalise(FEATURES.double())
    assert unit.dtype == norm.dtype == torch.float64
    with pytest.raises(
        ValueError, match=r"impl='native' takes float32 and bfloat16; got \['torch.float64'\]"
    ):
        row_normalise(FEATURES.double(), impl="native")
    with pytest.raises(
        ValueError, match="row_normalise: impl must be one of auto, reference, native, triton; got 'cuda'"
    ):
        row_normalise(FEATURES, impl="cuda")  # type: ignore[arg-type]


def wrong_calls() -> list[Any]:
    ints = FEATURES.long()
    calls: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: row_normalise(FEATURES[0]), ValueError, r"x must be \[N, D\]; got \[6\] float32"),
        (
            lambda: row_normalise(ints),
            TypeError,
            r"x must be \[N, D\] float32 or bfloat16; got \[5, 6\] int64",
        ),
        (lambda: row_normalise(FEATURES, eps=0.0), ValueError, "eps must be > 0; got 0.0"),
        (lambda: row_normalise([1.0]), TypeError, "x must be a tensor"),  # type: ignore[arg-type]
        (
            lambda: class_statistics(FROZEN, TUNED[:3], LABELS, HEAD),
            ValueError,
            r"tuned must be \[9, 6\]; got \[3, 6\]",
        ),
        (
            lambda: class_statistics(FROZEN, TUNED, LABELS[:2], HEAD),
            ValueError,
            r"labels must be \[9\] int64, one label per row; got \[2\]",
        ),
        (
            lambda: class_statistics(FROZEN, TUNED, LABELS.int(), HEAD),
            TypeError,
            r"labels must be \[9\] int64; got \[9\] int32",
        ),
        (
            lambda: class_statistics(FROZEN, TUNED, LABELS, HEAD[:0]),
            ValueError,
            "C must be at least 1; got 0",
        ),
        (
            lambda: class_statistics(FROZEN, TUNED, LABELS, HEAD, -1.0),
            ValueError,
            "cga_scale must be finite and >= 0; got -1.0",
        ),
        (
            lambda: calibrate(FROZEN, TUNED, LABELS, HEAD, torch.eye(5), 1.0),
            ValueError,
            r"rotation must be \[6, 6\]; got \[5, 5\]",
        ),
        (
            lambda: calibrate(FROZEN, TUNED, LABELS, HEAD, None, torch.ones(1)),
            ValueError,
            r"scale must be \[\]; got \[1\]",
        ),
        (
            lambda: batchnorm_statistics(FEATURES, LAYER[0][:2], *LAYER[1:]),
            ValueError,
            r"running_mean must be \[6\]; got \[2\]",
        ),
        (
            lambda: batchnorm_statistics(FEATURES[:0], *LAYER),
            ValueError,
            "the number of values per channel must be at least 1; got 0",
        ),
        (lambda: batchnorm_statistics(FEATURES, *LAYER, eps=0.0), ValueError, "eps must be > 0; got 0.0"),
        (
            lambda: bank_cross_entropy(FEATURES, LABELS[:5], FROZEN[:, :4], LABELS, HEAD, None),
            ValueError,
            r"bank must be \[K, 6\]",
        ),
        (
            lambda: bank_cross_entropy(FEATURES, LABELS[:5], FROZEN, LABELS, HEAD, None, label_smoothing=1.5),
            ValueError,
            r"label_smoothing must be in \[0, 1\]; got 1.5",
        ),
        (
            lambda: bank_cross_entropy(FEATURES, LABELS[:5], FROZEN, LABELS, HEAD, BIAS[:2]),
            ValueError,
            r"bias must be \[4\]; got \[2\]",
        ),
        (
            lambda: queue_info_nce(FEATURES, FEATURES[:3], LABELS[:5], FROZEN, LABELS, 0.1),
            ValueError,
            r"own_key must be \[5, 6\]; got \[3, 6\]",
        ),
        (
            lambda: queue_info_nce(FEATURES, None, LABELS[:5], FROZEN, LABELS[:8], 0.1),
            ValueError,
            r"queue_labels must be \[9\] int64",
        ),
        (
            lambda: queue_info_nce(FEATURES, None, LABELS[:5], FROZEN, LABELS, 0.0),
            ValueError,
            "temperature must be finite and > 0; got 0.0",
        ),
        (
            lambda: text_supervised_loss(FEATURES, FROZEN, LABELS[:5], 0.03, 0.1, 0.3),
            ValueError,
            r"cosines must be \[5, 6\]; got \[9, 6\]",
        ),
        (
            lambda: text_supervised_loss(FEATURES, FEATURES, LABELS[:5], 0.0, 0.1, 0.3),
            ValueError,
            r"tau must be > 0; got 0.0",
        ),
        (
            lambda: text_supervised_loss(FEATURES, FEATURES, LABELS[:5], 0.03, 1.1, 0.3),
            ValueError,
            r"lambda_v must be in \[0, 1\]; got 1.1",
        ),
        (
            lambda: text_supervised_loss(FEATURES, FEATURES, LABELS[:5], 0.03, 0.1, -0.3),
            ValueError,
            "lambda_t must be finite and >= 0; got -0.3",
        ),
        (
            lambda: two_head_cross_entropy(FEATURES, LABELS[:5], HEAD, LABELS[:5], 0.5),
            ValueError,
            r"source_labels must be \[4\] int64",
        ),
        (
            lambda: two_head_cross_entropy(FEATURES, LABELS[:5], HEAD, LABELS[:4], torch.ones(1)),
            ValueError,
            r"source_weight must be \[\]; got \[1\]",
        ),
        (
            lambda: two_head_cross_entropy(FEATURES, LABELS[:5], HEAD[:, :0], LABELS[:4], 0.5),
            ValueError,
            "C_S must be at least 1; got 0",
        ),
        (
            lambda: patch_match_info_nce(
                FEATURES.view(5, 2, 3), *CONCEPTS[:3], CONCEPTS[3].int(), *CONCEPTS[4:], 1.0
            ),
            TypeError,
            r"queue_valid must be \[4, 4\] bool; got \[4, 4\] int32",
        ),
        (
            lambda: patch_match_info_nce(FEATURES.view(5, 2, 3), *CONCEPTS[:5], CONCEPTS[5][:, 1:], 1.0),
            ValueError,
            r"positive_pick must be \[5, 5\] int64; got \[5, 4\] int64",
        ),
        (
            lambda: patch_match_info_nce(FEATURES.view(5, 2, 3), *CONCEPTS, 0.0),
            ValueError,
            "temperature must be finite and > 0; got 0.0",
        ),
        (
            lambda: patch_match_info_nce(FEATURES.view(5, 2, 3), *CONCEPTS, 1.0, rounds=0),
            ValueError,
            "rounds must be at least 1; got 0",
        ),
        (
            lambda: ring_push_([FROZEN], LABELS, [FEATURES], LABELS[:5], 9),
            ValueError,
            r"head must be in 0..8; got 9",
        ),
        (
            lambda: ring_push_([FROZEN], LABELS, [], LABELS[:5], 0),
            ValueError,
            "equally long and not empty; got 1 and 0",
        ),
        (
            lambda: ring_push_([FROZEN.T], LABELS[:6], [FEATURES], LABELS[:5], 0),
            ValueError,
            r"fields\[0\] must be \[5, 9\]",
        ),
        (
            lambda: class_ring_push_(
                [FROZEN.view(3, 3, 6)], LABELS.view(3, 3), LABELS[:3], [FEATURES[:, :4]], LABELS[:5]
            ),
            ValueError,
            r"fields\[0\] must be \[5, 6\]; got \[5, 4\]",
        ),
        (
            lambda: class_ring_push_(
                [FROZEN.view(3, 3, 6)], LABELS.view(3, 3), LABELS[:2], [FEATURES], LABELS[:5]
            ),
            ValueError,
            r"heads must be \[3\] int64",
        ),
        (
            lambda: ring_push_([TUNED[:, :3]], LABELS, [FEATURES[:, :3]], LABELS[:5], 0),
            ValueError,
            "must be contiguous",
        ),
        (
            lambda: concept_boxes(MAP, MAP_HEAD[:2], LABELS[:2], MAP_HEAD, image_size=(64, 64)),
            ValueError,
            r"head_weight must be \[8, 8\]; got \[4, 8\]",
        ),
        (
            lambda: concept_boxes(
                MAP, MAP_HEAD[:2, :4], LABELS[:2], MAP_HEAD, image_size=(64, 64), group_width=3, rank_stride=1
            ),
            ValueError,
            r"must end within D = 8 channels; 9 groups of 3 with a rank_stride of 1 need 11",
        ),
        (
            lambda: concept_boxes(
                MAP,
                MAP_HEAD[:2, :4],
                LABELS[:2],
                MAP_HEAD,
                image_size=(64, 64),
                peak="middle",  # type: ignore[arg-type]
            ),
            ValueError,
            "peak must be one of corner, center; got 'middle'",
        ),
        (
            lambda: concept_boxes(MAP, MAP_HEAD[:2, :4], LABELS[:2], MAP_HEAD, image_size=(64, 0)),
            ValueError,
            "image width must be >= 1; got 0",
        ),
        (lambda: channel_attention(FEATURES), ValueError, r"x must be \[B, D, N\]; got \[5, 6\] float32"),
        (lambda: channel_attention(torch.ones(2, 3, 0)), ValueError, "N must be at least 1; got 0"),
        (
            lambda: ema_([FEATURES, BIAS], [FEATURES, BIAS[:2]], 0.9),
            ValueError,
            r"sources\[1\] must be \[4\] as its target; got \[2\]",
        ),
        (lambda: ema_([FEATURES], [], 0.9), ValueError, "equally many; got 1 and 0"),
        (lambda: ema_([FEATURES], [FEATURES], 1.5), ValueError, r"momentum must be in \[0, 1\]; got 1.5"),
        (
            lambda: ema_([FEATURES], [FEATURES], torch.ones(1)),
            ValueError,
            r"a number or a 0-d floating-point tensor; got \[1\] torch.float32",
        ),
        (
            lambda: ema_([ints], [FEATURES], 0.9),
            TypeError,
            r"targets\[0\] and its source must both be floating-point or both not; got torch.int64 and torch.float32",
        ),
        (
            lambda: ema_([BIAS, FEATURES], [BIAS, FEATURES.to("meta")], 0.9),
            ValueError,
            r"one device; got targets\[0\] on cpu, targets\[1\] on cpu, sources\[1\] on meta",
        ),
        (
            lambda: l2_sp([BIAS, FEATURES], [None, FEATURES[:2]], 0.1),
            ValueError,
            r"anchors\[1\] must be \[5, 6\] as its parameter; got \[2, 6\]",
        ),
        (lambda: l2_sp([BIAS], [], 0.1), ValueError, "equally many; got 1 and 0"),
        (lambda: l2_sp([BIAS], [None], -0.1), ValueError, "weight must be finite and >= 0; got -0.1"),
        (
            lambda: l2_sp([BIAS, ints], [None, None], 0.1),
            TypeError,
            r"parameters\[1\] must be float32 or bfloat16; got torch.int64",
        ),
        (
            lambda: l2_sp([BIAS], [BIAS.to("meta")], 0.1),
            ValueError,
            r"one device; got .*anchors\[0\] on meta",
        ),
    ]
    return [pytest.param(call, error, message, id=message[:30]) for call, error, message in calls]


@pytest.mark.parametrize("call,error,message", wrong_calls())
def test_wrong_arguments_are_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_tensors_on_two_devices_are_named() -> None:
    with pytest.raises(ValueError, match="one device; got frozen on cpu, tuned on meta"):
        class_statistics(FROZEN, TUNED.to("meta"), LABELS, HEAD)


def test_the_native_module_checks_what_it_is_given() -> None:
    with pytest.raises(ValueError, match=r"head must be in 0\.\.3; got 4"):
        _C.ring_push([], 8, 8, 4, 1, 4, True, 1)
    with pytest.raises(ValueError, match="B must be <= K = 4; got 5"):
        _C.ring_push([], 8, 8, 4, 5, 0, True, 1)
    with pytest.raises(ValueError, match=r"x must point to 6 elements; got a null address"):
        _C.row_normalise_forward(0, 0, 1e-12, 8, 8, 2, 3, 1)
    with pytest.raises(ValueError, match=r"dtype code must be 0 \(float32\) or 1 \(bfloat16\); got 2"):
        _C.row_normalise_forward(8, 2, 1e-12, 8, 8, 0, 3, 1)
    with pytest.raises(ValueError, match="ranks must end within D = 4; got 5"):
        _C.concept_boxes(8, 0, (4, 1, 1), 8, 8, 8, (1, 4, 1, 1, 2), [3, 1, 2, 1, 1, 9, 9, 3], False, 8, 8, 1)
    with pytest.raises(ValueError, match="rivals and negatives must be < C; got 2"):
        _C.concept_boxes(8, 0, (4, 1, 1), 8, 8, 8, (1, 4, 1, 1, 2), [1, 1, 0, 2, 1, 9, 9, 3], False, 8, 8, 1)
    with pytest.raises(ValueError, match=r"grads must be as many as parameters \(1\); got 0"):
        _C.l2_sp_backward([(8, 0, 0, 0, 1)], [], 1.0, 1)
    with pytest.raises(ValueError, match="source must point to 3 elements; got a null address"):
        _C.lerp_from_bf16([(8, 0, 3)], 0.5, 1)
    with pytest.raises(ValueError, match="threads must be >= 1; got 0"):
        _C.row_normalise_forward(8, 0, 1e-12, 8, 8, 0, 3, 0)


def test_all_capabilities_of_this_cpu_agree() -> None:
    before = cpu_capability()
    results = {}
    try:
        for name in _C.cpu_capabilities():
            _C.set_cpu_capability(name)
            assert cpu_capability() == name
            results[name] = torch.stack(
                [
                    bank_cross_entropy(FEATURES, LABELS[:5], FROZEN, LABELS, 50 * HEAD, BIAS, impl="native"),
                    text_supervised_loss(FEATURES, FEATURES, LABELS[:5], 0.3, 0.1, 0.3, impl="native"),
                    queue_info_nce(FEATURES, None, LABELS[:5], FROZEN, LABELS, 0.1, impl="native"),
                ]
            )
    finally:
        _C.set_cpu_capability(before)
    for result in results.values():
        torch.testing.assert_close(result, results["scalar"], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "name,prints",
    [("scalar", "scalar"), ("sse9", "MOORING_CPU must be one that this build and this CPU have (scalar")],
)
def test_the_environment_chooses_the_capability(name: str, prints: str) -> None:
    program = (
        "import mooring_kernels\n"
        "try:\n    print(mooring_kernels.cpu_capability())\n"
        "except ValueError as error:\n    print(error)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "MOORING_CPU": name},
        capture_output=True,
        text=True,
        check=True,
    )
    assert prints in ran.stdout


def test_ops_import_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; found = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'triton' else found(name, *rest)\n"
        "import torch, mooring_kernels as m\n"
        "m.row_normalise(torch.ones(2, 3))\n"
        "try:\n    m.row_normalise(torch.ones(2, 3), impl='triton')\n"
        "except ImportError as error:\n    print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "python -m pip install 'triton==3.7.1'" in ran.stdout
