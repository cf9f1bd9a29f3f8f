"""DAFT against slow float64 definitions written from its formulas; what it does to other methods in one run."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import pytest
import torch
from method_cases import SETTINGS, at, context, make_batch, small_encoder, train_step, trained_parameters
from torch import Tensor, nn

from mooring.config.method_settings import CombinedSettings
from mooring.data.batch import Batch
from mooring.methods.base import Method, Resources, SetupContext
from mooring.methods.registry import build_method
from mooring.models.head import build_head

BATCHES = [make_batch(8, 4, seed=0), make_batch(8, 4, seed=1), make_batch(8, 4, seed=2, padded=3)]


def lived_in(encoder: nn.Module) -> nn.Module:
    """The encoder with BatchNorm statistics and weights as a pretraining leaves them: of no layer trivial."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in encoder.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.3, generator=g)
                layer.running_var.uniform_(0.2, 2, generator=g)
                layer.weight.normal_(1, 0.3, generator=g)
                layer.bias.normal_(0, 0.2, generator=g)
    return encoder


def build(*names: str, kind: str = "cnn", **changes: object) -> Method:
    encoder = lived_in(small_encoder(kind))
    torch.manual_seed(1)
    head = build_head(encoder.num_features, 4)
    text = torch.randn(4, 12, generator=torch.Generator().manual_seed(5))
    parts = {name: SETTINGS[name] for name in names}
    parts["daft"] = parts["daft"].model_copy(update=changes)
    settings = (
        next(iter(parts.values())) if len(parts) == 1 else CombinedSettings(parts=tuple(parts.values()))
    )
    return build_method(settings, encoder, head, resources=Resources(text_features=text))


def run_context(**changes: object) -> SetupContext:
    return replace(context(BATCHES), **{"head_lr": 0.05, "optimizer": "sgd", **changes})


def norms(encoder: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: m for name, m in encoder.named_modules() if isinstance(m, nn.BatchNorm2d)}


def measured(encoder: nn.Module, batches: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """mu_T and v_T of every layer: the unweighted mean over batches of each batch's mean and unbiased variance."""
    exact = copy.deepcopy(encoder).double().eval()
    seen: dict[str, list[Tensor]] = {name: [] for name in norms(exact)}
    for name, layer in norms(exact).items():
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0].detach()))
    with torch.no_grad():
        for images in batches:
            exact(images.double())
    return {
        name: (
            torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0),
            torch.stack([x.var((0, 2, 3), correction=1) for x in inputs]).mean(0),
        )
        for name, inputs in seen.items()
    }


def test_the_set_up_converts_by_the_formulas_and_keeps_the_function() -> None:
    method = build("daft")
    start = copy.deepcopy(method.encoder)
    images = make_batch(8, 4, seed=9).images
    method.eval()
    before = method.encoder(images).detach()
    method.train()
    method.setup(run_context())
    method.eval()
    after = method.encoder(images).detach()
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    wanted = measured(start, [b.images[b.labels >= 0] for b in BATCHES])
    for name, layer in norms(method.encoder).items():
        old = norms(start)[name]
        mean, var = wanted[name]
        slope = old.weight.double() / (old.running_var.double() + old.eps).sqrt()
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(layer.running_mean.double(), mean, **close)
        torch.testing.assert_close(layer.running_var.double(), var, **close)
        torch.testing.assert_close(layer.weight.double(), slope * (var + old.eps).sqrt(), **close)
        torch.testing.assert_close(
            layer.bias.double(), old.bias.double() + (mean - old.running_mean.double()) * slope, **close
        )


