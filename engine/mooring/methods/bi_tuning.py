"""Bi-Tuning (Zhong, Wang, Kou, Wang, Long; arXiv 2011.06182)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel
from torch import Tensor, nn

from mooring.config.contrast_settings import BiTuningSettings
from mooring.data.batch import Batch
from mooring.methods.bank import BankSpec, FeatureBank
from mooring.methods.bank_resharding import resharded_bank
from mooring.methods.base import At, Method, Needs, SetupContext, StateTree, StepOutput
from mooring.methods.forward import Forward
from mooring.methods.momentum import MomentumCopy
from mooring.methods.sharded_contrast import SharedQueries, sharded_info_nce
from mooring_kernels import queue_info_nce


class BiTuning(Method):
    """``L = CE + a L_z + b L_y``, contrasts with the own key of another view and the last K keys of each class.

    L_z: ``z = norm(P f)`` against keys z of the momentum copy of encoder and projector P; the image's own key and
    the queued keys of its class are positives. L_y: the row ``norm([W_y, b_y])`` of the image's class, detached,
    against ``h = norm([f; 1])`` of the image itself and the queued h of the momentum copy; only the image's own h
    has a gradient. Both: ``queue_info_nce``, over filled slots. Keys are queued after the step, so the first step
    has none but the own one, and a loss of 0.

    P learns at the backbone's rate and is dropped from the exported model.

    Source: arXiv 2011.06182 by its public code in TLlib (spec section 4). Differs from it: empty slots are masked
    where the code starts with random keys; the momentum copy has no head, which the code copies and never uses.
    """

    Config: ClassVar[type[BaseModel]] = BiTuningSettings
    name: ClassVar[str] = "bi_tuning"
    needs: ClassVar[Needs] = Needs(views=("train",), mixing=False)
    settings: BiTuningSettings

    def __init__(self, encoder: nn.Module, head: nn.Linear, settings: BaseModel, **options: Any) -> None:
        super().__init__(encoder, head, settings, **options)
        self.projector = nn.Linear(head.in_features, self.settings.embed_width)
        # In a tuple, as the frozen encoder is: no part of the trained module.
        self._key = (MomentumCopy(self._followed()),)
        self._queue = self._empty_queue(head.weight.device)
        self._keys: dict[str, Tensor] = {}

    @property
    def key(self) -> MomentumCopy:
        """The momentum copy of encoder and projector."""
        return self._key[0]

    @property
    def queue(self) -> FeatureBank:
        """Keys ``z`` and ``h`` by class."""
        return self._queue

    def _followed(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "projector": self.projector}

    def _empty_queue(self, device: torch.device) -> FeatureBank:
        fields = {"z": self.settings.embed_width, "h": self.head.in_features + 1}
        spec = BankSpec(
            self.settings.queue_rows,
            fields,
            layout="per_class",
            classes=self.head.out_features,
            scope=self.settings.queue_scope,
        )
        return FeatureBank(spec, device=device, ranks=self.ranks)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BiTuning:
        super()._apply(fn, recurse)
        self.key._apply(fn)
        device = self.head.weight.device
        if self._queue.view().labels.device != device:
            moved = self._empty_queue(device)
            moved.load_state_dict(self._queue.state_dict())
            self._queue = moved
        return self

    def followers(self) -> Sequence[nn.Module]:
        return (self.key,)

    def pretrained_parameters(self) -> list[nn.Parameter]:
        """The projector: not pretrained, but at the backbone's rate, as the public code has it."""
        return list(self.projector.parameters())

    # ---------------------------------------------------------------- a run

    def setup(self, context: SetupContext) -> None:
        """Copies the networks as they are now (another method's set-up may have changed them), empties the queue."""
        self.key.copy_from(self._followed())
        self._queue = self._empty_queue(self.head.weight.device)

    def forward_state(self) -> tuple[list[Tensor], list[torch.Generator]]:
        return [*self.buffers(), *self.key.parameters(), *self.key.buffers()], []

    def before_step(self, at: At) -> None:
        self.queue.forget_sent()
        self.key.follow(self._followed(), self.settings.key_momentum)

    def additions(self, run: Forward, at: At) -> dict[str, Tensor]:
        own, labels, temperature = self.settings, run.batch.labels, self.settings.contrast_temperature
        queries = _embedded(run.features, self.projector)
        # on their way to the other ranks while the keys are made
        shared = SharedQueries(self.ranks, labels, z=queries["z"]) if self.queue.divided else None
        self._keys = keys = self._key_rows(run)
        class_rows = self._class_rows()

        def rows_of(labels: Tensor) -> Tensor:
            return class_rows[labels.clamp_min(0)]  # a row without a label is masked in the loss

        if shared is not None:
            every_row = rows_of(shared["labels"])
            images = sharded_info_nce(
                queries["z"], keys["z"], shared["z"], shared, self.queue, "z", temperature
            )
            classes = sharded_info_nce(
                rows_of(labels), queries["h"], every_row, shared, self.queue, "h", temperature
            )
        else:
            queue = self.queue.view()
            images = queue_info_nce(queries["z"], keys["z"], labels, queue["z"], queue.labels, temperature)
            classes = queue_info_nce(
                rows_of(labels), queries["h"], labels, queue["h"], queue.labels, temperature
            )
        return {
            "image_contrast": own.image_contrast * run.over_ranks(images),
            "class_contrast": own.class_contrast * run.over_ranks(classes),
        }

    @torch.no_grad()
    def _key_rows(self, run: Forward) -> dict[str, Tensor]:
        view = run.batch.views.get("view1")
        if view is None:
            raise ValueError(
                f"bi_tuning needs a second view of each image, view1; got {sorted(run.batch.views)}"
            )
        self.key.take_mode(self._followed())
        return _embedded(self.key["encoder"](view), self.key["projector"])

    @torch.no_grad()
    def _class_rows(self) -> Tensor:
        """[C, D + 1] unit rows of weight and bias."""
        weight, bias = self.head.weight, self.head.bias
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        return F.normalize(torch.cat([weight, bias[:, None]], 1).float(), dim=1)

    def pushed(self, run: Forward) -> Mapping[str, Tensor]:
        keys, self._keys = self._keys, {}
        self.queue.send(keys, run.batch.labels, run.batch.ids)
        return keys

    @torch.no_grad()
    def after_step(self, outputs: list[StepOutput], batches: list[Batch], at: At) -> None:
        for output, batch in zip(outputs, batches, strict=True):
            self.queue.push(output.push, batch.labels, batch.ids)

    # ---------------------------------------------------------------- state

    def extra_state(self) -> StateTree:
        return {"key": self.key.state(), "queue": self.queue.state_dict()}

    def resharded_state(self, states: Sequence[StateTree]) -> StateTree:
        return {
            "key": self.key.resharded_state([state["key"] for state in states]),
            "queue": resharded_bank(self.queue.spec, self.ranks, [state["queue"] for state in states]),
        }

    def load_extra_state(self, state: StateTree) -> None:
        self.queue.load_state_dict(state["queue"])
        self.key.load_state(state["key"])


def _embedded(features: Tensor, projector: nn.Module) -> dict[str, Tensor]:
    """Unit rows in fp32: ``z`` [B, d] of the projection, ``h`` [B, D + 1] of the features and a one."""
    ones = features.new_ones(features.shape[0], 1, dtype=torch.float32)
    return {
        "z": F.normalize(projector(features).float(), dim=1),
        "h": F.normalize(torch.cat([features.float(), ones], 1), dim=1),
    }
