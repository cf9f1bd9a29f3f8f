"""What every method must do, without exception."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from method_cases import (
    SETTINGS,
    at,
    context,
    make_batch,
    make_method,
    selected,
    train_step,
    trained_parameters,
)

from mooring.methods.registry import METHODS


def test_every_registered_method_is_tested() -> None:
    assert set(SETTINGS) == set(METHODS)


def test_trains_one_step_and_changes_what_it_says(method_name: str, encoder_kind: str) -> None:
    method = make_method(method_name, encoder_kind)
    batches = [make_batch(8, 4, seed=s) for s in range(3)]
    method.setup(context(batches))
    roles = method.parameter_roles()
    trained = trained_parameters(method)
    assert len({id(p) for p in trained}) == len(trained)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    optimizer = torch.optim.SGD(trained, lr=0.1)
    last = 19  # LP-FT tunes the encoder in its last phase only
    for _ in range(2):  # a head that starts at zero gives the encoder its first gradient in the second step
        train_step(method, batches[:1], optimizer, at(last))
    changed = {name for name, p in method.named_parameters() if not torch.equal(p, before[name])}
    allowed = {name for name, p in method.named_parameters() if any(p is q for q in trained)}
    assert changed <= allowed
    assert any(n.startswith("head.") for n in changed)
    assert any(n.startswith("encoder.") for n in changed) == bool(roles["backbone"])


def test_loss_falls_on_a_tiny_set(method_name: str) -> None:
    method = make_method(method_name)
    batches = [make_batch(16, 4, seed=s) for s in range(2)]
    method.setup(context(batches))
    optimizer = torch.optim.AdamW(trained_parameters(method), lr=3e-3)
    losses = [train_step(method, [batches[s % 2]], optimizer, at(s, steps=16)) for s in range(16)]
    assert sum(losses[-2:]) < 0.7 * sum(losses[:2])


def test_state_round_trips_and_the_next_step_is_equal(method_name: str) -> None:
    batches = [make_batch(8, 4, seed=s) for s in range(4)]

    def fresh() -> tuple:
        method = make_method(method_name)
        return method, torch.optim.SGD(trained_parameters(method), lr=0.05, momentum=0.9)

    one, opt = fresh()
    one.setup(context(batches))
    for step in range(3):
        train_step(one, [batches[step]], opt, at(step))
    two, opt2 = fresh()
    two.load_state_dict({k: v.clone() for k, v in one.state_dict().items()})
    two.load_extra_state(one.extra_state())
    opt2.load_state_dict(copy.deepcopy(opt.state_dict()))  # torch keeps references
    assert train_step(one, [batches[3]], opt, at(3)) == train_step(two, [batches[3]], opt2, at(3))
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_export_drops_auxiliary_parts_and_keeps_the_logits(method_name: str, encoder_kind: str) -> None:
    method = make_method(method_name, encoder_kind)
    batches = [make_batch(8, 4, seed=s) for s in range(2)]
    method.setup(context(batches))
    train_step(method, batches[:1], torch.optim.SGD(trained_parameters(method), lr=0.01), at(0))
    method.eval()
    encoder, head = method.exported()
    with torch.no_grad():
        want = method.predict(batches[1].images)
        got = head(encoder.eval()(batches[1].images))
    # folding a standardisation into the head reorders one sum of D products
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_runs_under_bf16_autocast_with_an_fp32_loss(method_name: str, encoder_kind: str) -> None:
    method = make_method(method_name, encoder_kind)
    batches = [make_batch(8, 4, seed=s) for s in range(2)]
    method.setup(context(batches))
    method.train()
    method.before_step(at(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = method(batches[0], at(0))
    assert out.loss.dtype == torch.float32
    assert torch.isfinite(out.loss)
    out.loss.backward()
    for p in method.parameter_roles()["head"]:
        assert p.grad is not None and p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all()


def test_padding_rows_change_nothing(method_name: str) -> None:
    """A batch with rows of label -1 has the loss and head gradient of the batch without them."""
    results = []
    for padded in (False, True):
        method = make_method(method_name, "vit")  # no BatchNorm: rows do not see each other
        whole = make_batch(8, 4, seed=3)
        method.setup(context([make_batch(8, 4, seed=s) for s in range(2)]))
        if padded:
            batch = make_batch(8, 4, seed=3, padded=2)
        else:
            batch = selected(whole, slice(6))
        method.train()
        method.before_step(at(0))
        out = method(batch, at(0))
        out.loss.backward()
        results.append((out.loss.detach(), method.head.weight.grad.clone(), out.metrics["rows"]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)
    assert results[1][2] == 6


@pytest.mark.parametrize("classes", [2, 9])
def test_two_classes_and_absent_classes(method_name: str, classes: int) -> None:
    """C = 2, and C = 9 with a batch and a bank that hold only a few of the classes."""
    method = make_method(method_name, "cnn", classes)
    batch = make_batch(8, 2, seed=0)
    method.setup(context([batch]))
    loss = train_step(method, [batch], torch.optim.SGD(trained_parameters(method), lr=0.01), at(0))
    assert loss == loss and loss < 20
    assert all(torch.isfinite(p).all() for p in method.parameters())


# Terms that are a property of the batch as a whole, not a mean over its rows.
OF_THE_WHOLE_BATCH = {
    "bss": "singular values of the batch's features",
    "core_tuning": "partners and hard positives are rows of the batch",
}


@pytest.mark.parametrize("method_name", sorted(set(SETTINGS) - set(OF_THE_WHOLE_BATCH)))
def test_accumulation_equals_the_large_batch(method_name: str) -> None:
    """Two micro-batches of 8 give the gradient of one batch of 16.

    The encoder is a ViT (BatchNorm statistics are per micro-batch by nature). DR-Tune scales its bank rows
    with the mean feature norm of the micro-batch, so the two halves here are given the same images.
    """
    half = make_batch(8, 4, seed=5)
    both = replace(selected(half, torch.arange(16) % 8), ids=torch.cat([half.ids, half.ids + 100]))
    grads = []
    for group in ([both], [half, half]):
        method = make_method(method_name, "vit")
        method.setup(context([make_batch(8, 4, seed=s) for s in range(2)]))
        method.train()
        method.before_step(at(19))
        for micro, batch in enumerate(group):
            (method(batch, at(19, micro=micro, micros=len(group))).loss / len(group)).backward()
        grads.append([p.grad.clone() for p in trained_parameters(method) if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_unknown_method_names_the_nearest() -> None:
    from mooring.errors import ConfigError
    from mooring.methods.registry import method_class

    with pytest.raises(ConfigError, match="did you mean 'dr_tune'"):
        method_class("dr-tune")


@pytest.mark.parametrize("name", ["dr_tune", "lwf", "feature_map", "delta", "feature_distillation", "tes"])
def test_a_state_of_another_frozen_encoder_or_text_is_refused(name: str) -> None:
    method, other = make_method(name), make_method(name)
    other.load_extra_state(method.extra_state())  # of the same: taken
    with torch.no_grad():
        if name == "tes":
            other.get_buffer("text")[0, 0] += 0.5
        else:
            next(other.frozen_encoder.parameters()).add_(0.1)
    other._digest = None
    with pytest.raises(ValueError, match="differ from those the run was started with"):
        other.load_extra_state(method.extra_state())