def test_at_a_zero_head_the_encoder_has_no_gradient_and_the_head_the_centred_class_means() -> None:
    method = build("daft")
    method.setup(run_context())
    method.train()
    batch = make_batch(8, 4, seed=3, padded=2)
    out = method(batch, at(0))
    out.loss.backward()
    assert out.loss.item() == pytest.approx(torch.tensor(4.0).log().item(), rel=1e-6)
    for parameter in method.encoder.parameters():
        assert parameter.grad is not None and not parameter.grad.any()
    method.zero_grad()
    features = copy.deepcopy(method.encoder)(batch.images).detach().double()
    wanted = torch.zeros(4, features.shape[1], dtype=torch.float64)
    for i in range(6):
        for c in range(4):
            wanted[c] += (0.25 - float(batch.labels[i] == c)) * features[i] / 6
    method(batch, at(0)).loss.backward()
    assert method.head.weight.grad is not None
    torch.testing.assert_close(method.head.weight.grad.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("other", ["l2_sp", "dr_tune", "tes"])
def test_other_parts_start_after_the_conversion_whatever_the_order_of_the_names(other: str) -> None:
    methods = [build("daft", other), build(other, "daft")]
    for method in methods:
        method.setup(run_context())
    first, second = methods
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    if other == "l2_sp":
        anchors = first.parts["l2_sp"].extra_state()["anchors"].values()
        for anchor, parameter in zip(anchors, first.encoder.parameters(), strict=True):
            assert torch.equal(anchor, parameter)
    if other == "dr_tune":  # frozen rows and tuned rows of the bank come from one function at the start
        images = BATCHES[0].images
        first.eval()
        with torch.no_grad():
            frozen, tuned = first.frozen_encoder(images), first.encoder(images)
        torch.testing.assert_close(frozen, tuned, rtol=1e-4, atol=1e-5)
    losses = []
    for method in methods:
        optimizer = torch.optim.SGD(trained_parameters(method), lr=0.01, momentum=0.9)
        losses.append([train_step(method, [batch], optimizer, at(i)) for i, batch in enumerate(BATCHES)])
    assert losses[0] == losses[1]


def test_a_continued_run_does_not_convert_again() -> None:
    method = build("daft")
    method.setup(run_context())
    optimizer = torch.optim.SGD(trained_parameters(method), lr=0.01)
    for i in range(2):
        train_step(method, [BATCHES[i]], optimizer, at(i))
    again = build("daft")
    again.load_extra_state(method.extra_state())
    again.load_state_dict(method.state_dict())
    again.setup(run_context())  # nobody calls it after a resume; if someone does, it does nothing
    for (name, a), b in zip(method.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert again.lr_factors(at(2)) == method.lr_factors(at(2))


def test_the_heads_rate() -> None:
    features = []
    with torch.no_grad():
        start = lived_in(small_encoder("cnn")).double().eval()
        for batch in BATCHES:
            features.append(start(batch.images[batch.labels >= 0].double()))
    rows = torch.cat(features)
    stable = 1 / (float(torch.linalg.eigvalsh(rows.T @ rows / len(rows))[-1]) + 1)
    rates = {}
    for given, optimizer in (("auto", "sgd"), ("auto", "adamw"), (2.0, "adamw"), (None, "sgd")):
        method = build("daft", head_lr=given)
        method.setup(run_context(optimizer=optimizer))
        assert set(method.lr_factors(at(0))) == {"head"}
        rates[given, optimizer] = 0.05 * method.lr_factors(at(0))["head"]
    assert rates["auto", "sgd"] == pytest.approx(3 * stable, rel=1e-4)
    assert rates["auto", "adamw"] == pytest.approx(0.05)
    assert rates[2.0, "adamw"] == pytest.approx(2.0)
    assert rates[None, "sgd"] == pytest.approx(0.05)


def test_a_rate_above_the_bound_is_used_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    method = build("daft", head_lr=1e4)
    method.setup(run_context())
    assert method.lr_factors(at(0))["head"] == pytest.approx(2e5)
    assert "above" in caplog.text and "head_lr=auto takes" in caplog.text


def test_ablations_leave_the_other_half_as_it_is() -> None:
    plain = lived_in(small_encoder("cnn")).state_dict()
    fast_head = build("daft", conversion=False)
    fast_head.setup(run_context())
    assert all(torch.equal(v, plain[k]) for k, v in fast_head.encoder.state_dict().items())
    assert not fast_head.head.weight.any()
    converted = build("daft", zero_head=False, head_lr=None)
    converted.setup(run_context())
    assert not torch.equal(converted.encoder.bn1.running_mean, plain["bn1.running_mean"])
    assert converted.head.weight.any() and converted.lr_factors(at(0)) == {"head": 1.0}


def test_which_images_it_looks_at() -> None:
    seen: list[str] = []

    def passing(name: str, batches: list[Batch]):
        def go():
            for batch in batches:
                seen.append(name)
                yield batch

        return go

    for transform in ("train", "clean"):
        method = build("daft", calib_transform=transform, calib_images=9)
        method.setup(run_context(warm_up=passing("train", BATCHES), clean=passing("clean", BATCHES)))
    assert seen == ["train", "train", "clean", "clean"]  # whole batches of 8 until there are 9


def test_layers_without_weights_get_them_before_the_optimizer_is_built() -> None:
    encoder = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    images = BATCHES[0].images
    before = encoder.eval()(images).detach()
    method = build_method(SETTINGS["daft"], encoder, build_head(6, 4))
    trained = {id(p) for p in trained_parameters(method)}
    method.setup(run_context())
    assert {id(p) for p in method.parameters()} == trained and len(trained) == 6
    torch.testing.assert_close(method.encoder.eval()(images), before, rtol=1e-5, atol=1e-5)


def test_an_encoder_without_batchnorm_says_so(caplog: pytest.LogCaptureFixture) -> None:
    method = build("daft", kind="vit")
    before = {k: v.clone() for k, v in method.encoder.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        method.setup(run_context())
    assert "no BatchNorm layer to convert" in caplog.text
    assert all(torch.equal(v, before[k]) for k, v in method.encoder.state_dict().items())
    assert method.lr_factors(at(0))["head"] > 0


def test_dead_channels_are_named(caplog: pytest.LogCaptureFixture) -> None:
    method = build("daft")
    with torch.no_grad():
        method.encoder.bn1.running_var[3] = 1e-12
        method.encoder.bn1.eps = 1e-12
    method.setup(run_context())
    assert "bn1 [3]" in caplog.text
