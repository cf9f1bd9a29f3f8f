"""DR-Tune: distribution regularisation with semantic calibration (Zhou, Chen, Huang, ICCV 2023).

The head must classify the tuned features of the batch and, at the same time, a bank of features
that the frozen pretrained encoder gave for earlier images, moved to where the tuned features lie
now. The regulariser touches the head alone: the encoder is never tied to its old weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from mooring.collectives import all_reduce_, broadcast_
from mooring.config.method_settings import DRTuneSettings
from mooring.data.batch import Batch
from mooring.methods.bank import BankSpec, FeatureBank
from mooring.methods.bank_resharding import heirs, resharded_bank
from mooring.methods.base import At, Method, Needs, SetupContext, StateTree, StepOutput
from mooring.methods.classification import batch_metrics, mean_over_valid
from mooring.methods.dr_tune_paper import paper_calibration
from mooring.methods.forward import Forward
from mooring.methods.sharded_bank import (
    sharded_calibration,
    sharded_paper_calibration,
    sharded_rotation,
)
from mooring_kernels import bank_cross_entropy, calibrate, dr_tune_loss, procrustes_rotation

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class DRTune(Method):
    """``L = (sum_i CE(W f(x_i) + b, y_i) + sum_k CE(W v_k + b, l_k)) / (B + n)``.

    ``v_k = s * vhat_k / |vhat_k|`` with ``vhat_k = R (p_k - m_{l_k}) + mu_{l_k}``: p_k is the unit
    frozen feature of bank row k, m_c and mu_c are the frozen and the confidence-weighted tuned class
    means, R is the orthogonal map from the frozen onto the tuned features, s the mean feature norm
    of the batch, n the number of valid bank rows. No gradient reaches v_k.

    With ``loss_form="mean"`` (default, the public code) the gradient of the encoder is that of plain
    fine-tuning times B / (B + n); ``"paper"`` is eq. 14, larger by 1 + n / B. With SGD a learning rate
    belongs to one form; with AdamW and LAMB the scale cancels.

    Source: arXiv 2308.12058, eq. 5-14; deviations of the public code are options of ``DRTuneSettings``.

    Args:
        encoder: pretrained at this moment: the frozen copy is taken from it here.
        head: D -> C.
        settings: ``DRTuneSettings``.
        label_smoothing: applied to batch rows and bank rows alike.
    """

    Config: ClassVar[type[BaseModel]] = DRTuneSettings
    name: ClassVar[str] = "dr_tune"
    needs: ClassVar[Needs] = Needs(frozen_encoder=True, warm_up=True, mixing=False)
    settings: DRTuneSettings
    rotation: Tensor | None

    def __init__(self, encoder: nn.Module, head: nn.Linear, settings: BaseModel, **options: Any) -> None:
        super().__init__(encoder, head, settings, **options)
        self.keep_frozen_copy()
        self._bank = self._empty_bank(head.weight.device)
        self.rotation = None
        self._rotated: Tensor | None = None  # R p_k in fp32 for every slot, where keeping them pays

    @property
    def bank(self) -> FeatureBank:
        return self._bank

    @property
    def _sharers(self) -> int:
        """Ranks whose rows the bank holds."""
        return self._bank.ranks.world

    @property
    def _sharded(self) -> bool:
        return self.settings.bank_scope == "sharded" and self._sharers > 1

    def _empty_bank(self, device: torch.device) -> FeatureBank:
        width = self.head.in_features
        spec = BankSpec(
            self.settings.bank_size,
            {"frozen": width, "tuned": width},
            _DTYPES[self.settings.bank_dtype],
            normalise=self.settings.calibration == "code",
            scope=self.settings.bank_scope,
        )
        return FeatureBank(spec, device=device, ranks=self.ranks)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DRTune:
        super()._apply(fn, recurse)
        device = self.head.weight.device
        if self._bank.view().labels.device != device:
            moved = self._empty_bank(device)
            moved.load_state_dict(self._bank.state_dict())
            self._bank = moved
        if self.rotation is not None:
            self.rotation = self.rotation.to(device)
        if self._rotated is not None:
            self._rotated = self._rotated.to(device)
        return self

    @torch.no_grad()
    def setup(self, context: SetupContext) -> None:
        """Fills both banks with frozen features: at most K rows, at most one pass over the images.

        The tuned bank then equals the frozen one, and the identity is the exact rotation.
        """
        rows = self.settings.bank_size
        self.rotation = self._rotated = None
        self._bank = self._empty_bank(self.head.weight.device)  # an earlier set-up may have been broken off
        if rows == 0:
            return
        for batch in context.warm_up():
            with context.autocast():
                features = Forward(self, batch).frozen_features
            room = rows - len(self.bank)
            self.bank.push({"frozen": features, "tuned": features}, batch.labels, batch.ids, most=room)
            if len(self.bank) >= rows:
                break

    def _keeps_rotated_rows(self, step_rows: int) -> bool:
        """Whether rows R p_k are kept; else the op rotates head or bank, whichever is smaller, on every step.

        Kept, every refresh costs K rows times R and every step its B new rows; rotating the head costs
        three products of C rows a step.
        """
        settings = self.settings
        if settings.rotation != "cached" or self._sharded:
            return False
        return 3 * self.head.out_features >= step_rows + settings.bank_size / settings.rotation_period

    def _rotate_slots(self, first: int, count: int) -> None:
        """Brings the kept rotated rows up to date in ``count`` slots from ``first`` on, round the ring."""
        if self._rotated is None or self.rotation is None:
            return
        frozen, slots = self.bank.view()["frozen"], self._rotated.shape[0]
        end = first + count
        # at most two runs of slots, known on the host: nothing waits for the device
        for begin, stop in ((first, min(end, slots)), (0, end - slots)):
            if stop > begin:
                self._rotated[begin:stop] = frozen[begin:stop].float() @ self.rotation.float().T

    def _rotates(self, at: At) -> bool:
        """Whether the bank is rotated in this step: a matter of the global step alone."""
        mode = self.settings.rotation
        return mode != "off" and (mode != "skip" or self._phase(at) == 0)

    def _phase(self, at: At) -> int:
        """Steps since the last refresh was due; the public code counts from the start of each epoch."""
        if self.settings.rotation == "every_step":
            return 0
        step = at.step % at.steps_per_epoch if self.settings.rotation == "skip" else at.step
        return step % self.settings.rotation_period

    @torch.no_grad()
    def before_step(self, at: At) -> None:
        self.bank.forget_sent()
        if self.settings.rotation == "off" or len(self.bank) == 0:
            return
        if self._phase(at) == 0 or self.rotation is None:
            bank = self.bank.view()
            self._rotated = None
            rows = bank["frozen"], bank["tuned"], bank.labels
            options: dict[str, Any] = {
                "ridge": self.settings.rotation_ridge,
                "solver": self.settings.rotation_solver,
                "centred": self.settings.rotation_centred,
                "det_fix": self.settings.rotation_det_fix,
            }
            if self._sharded:
                self.rotation = sharded_rotation(*rows, self.ranks, **options)
            else:
                self.rotation = procrustes_rotation(*rows, **options)
            # from equal banks, yet two kinds of processor may round otherwise
            broadcast_(self.rotation, self.bank.ranks, "rotation")

    def forward(self, batch: Batch, at: At) -> StepOutput:
        run = Forward(self, batch)
        with torch.autocast(run.features.device.type, enabled=False):
            loss, logits = self._loss(run, at)
        return StepOutput(loss, logits, batch_metrics(loss, logits, batch.labels), self.pushed(run))

    def _loss(self, run: Forward, at: At) -> tuple[Tensor, Tensor]:
        """Loss and logits [B, C]. Reads the head's parameters: call inside forward."""
        features, labels = run.features.float(), run.batch.labels
        if at.micros == 1 and self.settings.loss_form == "mean" and self._sharers == 1:
            return self._loss_with_bank(features, labels, run, at)
        bank = self.bank.view()
        batch_mean, logits = bank_cross_entropy(
            features, labels, bank["frozen"][:0], bank.labels[:0], self.head.weight, self.head.bias,
            label_smoothing=self.label_smoothing, return_logits=True,
        )  # fmt: skip
        return self.widened(run.over_ranks(batch_mean) if self._sharers > 1 else batch_mean, run, at), logits

    def _loss_with_bank(
        self, features: Tensor, labels: Tensor, run: Forward, at: At
    ) -> tuple[Tensor, Tensor]:
        """Mean over the valid ones of these rows and of the bank, and the rows' logits."""
        settings, bank, head = self.settings, self.bank.view(), self.head
        rotation = self.rotation if self._rotates(at) else None
        if settings.calibration == "paper" or not settings.translation or self._sharded:
            return bank_cross_entropy(
                features, labels, self._calibrated(run, rotation), bank.labels, head.weight, head.bias,
                label_smoothing=self.label_smoothing, return_logits=True,
            )  # fmt: skip
        frozen = bank["frozen"]
        if rotation is not None and self._keeps_rotated_rows(run.batch.labels.shape[0] * at.micros):
            if self._rotated is None:
                self._rotated = frozen.float() @ rotation.T
            frozen, rotation = self._rotated, None
        return dr_tune_loss(
            features, labels, frozen, bank["tuned"], bank.labels, head.weight, head.bias, rotation,
            self._scale(run), cga_scale=settings.cga_scale, label_smoothing=self.label_smoothing,
            return_logits=True,
        )  # fmt: skip

    def widened(self, loss: Tensor, run: Forward, at: At) -> Tensor:
        """``(A B loss + sum_k CE(G_k, l_k)) / (A B + n)`` over A micro-batches; the form of the paper divides by A B.

        The engine averages micro-batches, so each one counts the bank once and its own rows A times: their
        average is (sum over all batch rows + sum over the bank) / (A B + n), exact where the micro-batches
        have equally many valid rows. Of ranks that share a bank the same holds, for A times their number; of one
        that is sharded each rank scores its own part, that many times. Terms of other methods count as part of
        the batch rows' loss, so that their weight relative to it stays what it is without a bank.
        """
        if self.settings.bank_size == 0:
            return loss
        bank, features, labels = self.bank.view(), run.features, run.batch.labels
        with torch.autocast(features.device.type, enabled=False):
            bank_mean, _ = self._loss_with_bank(features[:0].float(), labels[:0], run, at)
        if self._sharers > 1:
            batch_rows = run.mean_rows * at.micros * self._sharers
        else:
            batch_rows = run.valid.sum().clamp_min(1) * at.micros
        bank_rows = scored = (bank.labels >= 0).sum()
        if self._sharded:
            scored = bank_rows * self._sharers
            bank_rows = all_reduce_(bank_rows.float(), self.ranks, "bank statistics")
        normaliser = batch_rows if self.settings.loss_form == "paper" else batch_rows + bank_rows
        return (batch_rows * loss + scored * bank_mean) / normaliser

    def _calibrated(self, run: Forward, rotation: Tensor | None) -> Tensor:
        """The bank's frozen rows where the tuned features lie now, [K, D] fp32, without graph."""
        settings, bank = self.settings, self.bank.view()
        rows = (bank["frozen"], bank["tuned"], bank.labels, self.head.weight.detach(), rotation)
        translation, cga_scale = settings.translation, settings.cga_scale
        if settings.calibration == "paper" and self._sharded:
            return sharded_paper_calibration(*rows, self.ranks, translation=translation)
        if settings.calibration == "paper":
            return paper_calibration(*rows, translation=translation)
        scale = self._scale(run)
        if self._sharded:
            return sharded_calibration(*rows, scale, self.ranks, cga_scale=cga_scale, translation=translation)
        return calibrate(*rows, scale, cga_scale=cga_scale, translation=translation)

    def _scale(self, run: Forward) -> Tensor:
        """Mean feature norm over the valid rows, of all ranks that share the bank: a padding row must not pull it."""
        norms = torch.linalg.vector_norm(run.features.detach().float(), dim=1)
        mean = mean_over_valid(norms, run.valid)
        if self._sharers == 1:
            return mean
        return all_reduce_(run.over_ranks(mean).clone(), self.ranks, "bank statistics") / self._sharers

    def pushed(self, run: Forward) -> Mapping[str, Tensor]:
        if self.settings.bank_size == 0:
            return {}
        labels, classes = run.batch.labels, self.head.out_features
        # on the device, without waiting for it: what enters the bank must be a class or padding
        torch._assert_async(
            ((labels >= -1) & (labels < classes)).all(),
            f"labels must be -1 (padding) or 0..{classes - 1}",
        )
        rows = {"frozen": run.frozen_features, "tuned": run.features.detach().float()}
        self.bank.send(rows, labels, run.batch.ids)
        return rows

    @torch.no_grad()
    def after_step(self, outputs: list[StepOutput], batches: list[Batch], at: At) -> None:
        if self.settings.bank_size == 0:
            return
        for output, batch in itertools.zip_longest(outputs, batches):
            self._rotate_slots(*self.bank.push(output.push, batch.labels, batch.ids))

    def head_lr_multiplier(self, batch_size: int, optimizer: str) -> float:
        """1 + K / B for SGD, where the head's batch is larger by the bank's rows; scale-free optimizers need none."""
        if optimizer == "sgd":
            if self.settings.bank_scope == "private":
                batch_size = batch_size // self.ranks.world
            return 1 + self.settings.bank_size / batch_size
        return super().head_lr_multiplier(batch_size, optimizer)

    def extra_state(self) -> StateTree:
        state: dict[str, Any] = {"bank": self.bank.state_dict(), **super().extra_state()}
        if self.rotation is not None:
            state["rotation"] = self.rotation.clone()
        if self._rotated is not None:
            # kept, not computed again: a product of K rows may round otherwise than one of B rows
            state["rotated"] = self._rotated.clone()
        return state

    def resharded_state(self, states: Sequence[StateTree]) -> StateTree:
        """The bank by its scope; the rotation of rank 0, or of the rank that a private bank comes from."""
        banks = [state["bank"] for state in states]
        private = self.settings.bank_scope == "private"
        state = dict(states[heirs(len(states), self.ranks)[0] if private else 0])
        if self.settings.bank_scope != "gathered":
            state.pop("rotated", None)  # of rows that now lie elsewhere: made again when it is next read
        return {**state, "bank": resharded_bank(self.bank.spec, self.ranks, banks)}

    def load_extra_state(self, state: StateTree) -> None:
        super().load_extra_state(state)
        self.bank.load_state_dict(state["bank"])
        rotation, rotated = state.get("rotation"), state.get("rotated")
        device = self.head.weight.device
        self.rotation = None if rotation is None else rotation.to(device)
        self._rotated = None if rotated is None else rotated.to(device).clone()
