"""Several methods in one run: one forward of the encoder, one frozen forward, shared views."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any, ClassVar, Literal

from pydantic import BaseModel
from torch import Generator, Tensor, nn

from mooring.config.method_settings import CombinedSettings
from mooring.data.batch import Batch
from mooring.errors import ConfigError
from mooring.methods.base import At, Method, Needs, SetupContext, StateTree, StepOutput
from mooring.methods.forward import Forward
from mooring.models.front_door import FrontDoorHead

# What is defined together, and by what; anything else is refused. DAFT changes where a run starts, so it goes
# before whatever reads the start (copies, anchors, statistics).
_DAFT_BEFORE = (
    "dr_tune", "tes", "soft_fine_tuning", "concept_tuning", "l2_sp", "feature_map", "delta", "bss", "lwf",
    "feature_distillation", "co_tuning", "bi_tuning", "core_tuning",
)  # fmt: skip
DEFINED: frozenset[frozenset[str]] = frozenset(
    {
        *(frozenset({"daft", other}) for other in _DAFT_BEFORE),
        frozenset({"dr_tune", "tes"}),  # TeS targets for the batch rows, hard labels for the bank rows
        frozenset({"soft_fine_tuning", "concept_tuning"}),  # source images never enter the queues
    }
)
_WHY_NOT = {
    "fine_tune": "every method contains plain fine-tuning: leave it out",
    "linear_probe": "a probe leaves the encoder as it is, so there is nothing to hold back",
    "lp_ft": "its two phases each have a loss of their own",
    "stoch_norm": "it replaces the BatchNorm layers that the other method relies on",
}


def check_combination(names: Sequence[str]) -> None:
    """Refuses methods that are not defined together.

    Raises:
        ConfigError: names each pair and the reason.
    """
    problems = []
    for first, second in combinations(names, 2):
        if frozenset({first, second}) in DEFINED:
            continue
        reason = _WHY_NOT.get(first) or _WHY_NOT.get(second) or "no specification says what they are together"
        problems.append(f"{first} with {second}: {reason}")
    if problems:
        allowed = ", ".join(sorted("+".join(sorted(pair)) for pair in DEFINED))
        raise ConfigError(
            "method: expected methods that combine; got\n  "
            + "\n  ".join(problems)
            + f"\nPairs that combine: {allowed}"
        )


def ordered(names: Sequence[str]) -> list[str]:
    """The order in which parts are set up: DAFT first, the others as given."""
    return sorted(names, key=lambda name: name != "daft")


class Combined(Method):
    """Methods that share encoder, head, one forward and one frozen forward.

        L = widened(classification + sum over all parts of their additions)

    ``classification`` and ``widened`` come from the one part that defines them.

    Args:
        encoder, head, settings: as for every method.
        parts: methods built around the same encoder and head, in the order of their set-up.
        options: as for every method.
    """

    Config: ClassVar[type[BaseModel]] = CombinedSettings
    name: ClassVar[str] = "combined"

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Linear,
        settings: BaseModel,
        *,
        parts: Sequence[Method],
        **options: Any,
    ) -> None:
        super().__init__(encoder, head, settings, **options)
        self.requirements = merged_needs([part.requirements for part in parts])
        self.parts = nn.ModuleDict()
        for part in parts:
            # Encoder and head are registered once, here: names in states and roles stay those of a single method.
            for shared in ("encoder", "head"):
                module = part._modules.pop(shared)
                part.__dict__[shared] = module
            self.parts[part.name] = part
            part.joined(frozenset(other.name for other in parts if other is not part))
        frozen = [part for part in parts if part._frozen]
        for part in frozen[1:]:
            part.share_frozen_copy(frozen[0].frozen_encoder)
        self._frozen = frozen[0]._frozen if frozen else ()

    @property
    def members(self) -> list[Method]:
        """The parts, in order."""
        return list(self.parts.values())  # type: ignore[arg-type]

    def _only(self, hook: str) -> Callable[..., Any]:
        """The hook of the one part that defines it, else what it is by default."""
        owners = [part for part in self.members if getattr(type(part), hook) is not getattr(Method, hook)]
        assert len(owners) <= 1, (
            f"{[o.name for o in owners]} all define {hook}; the table lets no such pair in"
        )
        return getattr(owners[0], hook) if owners else partial(getattr(Method, hook), self)

    def followers(self) -> Sequence[nn.Module]:
        return [network for part in self.members for network in part.followers()]

    def recorded_modules(self) -> Sequence[str]:
        return [name for part in self.members for name in part.recorded_modules()]

    def setup(self, context: SetupContext) -> None:
        for part in self.members:
            part.setup(context)

    def forward_state(self) -> tuple[list[Tensor], list[Generator]]:
        each = [part.forward_state() for part in self.members]
        tensors = {
            id(t): t for t in (*self.buffers(), *(t for own, _ in each for t in own))
        }  # shared ones once
        return list(tensors.values()), [generator for _, own in each for generator in own]

    def before_step(self, at: At) -> None:
        for part in self.members:
            part.before_step(at)

    def classification(self, run: Forward, at: At) -> Tensor:
        return self._only("classification")(run, at)

    def additions(self, run: Forward, at: At) -> dict[str, Tensor]:
        return {
            f"{part.name}_{name}" if name != part.name else name: term
            for part in self.members
            for name, term in part.additions(run, at).items()
        }

    def widened(self, loss: Tensor, run: Forward, at: At) -> Tensor:
        return self._only("widened")(loss, run, at)

    def pushed(self, run: Forward) -> Mapping[str, Tensor]:
        return {
            f"{part.name}.{name}": rows for part in self.members for name, rows in part.pushed(run).items()
        }

    def after_step(self, outputs: list[StepOutput], batches: list[Batch], at: At) -> None:
        for part in self.members:
            prefix = part.name + "."
            own = [
                StepOutput(
                    out.loss,
                    out.logits,
                    out.metrics,
                    {k.removeprefix(prefix): rows for k, rows in out.push.items() if k.startswith(prefix)},
                )
                for out in outputs
            ]
            part.after_step(own, batches, at)

    def source_rows(self, at: At) -> int:
        return max(part.source_rows(at) for part in self.members)

    def source_alongside(self, batch: Batch, at: At) -> bool:
        return any(part.source_alongside(batch, at) for part in self.members)

    def pretrained_parameters(self) -> list[nn.Parameter]:
        return [p for part in self.members for p in part.pretrained_parameters()]

    def head_lr_multiplier(self, batch_size: int, optimizer: str) -> float:
        return self._only("head_lr_multiplier")(batch_size, optimizer)

    def lr_factors(self, at: At) -> Mapping[str, float]:
        factors: dict[str, float] = {}
        for part in self.members:
            for role, factor in part.lr_factors(at).items():
                factors[role] = factors.get(role, 1.0) * factor
        return factors

    def predict(self, images: Tensor) -> Tensor:
        return self._only("predict")(images)

    def exported(self) -> tuple[nn.Module, nn.Linear]:
        return self._only("exported")()

    def exported_front_door(self) -> tuple[FrontDoorHead, str] | None:
        return self._only("exported_front_door")()

    def prediction_choices(self) -> tuple[str, ...]:
        return self._only("prediction_choices")()

    def choose_prediction(self, choice: str) -> None:
        self._only("choose_prediction")(choice)

    def extra_state(self) -> StateTree:
        return {part.name: part.extra_state() for part in self.members}

    def resharded_state(self, states: Sequence[StateTree]) -> StateTree:
        return {
            part.name: part.resharded_state([state[part.name] for state in states]) for part in self.members
        }

    def load_extra_state(self, state: StateTree) -> None:
        for part in self.members:
            part.load_extra_state(state[part.name])


def merged_needs(needs: Sequence[Needs]) -> Needs:
    """What all parts together ask for.

    Raises:
        ConfigError: two parts want different views, or different BatchNorm modes.
    """
    views = {n.views for n in needs if n.views}
    modes: set[Literal["train", "frozen"]] = {n.batchnorm for n in needs if n.batchnorm is not None}
    if len(views) > 1 or len(modes) > 1:
        raise ConfigError(
            "method: expected parts that agree on views and BatchNorm; got "
            + " and ".join(str(n) for n in needs)
        )
    return Needs(
        views=next(iter(views), ()),
        frozen_encoder=any(n.frozen_encoder for n in needs),
        warm_up=any(n.warm_up for n in needs),
        feature_map=any(n.feature_map for n in needs),
        mixing=all(n.mixing for n in needs),
        batchnorm=next(iter(modes), None),
        text_features=any(n.text_features for n in needs),
        source_head=any(n.source_head for n in needs),
        source_stream=any(n.source_stream for n in needs),
        encoder_in_parts=all(n.encoder_in_parts for n in needs),
    )
