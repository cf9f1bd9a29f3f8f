"""The linear probe against its definition in float64, and the two phases of LP-FT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from method_cases import at, context, make_batch, make_method


def test_the_probe_is_a_linear_model_of_standardised_frozen_features() -> None:
    method = make_method("linear_probe")
    batches = [make_batch(6, 4, seed=s, padded=s) for s in range(3)]
    before = {name: value.clone() for name, value in method.encoder.state_dict().items()}
    method.setup(context(batches))
    method.train()
    encoder = method.encoder
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    with torch.no_grad():
        rows = torch.cat([encoder(b.images)[b.labels >= 0] for b in batches]).double()
        std = rows.var(0, correction=0).sqrt()
        std = torch.where(std > 1e-6, std, 1.0)
        features = (encoder(batches[1].images).double() - rows.mean(0)) / std
        logits = features @ method.head.weight.double().T + method.head.bias.double()
    out = method(batches[1], at(0))
    torch.testing.assert_close(out.logits.double(), logits, rtol=1e-4, atol=1e-5)
    valid = batches[1].labels >= 0
    expected = F.cross_entropy(logits[valid], batches[1].labels[valid])
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-6)
    out.loss.backward()
    assert method.head.weight.grad is not None
    assert all(p.grad is None for p in encoder.parameters())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_lp_ft_probes_first_and_then_tunes_from_that_head() -> None:
    method = make_method("lp_ft", probe_fraction=0.3)
    batch = make_batch(6, 4)
    statistics = {name: value.clone() for name, value in method.encoder.named_buffers()}
    for step, probing in ((0, True), (5, True), (6, False), (19, False)):
        method.train()
        method.before_step(at(step))
        method.zero_grad()
        method(batch, at(step)).loss.backward()
        assert method.head.weight.grad is not None and method.head.weight.grad.any()
        touched = any(p.grad is not None and p.grad.any() for p in method.encoder.parameters())
        moved = any(
            not torch.equal(value, statistics[name]) for name, value in method.encoder.named_buffers()
        )
        assert touched is moved is not probing, step
        assert (method.lr_factors(at(step))["backbone"] == 0) is probing
    # its optimizer state begins empty: the rate rises over a tenth of the second phase, then is what is scheduled
    factors = [method.lr_factors(at(step, steps=200))["backbone"] for step in (59, 60, 66, 73, 199)]
    assert factors == [0, 1 / 14, 0.5, 1, 1]
