"""What the public code of Concept-Tuning computes, in our words: the facts only.

Its concept-level contrast keeps the structure that decides its cost: a Python loop visits every image, each call
repeats the query and gathers the queue rows of its classes, the rounds stop when the mean change over all
problems of the call falls under a tolerance (a device sync each round), and autograd records the transport, whose
gradient nobody uses. A plan so depends on its neighbours in the call: not the op's function, by the choice of pairs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_ROUNDS, TOLERANCE = 200, 1e-3


def boxes(
    feature_map: Tensor, logits: Tensor, labels: Tensor, head_weight: Tensor, side: int, negatives: int
) -> tuple[Tensor, Tensor]:
    """One image and one group after the other: an argsort per image, a device-to-host read per box.

    Nine groups of 30 channels, 250 ranks apart, for D = 2048; other widths by the scale of the specification.
    """
    width = feature_map.shape[1]
    group, stride = max(1, round(30 * width / 2048)), 250 * width // 2048
    cell = side // feature_map.shape[3]
    found, others = [], []
    for image, y, label in zip(feature_map, logits, labels.tolist(), strict=True):
        order = y.argsort(descending=True, stable=True)
        order = order[order != label]
        rivals = order[:3]
        score = 3 * head_weight[label] - head_weight[rivals].sum(0)
        rank = score.argsort(descending=True, stable=True)
        rows = []
        for number in range(9):
            response = image[rank[number * stride : number * stride + group]].sum(0)
            row, column = divmod(int(response.argmax()), response.shape[1])
            x, y_pixel = cell * column, cell * row
            rows.append([max(0, x - 32), max(0, y_pixel - 32), min(side, x + 32), min(side, y_pixel + 32)])
        found.append(rows)
        others.append(order[:negatives])
    return torch.tensor(found, dtype=torch.float32, device=feature_map.device), torch.stack(others)


def ema(targets: list[Tensor], sources: list[Tensor], momentum: float) -> None:
    """Parameter by parameter, with a new tensor for each."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(target * momentum + source * (1 - momentum))


def transport(cost: Tensor, epsilon: float) -> Tensor:
    """Entropic plans with uniform marginals, stopped early.

    Args:
        cost: [N, P, P]. epsilon: entropy.

    Returns:
        [N, P, P].
    """
    log_mass = math.log(1 / cost.shape[1] + 1e-8)
    u, v = torch.zeros_like(cost[:, :, 0]), torch.zeros_like(cost[:, 0])

    def scores() -> Tensor:
        return (-cost + u[:, :, None] + v[:, None]) / epsilon

    for _ in range(MOST_ROUNDS):
        before = u
        u = epsilon * (log_mass - torch.logsumexp(scores(), dim=2)) + u
        v = epsilon * (log_mass - torch.logsumexp(scores(), dim=1)) + v
        if (u - before).abs().sum(1).mean().item() < TOLERANCE:
            break
    return scores().exp()


def best_cosines(query: Tensor, keys: Tensor, count: int, epsilon: float) -> Tensor:
    """Cosines of the ``count`` largest entries of the plans between one image and N key sets.

    Args:
        query: [P, D]. keys: [N, P, D].

    Returns:
        [N, count].
    """
    cosine = query.repeat(keys.shape[0], 1, 1) @ keys.transpose(1, 2)
    plan = transport(1 - cosine, epsilon)
    return cosine.flatten(1).gather(1, plan.flatten(1).topk(count, dim=1).indices)


def patch_match_loss(
    query: Tensor,
    own_key: Tensor,
    labels: Tensor,
    queue: Tensor,
    negative_classes: Tensor,
    positive_pick: Tensor,
    temperature: float,
    epsilon: float = 0.01,
    negatives_per_set: int = 10,
) -> Tensor:
    """Concept-level loss; every slot of the queue must be filled and every listed class be another one.

    Args:
        query, own_key: [B, P, D]. labels: [B]. queue: [C, K, P, D]. negative_classes: [B, M].
        positive_pick: [B, 1 + K].

    Returns:
        0-d loss.
    """
    rows = []
    for i in range(query.shape[0]):
        positive_sets = torch.cat([own_key[i : i + 1], queue[labels[i]]])
        negative_sets = queue[negative_classes[i]].flatten(0, 1)
        three = best_cosines(query[i], positive_sets, 3, epsilon)
        positives = three.gather(1, positive_pick[i][:, None])[:, 0]
        negatives = best_cosines(query[i], negative_sets, negatives_per_set, epsilon).flatten()
        rows.append(torch.cat([positives, negatives]) / temperature)
    logits = torch.stack(rows)
    count = positive_pick.shape[1]
    target = torch.zeros_like(logits)
    target[:, :count] = 1 / count
    return torch.nn.functional.kl_div(logits.log_softmax(1), target, reduction="batchmean")


def image_loss(
    query: Tensor, own_key: Tensor, labels: Tensor, queue: Tensor, queue_labels: Tensor, temperature: float
) -> Tensor:
    """The image-level loss: sample after sample, with the queue of all other classes copied for each.

    The queue must be full, every label a class, and the rows of class c the c-th run of the queue.

    Args:
        query: [B, D]. own_key: [B, D]. labels: [B]. queue: [C K, D]. queue_labels: [C K]. temperature: T.

    Returns:
        0-d loss, ``KL(target || softmax)`` averaged over the batch.
    """
    per_class = int((queue_labels == queue_labels[0]).sum())
    classes = queue.view(-1, per_class, queue.shape[1]).to(query.dtype)  # [C, K, D]
    logits = []
    for row, key, label in zip(query, own_key, labels.tolist(), strict=True):
        others = torch.cat([classes[:label], classes[label + 1 :]]).flatten(0, 1)  # [(C - 1) K, D]
        logits.append(torch.cat([(row * key).sum()[None], classes[label] @ row, others @ row]))
    scores = torch.stack(logits) / temperature  # [B, 1 + C K]
    target = torch.zeros_like(scores)
    target[:, : 1 + per_class] = 1 / (1 + per_class)
    return F.kl_div(F.log_softmax(scores, dim=1), target, reduction="batchmean")


def enqueue(
    bank_fields: list[Tensor], bank_labels: Tensor, heads: Tensor, fields: list[Tensor], labels: Tensor
) -> None:
    """Image after image: its unit rows go to the slot that the pointer of its class names; a host read for each."""
    units = [F.normalize(field, dim=-1) for field in fields]
    for i, label in enumerate(labels.tolist()):
        slot = int(heads[label])
        for bank, unit in zip(bank_fields, units, strict=True):
            bank[label, slot] = unit[i].to(bank.dtype)
        bank_labels[label, slot] = label
        heads[label] = (slot + 1) % bank_labels.shape[1]
