"""Parameter groups by role, with layer-wise learning rates and weight decay where it belongs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mooring.models.torchvision_shim import import_timm

timm = import_timm()

ROLES = ("backbone", "head", "auxiliary")


def parameter_groups(
    module: nn.Module,
    roles: Mapping[str, Sequence[nn.Parameter]],
    *,
    lr: float,
    head_lr_multiplier: float = 5.0,
    auxiliary_lr_multiplier: float | None = None,
    weight_decay: float = 0.0,
    layer_decay: float | None = None,
    decay_norm_and_bias: bool = False,
) -> list[dict[str, Any]]:
    """Optimizer parameter groups: every trainable parameter of ``module`` exactly once.

    A backbone parameter in layer group i of n (as timm counts them; the head is group n) gets
    ``lr * layer_decay ** (n - i)``. Parameters with at most one dimension, and those that the encoder
    names in ``no_weight_decay()``, get no weight decay unless asked.

    Args:
        module: the trained method; names its parameters. Its ``encoder`` (or itself) gives the layers.
        roles: parameters by role, ``backbone``, ``head`` and ``auxiliary``.
        lr: backbone learning rate.
        head_lr_multiplier: head rate over ``lr``.
        auxiliary_lr_multiplier: rate of auxiliary parts over ``lr``; None: as the head's.
        weight_decay: for the parameters that decay.
        layer_decay: factor per layer group from head to stem; None or 1: one rate.
        decay_norm_and_bias: decay everything.

    Returns:
        Groups ``{params, lr, weight_decay, role, name}`` in the order of ``module``'s parameters.
    """
    role_of = _checked_roles(module, roles)
    auxiliary = head_lr_multiplier if auxiliary_lr_multiplier is None else auxiliary_lr_multiplier
    rate = {"backbone": lr, "head": lr * head_lr_multiplier, "auxiliary": lr * auxiliary}
    encoder = getattr(module, "encoder", module)
    model = getattr(encoder, "model", encoder)
    layered = layer_decay is not None and layer_decay != 1.0
    depth = _layers_below_head(model) if layered else {}
    undecayed = {id(p) for p in _without_decay(model)}

    groups: dict[str, dict[str, Any]] = {}
    for parameter in module.parameters():
        role = role_of.get(id(parameter))
        if role is None:
            continue
        exempt = not decay_norm_and_bias and (parameter.ndim <= 1 or id(parameter) in undecayed)
        name, group_lr = role, rate[role]
        if layered and role == "backbone":
            below = depth.get(id(parameter), 0)
            assert layer_decay is not None
            name, group_lr = f"{role}/-{below}", group_lr * layer_decay**below
        name += "/no_decay" if exempt else "/decay"
        group = groups.setdefault(
            name,
            {
                "params": [],
                "lr": group_lr,
                "weight_decay": 0.0 if exempt else weight_decay,
                "role": role,
                "name": name,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def _checked_roles(module: nn.Module, roles: Mapping[str, Sequence[nn.Parameter]]) -> dict[int, str]:
    names = {id(p): name for name, p in module.named_parameters()}
    role_of: dict[int, str] = {}
    for role, parameters in roles.items():
        assert role in ROLES, f"unknown role {role!r}; roles are {ROLES}"
        for parameter in parameters:
            key = id(parameter)
            assert key in names, f"role {role} holds a parameter that {type(module).__name__} does not"
            assert key not in role_of, f"{names[key]} is in the roles {role_of[key]} and {role}"
            role_of[key] = role
    left = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in role_of]
    assert not left, f"trainable parameters without a role: {', '.join(left)}"
    return role_of


def _layers_below_head(model: Any) -> dict[int, int]:
    """For each parameter, how many layer groups lie between it and the output; the classifier is at 0."""
    names = dict(model.named_parameters())
    if not hasattr(model, "group_matcher"):
        # no layers known: every direct child is one, in order of registration
        order = {child: i for i, child in enumerate(dict.fromkeys(name.partition(".")[0] for name in names))}
        return {id(p): len(order) - order[name.partition(".")[0]] for name, p in names.items()}
    # The classifier is gone (num_classes=0), but the layers are counted as if it were there.
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    classifier = classifier if isinstance(classifier, str) else classifier[0]
    placeholder = f"{classifier}.weight"
    layer_of = timm.models._manipulate.group_with_matcher(
        ((name, name) for name in [*names, placeholder]), model.group_matcher(coarse=False), reverse=True
    )
    last = max(layer_of.values())
    return {id(p): last - layer_of[name] for name, p in names.items()}


def _without_decay(model: Any) -> list[nn.Parameter]:
    listed = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    return [p for name, p in model.named_parameters() if name in listed]
