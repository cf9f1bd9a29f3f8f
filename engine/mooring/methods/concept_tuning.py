"""Concept-Tuning: contrast between concept patches, prediction through a front door (arXiv 2311.06868)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel
from torch import Tensor, nn

from mooring.config.concept_settings import ConceptTuningSettings
from mooring.data.batch import Batch
from mooring.errors import ConfigError
from mooring.methods.bank import BankSpec, FeatureBank
from mooring.methods.bank_resharding import resharded_bank
from mooring.methods.base import At, Method, Needs, SetupContext, StateTree, StepOutput
from mooring.methods.classification import batch_cross_entropy
from mooring.methods.concept_patches import crop_patches, embed_patches, patch_side_at
from mooring.methods.forward import Forward, features_and_map
from mooring.methods.momentum import MomentumCopy
from mooring.methods.sharded_contrast import SharedQueries, sharded_info_nce, sharded_patch_info_nce
from mooring.models.batchnorm import statistics_held
from mooring.models.front_door import FrontDoorHead, bottleneck_divergence, joined
from mooring_kernels import concept_boxes, patch_match_info_nce, queue_info_nce
from mooring_kernels.concept_boxes.rule import default_group_width, default_rank_stride

_log = logging.getLogger(__name__)

# Above so many classes the space of the logits is wide: queues grow with C squared.
_WIDEST_LOGITS = 400
# The published runs take 10,000 and 20,000 steps; shorter ones are over before the keys have left the random head.
_SHORTEST_PUBLISHED = 10_000
_SHORT_RUN_WARM_UP = 0.2
_CHOICES = ("cls", "fd", "avg")
# Streams of their own: no other random draw of the run moves them, and they move none.
_SEEDS = {"pick": 0xC0C1, "noise": 0xC0C2, "queue": 0xC0C3}


class ConceptTuning(Method):
    """``L = CE(y0, y) + alpha L_img + beta L_con + CE(y_fd, y) + lambda L_kl``.

    L_img contrasts each image with a key of another view and the queued keys of all classes; L_con does so for P
    crops of the image, one around the peak of each of P groups of channels, with crops matched one to one by
    transport; y_fd is the front-door head's answer, drawn through its bottleneck in training and at the mean
    otherwise. Keys come from a momentum copy of encoder and head. Mediator and queues: ``FrontDoorHead``,
    ``queue_info_nce``, ``patch_match_info_nce``; where to crop: ``concept_boxes``.

    The exported timm model is encoder and classifier. Where the run predicts with the front-door head, that head
    lies beside it, and ``load_run`` puts both together.

    Source: arXiv 2311.06868 by its public code. Differs from it: the sampled bottleneck is for training only;
    empty queue slots are masked (``random_init_queue``: as the code); few classes take fewer rivals and negatives
    instead of an index error; the momentum step comes before all key work instead of between its two halves;
    Sinkhorn rounds are a fixed number; patches share one forward (``patch_bn="per_slot"``: as the code);
    the head that is unused on patches and keys is not run; which head predicts is fixed or chosen on validation,
    not on test. No patch is cut before ``concept_start_epoch``, where the code computes them for a weight of 0.
    In a run below 10,000 steps the contrasts begin after a fifth of it, with a fresh copy as key network and empty
    queues (``contrast_warm_up=0``: as the code).
    """

    Config: ClassVar[type[BaseModel]] = ConceptTuningSettings
    name: ClassVar[str] = "concept_tuning"
    needs: ClassVar[Needs] = Needs(
        views=("train", "mild", "mild"), feature_map=True, mixing=False, batchnorm="train"
    )
    settings: ConceptTuningSettings
    prediction: Tensor

    @classmethod
    def needs_of(cls, settings: BaseModel) -> Needs:
        assert isinstance(settings, ConceptTuningSettings)
        if settings.concept_source == "patches" and settings.concept_contrast > 0:
            return cls.needs
        return Needs(views=("train",), feature_map=True, mixing=False, batchnorm="train")

    def __init__(self, encoder: nn.Module, head: nn.Linear, settings: BaseModel, **options: Any) -> None:
        super().__init__(encoder, head, settings, **options)
        own, width, classes = self.settings, head.in_features, head.out_features
        self.front_door = FrontDoorHead(width, classes, own.bottleneck, own.fusion)
        projected = own.embed == "proj" or (own.embed == "auto" and classes > _WIDEST_LOGITS)
        self.projector = nn.Linear(width, own.embed_width) if projected else None
        # In a tuple, as the frozen encoder is: no part of the trained module.
        self._key = (MomentumCopy(self._followed()),)
        # A buffer, so that the weights of the best epoch carry the choice that epoch was best with.
        self.register_buffer("prediction", torch.tensor(_CHOICES.index(self._fixed_choice() or "avg")))
        self._check_encoder()
        if own.negative_classes > classes - 1 and self._crops():
            _log.info("%d negative classes asked for, %d are there", own.negative_classes, classes - 1)
        self._queues = self._empty_queues(head.weight.device)
        self._draws = self._generators(0, head.weight.device)
        self._keys: dict[str, Tensor] = {}

    # ---------------------------------------------------------------- what there is

    @property
    def key(self) -> MomentumCopy:
        """The momentum copy of encoder, head and projection."""
        return self._key[0]

    @property
    def queues(self) -> Mapping[str, FeatureBank]:
        """Keys by class: ``images``, and ``patches`` or ``slices``."""
        return self._queues

    def followers(self) -> Sequence[nn.Module]:
        return (self.key,)

    def _followed(self) -> dict[str, nn.Module]:
        networks: dict[str, nn.Module] = {"encoder": self.encoder, "head": self.head}
        return networks if self.projector is None else networks | {"projector": self.projector}

    def _last_layer(self, *, key: bool = False) -> nn.Linear:
        """The layer whose output is the space of the contrast."""
        name = "head" if self.projector is None else "projector"
        layer = self.key[name] if key else self._followed()[name]
        assert isinstance(layer, nn.Linear)
        return layer

    def _crops(self) -> bool:
        return self.settings.concept_source == "patches" and self.settings.concept_contrast > 0

    def patch_side(self, image_size: int) -> int:
        """Side of a concept patch in pixels."""
        return self.settings.patch_side or patch_side_at(image_size, self.encoder)

    def _empty_queues(self, device: torch.device) -> dict[str, FeatureBank]:
        own, width, queues = self.settings, self._last_layer().out_features, {}
        fields: dict[str, dict[str, int | tuple[int, ...]]] = {}
        if own.image_contrast > 0:
            fields["images"] = {"image": width}
        if self._crops():
            fields["patches"] = {"patches": (own.patches, width)}
        elif own.concept_contrast > 0:
            # a field each: one slice's keys lie together
            part = self.head.in_features // own.channel_slices
            fields["slices"] = {f"slice{number}": part for number in range(own.channel_slices)}
        for name, rows in fields.items():
            spec = BankSpec(
                own.queue_rows,
                rows,
                layout="per_class",
                classes=self.head.out_features,
                scope=own.queue_scope,
            )
            queues[name] = FeatureBank(spec, device=device, ranks=self.ranks)
        return queues

    @staticmethod
    def _generators(seed: int, device: torch.device) -> dict[str, torch.Generator]:
        place = "cpu" if device.type == "meta" else device  # where nothing is drawn
        return {name: torch.Generator(place).manual_seed(seed ^ _SEEDS[name]) for name in ("pick", "noise")}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ConceptTuning:
        super()._apply(fn, recurse)
        self.key._apply(fn)
        device = self.head.weight.device
        if self._draws["pick"].device != device:
            self._draws = self._generators(0, device)
        if any(queue.view().labels.device != device for queue in self._queues.values()):
            moved = self._empty_queues(device)
            for name, queue in moved.items():
                queue.load_state_dict(self._queues[name].state_dict())
            self._queues = moved
        return self

    @torch.no_grad()
    def _check_encoder(self) -> None:
        """Refuses an encoder whose map or input size does not fit, before any training.

        Raises:
            ConfigError: says which.
        """
        own, encoder, width = self.settings, self.key["encoder"], self.head.in_features
        if own.concept_source == "channel_slices" and width % own.channel_slices:
            raise ConfigError(
                f"method.channel_slices must divide the feature width; got {own.channel_slices} for {width}"
            )
        described: Any = getattr(self.encoder, "data_config", {"input_size": (3, 224, 224)})
        size = self.resources.image_size or int(described["input_size"][-1])
        encoder.eval()
        try:
            images = self.head.weight.new_zeros(1, 3, size, size)
            channels = features_and_map(encoder, images)[1].shape[1]
        except (AttributeError, AssertionError, RuntimeError, ValueError) as err:
            raise ConfigError(f"concept_tuning needs an encoder with a last feature map: {err}") from err
        if channels != width:
            raise ConfigError(
                f"concept_tuning needs a last feature map as wide as the features; got {channels} channels and "
                f"{width} features: take another model"
            )
        if not self._crops():
            return
        group = own.group_width or default_group_width(width)
        stride = default_rank_stride(width) if own.rank_stride is None else own.rank_stride
        if (own.patches - 1) * stride + group > width:
            raise ConfigError(
                f"method.patches={own.patches} groups of {group} channels, {stride} ranks apart, do not fit into "
                f"{width} channels: set method.rank_stride to at most "
                f"{max(0, width - group) // max(1, own.patches - 1)}"
            )
        side = self.patch_side(size)
        if side > size:
            raise ConfigError(f"method.patch_side={side} is larger than the images of {size} pixels")
        try:
            embed_patches(encoder, self._last_layer(key=True), images.new_zeros(1, 2, 3, side, side), "joint")
        except (AssertionError, RuntimeError, ValueError) as err:
            raise ConfigError(
                f"concept_tuning encodes patches of {side}x{side} pixels, and this encoder cannot ({err}): set "
                "method.patch_side to a size it takes, take method.concept_source=channel_slices, or another model"
            ) from err

    # ---------------------------------------------------------------- a run

    @torch.no_grad()
    def setup(self, context: SetupContext) -> None:
        """Copies the networks as they are now (another method's set-up may have changed them), empties the queues."""
        self.key.copy_from(self._followed())
        device = self.head.weight.device
        self._draws = self._generators(context.seed, device)
        self._queues = self._empty_queues(device)
        if steps := self.warm_up_steps(context.total_steps):
            _log.info(
                "concept_tuning: the contrasts begin at step %d of %d, with keys of a head that has learnt "
                "(method.contrast_warm_up)",
                steps,
                context.total_steps,
            )
        if self.settings.random_init_queue:
            self._fill_with_random_keys(context.seed)

    def _fill_with_random_keys(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed ^ _SEEDS["queue"])
        rows, device = self.settings.queue_rows, self.head.weight.device
        for queue in self._queues.values():
            for label in range(self.head.out_features):  # one class at a time: the rows are many
                fields = {
                    name: torch.randn(rows, *queue.spec.row_shape(name), generator=generator).to(device)
                    for name in queue.spec.fields
                }
                labels = torch.full((rows,), label, device=device)
                queue.push(fields, labels, torch.full_like(labels, -1))

    def warm_up_steps(self, total_steps: int) -> int:
        """Steps before the contrasts begin.

        In the space of the logits the contrast holds each direction ``norm(y0)`` at keys that a random head made, with
        a gradient that grows as 1 / ||y0||: several times that of cross-entropy over the first tens of steps. Keys of
        a head that has learnt do not hold it. Figures: README.md beside this file.
        """
        share = self.settings.contrast_warm_up
        if isinstance(share, str):  # auto
            share = _SHORT_RUN_WARM_UP if total_steps < _SHORTEST_PUBLISHED else 0.0
        return math.ceil(share * total_steps)

    @torch.no_grad()
    def forward_state(self) -> tuple[list[Tensor], list[torch.Generator]]:
        return [*self.buffers(), *self.key.parameters(), *self.key.buffers()], list(self._draws.values())

    def before_step(self, at: At) -> None:
        for queue in self._queues.values():
            queue.forget_sent()
        begin = self.warm_up_steps(at.total_steps)
        if at.step > begin or begin == 0:
            self.key.follow(self._followed(), self.settings.key_momentum)
        elif at.step == begin:  # nothing has read the key network so far
            self.key.copy_from(self._followed())

    def additions(self, run: Forward, at: At) -> dict[str, Tensor]:
        own, self._keys = self.settings, {}
        self.key.take_mode(self._followed())
        answer = self.front_door(run.feature_map, self._noise(run))
        terms = {
            "front_door": run.over_ranks(
                batch_cross_entropy(answer.logits, run.targets, self.label_smoothing)
            ),
            "bottleneck": own.bottleneck_penalty
            * run.over_ranks(bottleneck_divergence(answer, run.valid, own.kl)),
        }
        if at.step < self.warm_up_steps(at.total_steps):
            return terms
        if "images" in self._queues:
            terms["image_contrast"] = own.image_contrast * run.over_ranks(self._image_contrast(run))
        if at.epoch >= own.concept_start_epoch and own.concept_contrast > 0:
            contrast = self._patch_contrast(run) if self._crops() else self._slice_contrast(run)
            terms["concept_contrast"] = own.concept_contrast * run.over_ranks(contrast)
        return terms

    def _noise(self, run: Forward) -> Tensor | None:
        if not self.training:
            return None
        shape, device = (run.batch.labels.shape[0], self.settings.bottleneck), self.head.weight.device
        return self._own_rows(torch.randn(self._all(shape), generator=self._draws["noise"], device=device))

    def _all(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The shape for the rows of all ranks: what is drawn is the same on each, and for each row its own."""
        return self.ranks.world * shape[0], shape[1]

    def _own_rows(self, drawn: Tensor) -> Tensor:
        return drawn.chunk(self.ranks.world)[self.ranks.rank]

    def _view(self, run: Forward, number: int) -> Tensor:
        views = run.batch.views
        if f"view{number}" not in views:
            raise ValueError(
                f"concept_tuning needs {len(self.requirements.views)} further views of each image, view1 on; "
                f"got {sorted(views)}"
            )
        return views[f"view{number}"]

    def _image_contrast(self, run: Forward) -> Tensor:
        """L_img: images of a class against those of all others."""
        outputs = run.logits if self.projector is None else self.projector(run.features)
        query = F.normalize(outputs.float(), dim=1)
        shared = self._shared(run, "images", image=query)
        with torch.no_grad():
            own_key = self._last_layer(key=True)(self.key["encoder"](self._view(run, 1)))
        self._keys["image"] = own_key = F.normalize(own_key.float(), dim=1)
        return self._info_nce(query, own_key, run.batch.labels, "images", "image", shared)

    def _shared(self, run: Forward, queue: str, **queries: Tensor) -> SharedQueries | None:
        """These rows on their way to the ranks that hold other parts of the queue, while the keys are made."""
        if not self._queues[queue].divided:
            return None
        return SharedQueries(self.ranks, run.batch.labels, **queries)

    def _info_nce(
        self,
        query: Tensor,
        own_key: Tensor,
        labels: Tensor,
        name: str,
        field: str,
        shared: SharedQueries | None,
    ) -> Tensor:
        queue, temperature = self._queues[name], self.settings.contrast_temperature
        if shared is not None:
            return sharded_info_nce(query, own_key, shared[field], shared, queue, field, temperature)
        bank = queue.view()
        return queue_info_nce(query, own_key, labels, bank[field], bank.labels, temperature)

    def _patch_contrast(self, run: Forward) -> Tensor:
        """L_con: patches of an image against the matched patches of images of its class and of confused ones."""
        own, labels = self.settings, run.batch.labels
        crops, negatives = self._concepts(self._view(run, 2), labels)
        with statistics_held(self.encoder):  # small crops must not enter the statistics that the test uses
            query = embed_patches(self.encoder, self._last_layer(), crops, own.patch_bn)
        shared = self._shared(run, "patches", query=query, negatives=negatives)
        with torch.no_grad():
            crops, _ = self._concepts(self._view(run, 3), labels)
            own_key = embed_patches(self.key["encoder"], self._last_layer(key=True), crops, own.patch_bn)
        self._keys["patches"] = own_key
        options: dict[str, Any] = {
            "negatives_per_set": own.negatives_per_set,
            "epsilon": own.transport_entropy,
            "rounds": own.transport_rounds,
        }
        pick = self._positive_pick(labels.shape[0])
        if shared is not None:
            shared.add(own_key=own_key)
            bank = self._queues["patches"]
            return sharded_patch_info_nce(
                query, own_key, shared, bank, pick, own.contrast_temperature, **options
            )
        queue = self._queues["patches"].view()
        rings = self.head.out_features, own.queue_rows
        return patch_match_info_nce(
            query,
            own_key,
            labels,
            queue["patches"].unflatten(0, rings),
            queue.labels.view(rings) >= 0,
            negatives,
            self._own_rows(pick),
            own.contrast_temperature,
            **options,
        )

    def _positive_pick(self, rows: int) -> Tensor:
        """[W B, 1 + K], for the rows of all ranks."""
        shape, device = self._all((rows, 1 + self.settings.queue_rows)), self.head.weight.device
        if not self.training:
            return torch.zeros(shape, dtype=torch.int64, device=device)
        return torch.randint(0, 3, shape, generator=self._draws["pick"], device=device)

    @torch.no_grad()
    def _concepts(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Crops [B, P, 3, S, S] where the key network's groups of channels peak, and the most confused classes."""
        own, head = self.settings, self.key["head"]
        assert isinstance(head, nn.Linear)
        features, feature_map = features_and_map(self.key["encoder"], images)
        side = self.patch_side(images.shape[-1])
        boxes, negatives = concept_boxes(
            feature_map,
            head(features),
            labels,
            head.weight,
            image_size=(images.shape[-2], images.shape[-1]),
            patches=own.patches,
            group_width=own.group_width,
            rank_stride=own.rank_stride,
            patch_side=side,
            rivals=own.rivals,
            negatives=own.negative_classes,
            peak=own.peak,
        )
        return crop_patches(images, boxes, side), negatives

    def _slice_contrast(self, run: Forward) -> Tensor:
        """Mean over the slices of the pooled map of the contrast that L_img is."""
        queries = self._slices(run.feature_map)
        shared = self._shared(run, "slices", **queries)
        with torch.no_grad():
            keys = self._slices(features_and_map(self.key["encoder"], self._view(run, 1))[1])
        self._keys |= keys
        losses = [
            self._info_nce(query, keys[name], run.batch.labels, "slices", name, shared)
            for name, query in queries.items()
        ]
        return torch.stack(losses).mean()

    def _slices(self, feature_map: Tensor) -> dict[str, Tensor]:
        """Unit rows by slice; of tokens, slices of their mean."""
        parts = feature_map.float().mean((2, 3)).chunk(self.settings.channel_slices, 1)
        return {f"slice{number}": F.normalize(part, dim=1) for number, part in enumerate(parts)}

    def pushed(self, run: Forward) -> Mapping[str, Tensor]:
        keys, self._keys = self._keys, {}
        for queue in self._queues.values():
            if rows := _rows_of(queue, keys):
                queue.send(rows, run.batch.labels, run.batch.ids)
        return keys

    @torch.no_grad()
    def after_step(self, outputs: list[StepOutput], batches: list[Batch], at: At) -> None:
        for output, batch in zip(outputs, batches, strict=True):
            for queue in self._queues.values():
                if rows := _rows_of(queue, output.push):
                    queue.push(rows, batch.labels, batch.ids)

    # ---------------------------------------------------------------- inference

    def _fixed_choice(self) -> str | None:
        return None if self.settings.predict == "auto" else self.settings.predict

    @property
    def chosen(self) -> str:
        """Which logits predict now: ``cls``, ``fd`` or ``avg``."""
        return self._fixed_choice() or _CHOICES[int(self.prediction)]

    def prediction_choices(self) -> tuple[str, ...]:
        return _CHOICES if self.settings.predict == "auto" else ()

    def choose_prediction(self, choice: str) -> None:
        self.prediction.fill_(_CHOICES.index(choice))

    def predict(self, images: Tensor) -> Tensor:
        if self.chosen == "cls":
            return super().predict(images)
        features, feature_map = features_and_map(self.encoder, images)
        return joined(self.head(features), self.front_door(feature_map).logits, self.chosen)

    def exported_front_door(self) -> tuple[FrontDoorHead, str] | None:
        return None if self.chosen == "cls" else (self.front_door, self.chosen)

    # ---------------------------------------------------------------- state

    def extra_state(self) -> StateTree:
        return {
            "key": self.key.state(),
            "queues": {name: queue.state_dict() for name, queue in self._queues.items()},
            "draws": {name: generator.get_state() for name, generator in self._draws.items()},
        }

    def resharded_state(self, states: Sequence[StateTree]) -> StateTree:
        return {
            **states[0],
            "key": self.key.resharded_state([state["key"] for state in states]),
            "queues": {
                name: resharded_bank(
                    self._queues[name].spec, self.ranks, [state["queues"][name] for state in states]
                )
                for name in states[0]["queues"]
                if name in self._queues
            },
        }

    def load_extra_state(self, state: StateTree) -> None:
        if set(state["queues"]) != set(self._queues):
            raise ValueError(
                f"the saved run has the queues {sorted(state['queues'])}, this one {sorted(self._queues)}: "
                "resume with the same settings"
            )
        for name, queue in self._queues.items():
            queue.load_state_dict(state["queues"][name])
        self.key.load_state(state["key"])
        for name, generator in self._draws.items():
            generator.set_state(state["draws"][name].cpu())


def _rows_of(queue: FeatureBank, keys: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The keys that a queue takes; none during the warm-up, no patches before their first epoch."""
    return {field: keys[field] for field in queue.spec.fields if field in keys}
