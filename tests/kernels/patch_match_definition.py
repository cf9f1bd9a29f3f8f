"""Slow float64 definition of patch_match_info_nce, one problem at a time, and inputs whose order is certain."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Arguments of patch_match_info_nce."""

    query: Tensor
    own_key: Tensor
    labels: Tensor
    queue: Tensor
    queue_valid: Tensor
    negative_classes: Tensor
    positive_pick: Tensor
    temperature: float = 0.07
    negatives_per_set: int = 10
    epsilon: float = 0.01
    rounds: int = 30

    def __iter__(self):  # type: ignore[no-untyped-def]
        yield from (self.query, self.own_key, self.labels, self.queue, self.queue_valid)
        yield from (self.negative_classes, self.positive_pick, self.temperature)

    @property
    def options(self) -> dict[str, float]:
        return {
            "negatives_per_set": self.negatives_per_set,
            "epsilon": self.epsilon,
            "rounds": self.rounds,
        }

    def to(self, *target: torch.device | torch.dtype) -> Problem:
        """Floating-point tensors to a dtype, all tensors to a device."""
        moved = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                for t in target:
                    if isinstance(t, torch.device) or value.is_floating_point():
                        value = value.to(t)
                moved[name] = value
        return replace(self, **moved)


def keys_of(cosine: Tensor, epsilon: float, rounds: int) -> Tensor:
    """Unrounded keys [P, P] of one problem: what the order of its plan follows."""
    cost, size = 1 - cosine.double(), cosine.shape[0]
    u, v = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    mass = math.log(1 / size + 1e-8)
    for _ in range(rounds):
        u = u + epsilon * (mass - torch.logsumexp((-cost + u[:, None] + v) / epsilon, 1))
        v = v + epsilon * (mass - torch.logsumexp((-cost + u[:, None] + v) / epsilon, 0))
    key = (-cost + u[:, None] + v) / epsilon - mass
    for b in range(size):
        a = int(key[:, b].argmax())
        if key[a, b] > math.log(0.6):
            others = math.fsum(x for i, x in enumerate(key[:, b].exp().tolist()) if i != a)
            key[a, b] = -math.log(max(others, 2.0**-126))
    return key


def order_of(key: Tensor) -> list[int]:
    """Flat indices by falling rounded key, lower indices first."""
    rounded = [max(round(32 * x), -32767) for x in key.flatten().tolist()]
    return sorted(range(len(rounded)), key=lambda i: (-rounded[i], i))


def definition(problem: Problem) -> Tensor:
    """The loss by loops over images and key sets; differentiable in the query."""
    p = problem
    classes, slots = p.queue_valid.shape
    total, rows = p.query.sum() * 0, 0
    for i, label in enumerate(p.labels.tolist()):
        if not 0 <= label < classes:
            continue
        rows += 1
        positives, negatives = [], []

        def ranked(keys: Tensor, i: int = i) -> list[Tensor]:
            cosine = p.query[i] @ keys.to(p.query.dtype).T
            order = order_of(keys_of(cosine.detach(), p.epsilon, p.rounds))
            return [cosine.flatten()[index] / p.temperature for index in order]

        choices = min(3, p.query.shape[1] ** 2)
        for position in range(1 + slots):
            if position == 0 or p.queue_valid[label, position - 1]:
                keys = p.own_key[i] if position == 0 else p.queue[label, position - 1]
                positives.append(ranked(keys)[min(int(p.positive_pick[i, position]), choices - 1)])
        for c in sorted(set(p.negative_classes[i].tolist()) - {label}):
            for k in range(slots):
                if 0 <= c < classes and p.queue_valid[c, k]:
                    negatives += ranked(p.queue[c, k])[: p.negatives_per_set]
        logits = torch.stack(positives + negatives)
        mean = torch.stack(positives).mean()
        total = total + torch.logsumexp(logits, 0) - mean - math.log(len(positives))
    return total / max(rows, 1)


def is_certain(cosine: Tensor, problem: Problem) -> bool:
    """Whether no key lies so near an edge of the grid that fp32 rounding may move it over."""
    key = keys_of(cosine, problem.epsilon, problem.rounds)
    margin = 4e-6 * (
        1 + 0.1 / problem.epsilon
    )  # a cosine is off by some 2^-24, an exponent by that / epsilon
    best = key.flatten().sort(descending=True).values[: problem.negatives_per_set + 3]
    return bool(((32 * (best - margin)).round() == (32 * (best + margin)).round()).all())


def draw(
    sizes: tuple[int, int, int, int, int, int],
    generator: torch.Generator,
    *,
    likeness: float = 0.0,
    dtype: torch.dtype = torch.float32,
    **options: float,
) -> Problem:
    """Random unit patches, a class's alike by ``likeness``; slots whose order rounding may change are emptied."""
    batch, classes, slots, patches, width, listed = sizes

    def unit(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)

    def like(rows: Tensor, model: Tensor) -> Tensor:
        return torch.nn.functional.normalize(rows + likeness * model, dim=-1).to(dtype)

    models = unit(classes, patches, width)
    labels = torch.randint(-1, classes + 1, (batch,), generator=generator)
    labels[:1] = classes - 1
    of_labels = models[labels.clamp(0, classes - 1)]
    queue = like(unit(classes, slots, patches, width), models[:, None])
    queue_valid = torch.rand(classes, slots, generator=generator) < 0.8
    negative_classes = torch.randint(-1, classes + 1, (batch, listed), generator=generator)
    positive_pick = torch.randint(0, 3, (batch, 1 + slots), generator=generator)
    query, own_key = (
        like(unit(batch, patches, width), of_labels),
        like(unit(batch, patches, width), of_labels),
    )
    problem = Problem(
        query,
        own_key,
        labels,
        queue,
        queue_valid,
        negative_classes,
        positive_pick,
        **options,  # type: ignore[arg-type]
    )
    for i in range(batch):
        for _ in range(20):
            if is_certain(query[i].double() @ own_key[i].double().T, problem):
                break
            own_key[i] = like(unit(patches, width), of_labels[i])
        for c in range(classes):
            for k in range(slots):
                if queue_valid[c, k] and not is_certain(query[i].double() @ queue[c, k].double().T, problem):
                    queue_valid[c, k] = False
    queue[~queue_valid] = float("nan")  # an empty slot may hold anything
    return problem
