"""Concept-Tuning: acceptance tests of its specification, against slow definitions in float64."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from method_cases import (
    SETTINGS,
    at,
    context,
    make_batch,
    make_method,
    selected,
    small_encoder,
    train_step,
    trained_parameters,
)
from PIL import Image
from torch import Tensor, nn

from mooring.config.concept_settings import ConceptTuningSettings
from mooring.errors import ConfigError
from mooring.methods.base import Resources
from mooring.methods.concept_patches import crop_patches, embed_patches
from mooring.methods.concept_tuning import ConceptTuning
from mooring.methods.forward import Forward, features_and_map
from mooring.methods.registry import build_method
from mooring.models.batchnorm import freeze_statistics, statistics_held
from mooring.models.encoder import build_encoder
from mooring.models.head import build_head
from mooring.models.pretrained_head import pretrained_head
from mooring_kernels.patch_match_info_nce.reference import rank_codes

TEMPERATURE = 0.07


def concept(kind: str = "vit", classes: int = 4, *, filled: bool = False, **changes: object) -> ConceptTuning:
    method = make_method("concept_tuning", kind, classes, **changes)
    assert isinstance(method, ConceptTuning)
    method.setup(context([make_batch(8, classes)]))
    if filled:
        g = torch.Generator().manual_seed(9)
        labels = torch.randint(0, classes, (10,), generator=g)
        for queue in method.queues.values():
            rows = {n: torch.randn(10, *queue.spec.row_shape(n), generator=g) for n in queue.spec.fields}
            queue.push(rows, labels, torch.arange(10))
    return method


def terms_of(method: ConceptTuning, batch, where=None) -> tuple[dict[str, Tensor], Forward]:
    run = Forward(method, batch, wants_map=True)
    return method.additions(run, where or at(0)), run


# ---------------------------------------------------------------- losses


def naive_contrast(query: Tensor, own: Tensor, labels: Tensor, queue: Tensor, queue_labels: Tensor) -> float:
    """K + 1 positives, image by image and key by key."""
    query = query.detach()
    losses = []
    for i, label in enumerate(labels.tolist()):
        if label < 0:
            continue
        logits, positives = [float(query[i] @ own[i]) / TEMPERATURE], [float(query[i] @ own[i]) / TEMPERATURE]
        for key, key_label in zip(queue, queue_labels.tolist(), strict=True):
            if key_label < 0:
                continue
            logits.append(float(query[i] @ key) / TEMPERATURE)
            if key_label == label:
                positives.append(logits[-1])
        lse = math.log(sum(math.exp(x - max(logits)) for x in logits)) + max(logits)
        losses.append(lse - sum(positives) / len(positives) - math.log(len(positives)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("embed", ["logits", "proj"])
def test_image_contrast_equals_a_double_loop(embed: str) -> None:
    method = concept(filled=True, embed=embed, embed_width=6, image_contrast=1.0, concept_contrast=0.0).eval()
    batch = make_batch(6, 4, seed=2, padded=1)
    terms, _ = terms_of(method, batch)

    def rows(encoder: nn.Module, layer: nn.Module, images: Tensor) -> Tensor:
        return F.normalize(layer(encoder(images)).double(), dim=1)

    with torch.no_grad():
        name = "head" if embed == "logits" else "projector"
        query = rows(method.encoder, getattr(method, name), batch.images)
        own = rows(method.key["encoder"], method.key[name], batch.views["view1"])
    queue = method.queues["images"].view()
    want = naive_contrast(query, own, batch.labels, queue["image"].double(), queue.labels)
    assert terms["image_contrast"].item() == pytest.approx(want, rel=1e-4)
    assert "concept_contrast" not in terms and want > 0.1


def test_slices_of_the_pooled_map_are_contrasted_one_by_one() -> None:
    method = concept(filled=True, concept_source="channel_slices", channel_slices=3, concept_contrast=1.0)
    assert method.requirements.views == ("train",)
    method.eval()
    batch = make_batch(6, 4, seed=2, padded=1)
    terms, run = terms_of(method, batch)
    with torch.no_grad():
        maps = run.feature_map, features_and_map(method.key["encoder"], batch.views["view1"])[1]
    query, own = (m.double().mean((2, 3)).unflatten(1, (3, -1)) for m in maps)
    queue = method.queues["slices"].view()
    want = [
        naive_contrast(
            F.normalize(query[:, s], dim=1),
            F.normalize(own[:, s], dim=1),
            batch.labels,
            queue[f"slice{s}"].double(),
            queue.labels,
        )
        for s in range(3)
    ]
    assert terms["concept_contrast"].item() == pytest.approx(sum(want) / 3, rel=1e-4)


def plan_order(cosine: Tensor, rounds: int, epsilon: float = 0.01) -> list[int]:
    """Entries of the transport plan, the largest first."""
    size = cosine.shape[0]
    u, v = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    cost = 1 - cosine
    for _ in range(rounds):
        u = u + epsilon * (math.log(1 / size) - torch.logsumexp((-cost + u[:, None] + v) / epsilon, 1))
        v = v + epsilon * (math.log(1 / size) - torch.logsumexp((-cost + u[:, None] + v) / epsilon, 0))
    return (-cost + u[:, None] + v).flatten().argsort(descending=True).tolist()


def test_concept_contrast_equals_the_formulas_patch_by_patch() -> None:
    """Boxes, crops, embeddings, matching and loss, from the definitions; the largest entry is the positive pair."""
    method = concept(
        filled=True, patches=3, negatives_per_set=9, negative_classes=2, concept_contrast=1.0, rank_stride=50
    ).eval()  # fmt: skip
    with torch.no_grad():
        method.head.weight.normal_(generator=torch.Generator().manual_seed(4))
        method.key["head"].weight.copy_(method.head.weight)
    batch = make_batch(4, 4, seed=3, padded=1)
    terms, _ = terms_of(method, batch)

    def embedded(network: nn.Module, images: Tensor, label: int) -> tuple[Tensor, list[int]]:
        key = method.key["encoder"]
        features, feature_map = features_and_map(key, images[None])
        order = method.key["head"](features)[0].argsort(descending=True).tolist()
        others = [c for c in order if c != label]
        weight = method.head.weight
        rank = (3 * weight[label] - sum(weight[c] for c in others[:3])).argsort(descending=True)
        rows = []
        for j in range(3):
            response = feature_map[0, rank[50 * j : 50 * j + 3]].sum(0)
            peak = int(response.argmax())
            x, y = 16 * (peak % 2), 16 * (peak // 2)
            box = [max(0, x - 8), max(0, y - 8), min(32, x + 8), min(32, y + 8)]
            crop = crop_patches(images[None], torch.tensor([[box]], dtype=torch.float32), 16)
            rows.append(embed_patches(network, method.head, crop, "joint")[0, 0])
        return torch.stack(rows).double(), others[:2]

    queue = method.queues["patches"].view()
    keys, key_labels = queue["patches"].double(), queue.labels.tolist()
    losses = []
    with torch.no_grad():
        for i in range(3):
            label = int(batch.labels[i])
            query, negatives = embedded(method.encoder, batch.views["view2"][i], label)
            own, _ = embedded(method.key["encoder"], batch.views["view3"][i], label)
            positive, negative = [], []
            for key, key_label in [(own, label), *zip(keys, key_labels, strict=True)]:
                cosine = query @ key.T
                if key_label == label:
                    positive.append(float(cosine.flatten()[plan_order(cosine, 5)[0]]) / TEMPERATURE)
                elif key_label in negatives:
                    negative += (cosine.flatten() / TEMPERATURE).tolist()
            lse = math.log(sum(math.exp(x) for x in positive + negative))
            losses.append(lse - sum(positive) / len(positive) - math.log(len(positive)))
    assert terms["concept_contrast"].item() == pytest.approx(sum(losses) / 3, rel=1e-4)


def test_total_is_the_sum_of_the_terms_with_their_weights() -> None:
    method = concept(filled=True).eval()
    batch = make_batch(6, 4, seed=2)
    out = method(batch, at(0))
    terms, run = terms_of(method, batch)
    assert set(terms) == {"front_door", "bottleneck", "image_contrast", "concept_contrast"}
    want = F.cross_entropy(run.logits, batch.labels) + sum(terms.values())
    torch.testing.assert_close(out.loss, want)
    double, _ = terms_of(concept(filled=True, image_contrast=0.2, bottleneck_penalty=0.01).eval(), batch)
    torch.testing.assert_close(double["image_contrast"], 2 * terms["image_contrast"])
    torch.testing.assert_close(double["bottleneck"], 2 * terms["bottleneck"])


# ---------------------------------------------------------------- crops


def slow_crop(image: Tensor, box: list[float], side: int) -> Tensor:
    """RoIAlign with one sample in each output pixel, pixel by pixel."""
    x1, y1, x2, y2 = box
    height, width = image.shape[1:]
    out = torch.zeros(image.shape[0], side, side, dtype=torch.float64)
    for r in range(side):
        for c in range(side):
            y = min(max(y1 - 0.5 + (r + 0.5) * (y2 - y1) / side, 0.0), height - 1.0)
            x = min(max(x1 - 0.5 + (c + 0.5) * (x2 - x1) / side, 0.0), width - 1.0)
            top, left = int(y), int(x)
            for row, wy in ((top, 1 - (y - top)), (min(top + 1, height - 1), y - top)):
                for column, wx in ((left, 1 - (x - left)), (min(left + 1, width - 1), x - left)):
                    out[:, r, c] += wy * wx * image[:, row, column].double()
    return out


def test_crops_equal_a_slow_roi_align() -> None:
    g = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 20, 24, generator=g).contiguous(memory_format=torch.channels_last)
    boxes = torch.tensor(
        [
            [[0, 0, 4, 4], [2, 5, 10, 13], [16, 12, 24, 20]],
            [[0.5, 1.25, 7, 9], [20, 0, 24, 8], [3, 3, 11, 11]],
        ]
    )
    got = crop_patches(images, boxes, 8)
    want = [[slow_crop(i, b, 8) for b in each] for i, each in zip(images, boxes.tolist(), strict=True)]
    # a coordinate of 24 pixels has an error of a few 1e-6, and pixels differ by about 4
    torch.testing.assert_close(
        got.double(), torch.stack([torch.stack(row) for row in want]), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(got[0, 1], images[0, :, 5:13, 2:10], rtol=0, atol=1e-4)  # whole pixels: a copy


def test_patch_side_follows_the_size_of_the_images_and_of_the_tokens() -> None:
    from mooring.methods.concept_patches import patch_side_at

    vit = small_encoder("vit")
    assert [patch_side_at(size, vit) for size in (224, 32, 384)] == [64, 16, 112]
    assert [patch_side_at(size, small_encoder("cnn")) for size in (224, 96)] == [64, 32]


# ---------------------------------------------------------------- gradients and statistics


def test_keys_have_no_gradient_and_the_head_none_from_the_patches() -> None:
    method = concept("cnn", filled=True, embed="proj").train()
    method.front_door.requires_grad_(False)
    terms, _ = terms_of(method, make_batch(6, 4, seed=2))
    terms["concept_contrast"].backward(retain_graph=True)
    assert method.head.weight.grad is None and method.projector.weight.grad is None
    assert any(p.grad is not None and p.grad.any() for p in method.encoder.parameters())
    terms["image_contrast"].backward()
    assert method.projector.weight.grad.any()
    assert all(p.grad is None and not p.requires_grad for p in method.key.parameters())
    names = {name for name, _ in method.named_parameters()} | set(method.state_dict())
    assert not any("key" in name.split(".")[0] for name in names)


def test_patches_leave_the_running_statistics_alone() -> None:
    states = []
    for weight in (1.0, 0.0):
        method = concept("cnn", concept_contrast=weight).train()
        method(make_batch(6, 4, seed=2), at(0)).loss.backward()
        states.append({n: b.clone() for n, b in method.encoder.named_buffers()})
    assert all(torch.equal(b, states[1][n]) for n, b in states[0].items())
    before = dict(small_encoder("cnn").named_buffers())
    assert any(not torch.equal(b, before[n]) for n, b in states[0].items())  # the global view moved them


def test_held_statistics_still_normalise_by_the_batch() -> None:
    encoder = small_encoder("cnn").train()
    images = make_batch(4, 4).images
    want = copy.deepcopy(encoder)(images)
    with statistics_held(encoder):
        assert torch.equal(encoder(images), want)
    assert all(m.track_running_stats for m in encoder.modules() if isinstance(m, nn.BatchNorm2d))
    freeze_statistics(encoder)
    want = encoder(images)
    with statistics_held(encoder):
        assert torch.equal(encoder(images), want)


def test_the_key_network_follows_and_takes_the_mode_of_the_query() -> None:
    method = concept("cnn", key_momentum=0.9)
    before = [p.clone() for p in method.key.parameters()]
    with torch.no_grad():
        for p in method.encoder.parameters():
            p.add_(1.0)
    method.before_step(at(0))
    followed = [*method.encoder.parameters(), *method.head.parameters()]
    for key, old, query in zip(method.key.parameters(), before, followed, strict=True):
        torch.testing.assert_close(key, 0.9 * old + 0.1 * query)
    freeze_statistics(method.encoder)
    method.train()
    statistics = [b.clone() for b in method.key.buffers()]
    terms_of(method, make_batch(6, 4))
    assert all(torch.equal(a, b) for a, b in zip(method.key.buffers(), statistics, strict=True))


def test_slots_share_statistics_or_have_their_own() -> None:
    patches = torch.randn(4, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    head = build_head(192, 4, std=0.1)
    vit = small_encoder("vit").eval()
    torch.testing.assert_close(
        embed_patches(vit, head, patches, "joint"), embed_patches(vit, head, patches, "per_slot")
    )
    cnn, head = small_encoder("cnn").train(), build_head(512, 4, std=0.1)
    with statistics_held(cnn):
        slots = embed_patches(cnn, head, patches, "per_slot")
        assert torch.equal(slots[:, 1], F.normalize(head(cnn(patches[:, 1])), dim=1))
        assert not torch.allclose(slots, embed_patches(cnn, head, patches, "joint"))


def test_contrasts_of_a_short_run_begin_with_a_fresh_copy_and_empty_queues() -> None:
    method = concept("cnn", contrast_warm_up="auto").train()
    batch, steps, followed = (
        make_batch(8, 4, seed=1),
        6,
        [*method._followed().values()],
    )  # a fifth of 6 is in step 2
    contrasts = {"image_contrast", "concept_contrast"}
    for step in range(4):
        with torch.no_grad():
            for network in followed:
                for p in network.parameters():
                    p.add_(0.01)
        where = at(step, steps=steps)
        method.before_step(where)
        query = [p for network in followed for p in network.parameters()]
        same = [torch.equal(key, p) for key, p in zip(method.key.parameters(), query, strict=True)]
        terms, run = terms_of(method, batch, where)
        if step < 2:
            assert not any(same) and not contrasts & set(terms) and not method.pushed(run)
            continue
        assert all(same) if step == 2 else not any(same)  # copied once, then followed slowly
        assert contrasts <= set(terms) and set(method.pushed(run)) == {"image", "patches"}
    assert [len(queue) for queue in method.queues.values()] == [0, 0]


def test_runs_of_published_length_have_no_warm_up_and_a_share_given_holds_for_all() -> None:
    automatic = concept("cnn", contrast_warm_up="auto")
    assert [automatic.warm_up_steps(n) for n in (1, 100, 9_999, 10_000, 20_000)] == [1, 20, 2_000, 0, 0]
    assert [concept("cnn", contrast_warm_up=0.0).warm_up_steps(n) for n in (100, 20_000)] == [0, 0]
    assert [concept("cnn", contrast_warm_up=0.5).warm_up_steps(n) for n in (100, 20_000)] == [50, 10_000]


# ---------------------------------------------------------------- queues and draws


def test_queues_take_keys_after_the_step_and_patches_from_their_first_epoch() -> None:
    method = concept(concept_start_epoch=1, queue_rows=2).train()
    batch = make_batch(8, 4, seed=1, padded=1)
    out = method(batch, at(0))
    assert set(out.push) == {"image"} and len(method.queues["images"]) == 0
    method.after_step([out], [batch], at(0))
    labels = batch.labels[:7]
    assert len(method.queues["images"]) == int(labels.bincount(minlength=4).clamp_max(2).sum())
    assert len(method.queues["patches"]) == 0
    later = replace(at(20), epoch=1)
    out = method(batch, later)
    method.after_step([out], [batch], later)
    view = method.queues["patches"].view()
    for label in range(4):
        last = [i for i in range(7) if labels[i] == label][-2:]  # more than K of a class: the last stay
        held = view["patches"][2 * label : 2 * label + len(last)]
        want = {tuple(out.push["patches"][i].flatten()[:3].tolist()) for i in last}
        torch.testing.assert_close(
            torch.tensor(sorted(tuple(row.flatten()[:3].tolist()) for row in held)),
            torch.tensor(sorted(want)),
        )


def test_draws_have_generators_of_their_own_and_none_happen_in_eval() -> None:
    method = concept(filled=True)
    batch = make_batch(6, 4, seed=2)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    first = method.train()(batch, at(0)).loss
    second = method(batch, at(0)).loss
    assert first != second
    fresh = concept(filled=True).train()
    torch.manual_seed(2)
    assert torch.equal(fresh(batch, at(0)).loss, first)
    fresh.load_extra_state(method.extra_state())
    assert torch.equal(fresh(batch, at(0)).loss, method(batch, at(0)).loss)
    method.eval()
    assert torch.equal(method(batch, at(0)).loss, method(batch, at(0)).loss)
    torch.set_rng_state(state)


def test_random_keys_fill_the_queues_where_asked() -> None:
    method = concept(random_init_queue=True, queue_rows=3)
    assert [len(queue) for queue in method.queues.values()] == [12, 12]
    rows = method.queues["patches"].view()["patches"]
    torch.testing.assert_close(rows.norm(dim=2), torch.ones(12, 9))
    terms, _ = terms_of(method.eval(), make_batch(6, 4))
    assert terms["image_contrast"] > 0.1  # noise counts as keys, as in the public code
    empty, _ = terms_of(concept(queue_rows=3).eval(), make_batch(6, 4))
    torch.testing.assert_close(empty["image_contrast"], torch.zeros(()))  # the own key alone


def test_micro_batches_read_the_same_queues_as_the_large_batch() -> None:
    """The generic test of accumulation has nothing queued yet."""
    batch = make_batch(8, 4, seed=5)
    grads = []
    for parts in ([slice(8)], [slice(4), slice(4, 8)]):
        method = concept(filled=True).train()
        method.before_step(at(0))
        for micro, rows in enumerate(parts):
            out = method(selected(batch, rows), at(0, micro=micro, micros=len(parts)))
            (out.loss / len(parts)).backward()
        grads.append([p.grad for p in trained_parameters(method) if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------- degenerate cases


@pytest.mark.parametrize(
    ("classes", "changes"),
    [
        (2, {}),
        (2, {"peak": "center", "kl": "vib", "fusion": "concat_mlp"}),
        (3, {"negative_classes": 100, "patches": 1}),
        (4, {"negative_classes": 1, "queue_rows": 1, "patch_bn": "per_slot"}),
        (4, {"image_contrast": 0.0}),
    ],
)
def test_few_classes_many_negatives_and_other_corners_train(classes: int, changes: dict) -> None:
    method = concept("cnn", classes, **changes)
    optimizer = torch.optim.SGD(trained_parameters(method), lr=0.01)
    for step in range(2):
        loss = train_step(method, [make_batch(8, classes, seed=step)], optimizer, at(step))
        assert math.isfinite(loss)
    assert all(torch.isfinite(p).all() for p in method.parameters())


def test_many_classes_are_contrasted_in_a_projection() -> None:
    assert concept(classes=400).projector is None
    wide = concept(classes=401, queue_rows=1)
    assert wide.queues["images"].view()["image"].shape == (401, 128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patches": 12}, "rank_stride"),
        ({"patch_side": 48}, "larger than the images"),
        ({"patch_side": 20}, "cannot"),
        ({"concept_source": "channel_slices", "channel_slices": 7}, "channel_slices must divide"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        concept("vit", **changes)


def test_an_encoder_of_one_size_is_refused_for_patches_only() -> None:
    encoder = small_encoder("vit")

    def five_tokens_only(_: nn.Module, inputs: tuple[Tensor]) -> None:
        if inputs[0].shape[1] != 5:
            raise RuntimeError(f"built for 5 tokens, got {inputs[0].shape[1]}")

    encoder.blocks[0].register_forward_pre_hook(five_tokens_only)
    settings, options = SETTINGS["concept_tuning"], {"resources": Resources(image_size=32)}
    head = build_head(encoder.num_features, 4)
    with pytest.raises(ConfigError, match=r"this encoder cannot .*got 2"):
        build_method(settings, encoder, head, **options)
    build_method(settings.model_copy(update={"concept_source": "channel_slices"}), encoder, head, **options)


def test_missing_views_are_named() -> None:
    with pytest.raises(ValueError, match="view1 on"):
        concept()(replace(make_batch(4, 4), views={}), at(0))


def test_source_images_never_enter_the_queues() -> None:
    from mooring.config.method_settings import CombinedSettings

    single = make_method("concept_tuning")
    parts = (SETTINGS["soft_fine_tuning"], SETTINGS["concept_tuning"])
    method = build_method(
        CombinedSettings(parts=parts), single.encoder, single.head, resources=make_method("lwf").resources
    )
    batches = [make_batch(8, 4, seed=s) for s in range(2)]
    method.setup(context(batches))
    train_step(method, batches[:1], torch.optim.SGD(trained_parameters(method), lr=0.01), at(0))
    ids = method.parts["concept_tuning"].queues["images"].view().ids
    assert set(ids.tolist()) - {-1} <= set(batches[0].ids.tolist())
    names = [name for name, _ in method.named_parameters()]
    assert len(names) == len(set(names)) and not any(".encoder." in name for name in names)


def test_after_daft_the_key_network_starts_converted() -> None:
    from mooring.config.method_settings import CombinedSettings

    single = make_method("concept_tuning")
    method = build_method(
        CombinedSettings(parts=(SETTINGS["concept_tuning"], SETTINGS["daft"])), single.encoder, single.head
    )
    before = {name: b.clone() for name, b in method.encoder.named_buffers()}
    method.setup(context([make_batch(8, 4, seed=s) for s in range(2)]))
    key = method.parts["concept_tuning"].key
    state = method.encoder.state_dict()
    assert any(not torch.equal(state[name], b) for name, b in before.items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in key["encoder"].state_dict().items())


# ---------------------------------------------------------------- prediction


def test_each_way_to_predict_and_the_choice_among_them() -> None:
    method = concept("cnn", predict="auto").eval()
    images = make_batch(4, 4).images
    with torch.no_grad():
        features, feature_map = features_and_map(method.encoder, images)
        heads = method.head(features), method.front_door(feature_map).logits
        want = {"cls": heads[0], "fd": heads[1], "avg": sum(h.log_softmax(1) for h in heads) / 2}
        for choice in method.prediction_choices():
            method.choose_prediction(choice)
            torch.testing.assert_close(method.predict(images), want[choice])
            assert (method.exported_front_door() is None) == (choice == "cls")
    method.choose_prediction("fd")
    other = concept("cnn", predict="auto")
    other.load_state_dict(method.state_dict())
    assert other.chosen == "fd"
    assert ConceptTuningSettings().predict == "avg" and not concept(predict="fd").prediction_choices()


@pytest.mark.assets
def test_thirty_rounds_choose_the_pairs_that_the_released_stop_rule_chooses(assets: Path) -> None:
    """On patches of real photos: at least 95 % of the three and of the ten largest entries of each plan."""
    file = assets / "weights" / "tf_efficientnet_lite0.in1k.fp16.safetensors"
    encoder = build_encoder("tf_efficientnet_lite0", weights=file).eval()
    head = pretrained_head("tf_efficientnet_lite0", encoder.feature_dim, weights=file)
    photos = [
        np.asarray(Image.open(sorted(folder.iterdir())[0]).convert("RGB").resize((192, 192)))
        for folder in sorted((assets / "datasets" / "flowers12" / "test").iterdir())
    ]
    images = torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2).float() / 127.5 - 1
    cells = (
        images.unfold(2, 64, 64).unfold(3, 64, 64).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
    )  # [12, 9, 3, 64, 64]
    with torch.no_grad():
        units = F.normalize(head(encoder(cells.flatten(0, 1))), dim=1).unflatten(0, cells.shape[:2])
        cosine = torch.einsum("iad,jbd->ijab", units, units).flatten(0, 1).double()  # 144 problems
    released = _released_plan(cosine).flatten(1)
    ours = rank_codes(cosine, 0.01, 30)
    for most in (3, 10):
        chosen = [plan.topk(most, dim=1).indices for plan in (released, ours)]
        shared = (chosen[0][:, :, None] == chosen[1][:, None, :]).any(2).double().mean()
        assert shared >= 0.95, (most, float(shared))


def _released_plan(cosine: Tensor, epsilon: float = 0.01) -> Tensor:
    """Log-domain Sinkhorn of spec 1(c) step 6, which stops by the mean change over all problems of the call."""
    size = cosine.shape[-1]
    score, mass = (cosine - 1) / epsilon, math.log(1 / size + 1e-8)
    u, v = torch.zeros_like(cosine[..., 0]), torch.zeros_like(cosine[..., 0])
    for _ in range(200):
        before = u
        u = u + epsilon * (mass - torch.logsumexp(score + (u[..., None] + v[..., None, :]) / epsilon, -1))
        v = v + epsilon * (mass - torch.logsumexp(score + (u[..., None] + v[..., None, :]) / epsilon, -2))
        if (u - before).abs().sum(-1).mean() < 1e-3:
            break
    return (score + (u[..., None] + v[..., None, :]) / epsilon).exp()
