"""A quick ranking of models and methods on the user's data, with its reasons."""

from __future__ import annotations

import math
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mooring.advice.features import Features, frozen_features
from mooring.advice.logme import log_evidence
from mooring.advice.ridge import cross_validated, ridge_probe
from mooring.comparison.plan import Comparison
from mooring.comparison.runner import run_comparison
from mooring.config.load import absolute_paths, load_config
from mooring.config.schema import RunConfig
from mooring.data.manifest import Manifest
from mooring.data.subset import training_subset
from mooring.errors import ConfigError, DataError, MooringError
from mooring.report.metrics import counted
from mooring.report.progress import counting
from mooring.report.records import from_json_number
from mooring.train.assembly import open_data

RACERS = ("fine_tune", "l2_sp", "dr_tune")
_IMAGES = 2000  # training images that features are taken of, at most
_SHOTS = 16  # images per class in the race, at most
_EPOCHS = 5
_TRAINING = 3.5  # one training image costs about so many forwards: forward, backward, optimizer
_CHOSEN_HERE = ("method", "method.name", "out", "resume", "data.shots", "data.fraction")
PROBE = "linear_probe"


@dataclass(frozen=True, slots=True)
class ModelScore:
    """One model's frozen features.

    Attributes:
        accuracy: of a linear probe, cross-validated on train.
        evidence: LogME.
        seconds_per_image: one forward, decoding included.
    """

    model: str
    accuracy: float
    evidence: float
    seconds_per_image: float


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What to begin with.

    Attributes:
        model, method: the suggestion.
        sure: ``clear``, ``a tendency`` or ``undecided``, for the method.
        models: measured models, the best first.
        race: method -> top-1 on validation after the few-shot race, the best first.
        reasons: what was measured and what follows, one sentence each.
        command: what to type.
    """

    model: str
    method: str
    sure: str
    models: Sequence[ModelScore]
    race: dict[str, float]
    reasons: Sequence[str]
    command: str


@dataclass(slots=True)
class _Story:
    lines: list[str] = field(default_factory=list)

    def tell(self, line: str) -> None:
        self.lines.append(line)


def recommend(
    recipe: Path | str | None = None,
    overrides: Sequence[str] = (),
    *,
    models: Sequence[str] = (),
    methods: Sequence[str] = RACERS,
    minutes: float = 5.0,
    clock: Callable[[], float] = time.monotonic,
) -> Recommendation:
    """Ranks models by frozen features, then a few methods by a short few-shot race of the best model.

    The test split is never looked at. The race trains ``methods`` on up to 16 images per class for five
    epochs (or ``train.epochs`` where given), as far as the time allows by the measured cost of a forward;
    a linear probe on the same images is fitted in closed form. All racers use the same, default rate: this
    is a first look and no comparison (``mooring compare --lrs``).

    Args:
        recipe, overrides: settings, as ``load_config`` takes them.
        models: timm names whose weights are on this machine; none: the configured model.
        methods: the racers.
        minutes: time for the race; the features before it take what they take, of 2000 images at most.
        clock: seconds.

    Raises:
        MooringError: no model can be used, or the data cannot.
    """
    if not minutes > 0:
        raise ConfigError(f"--minutes: expected more than 0, got {minutes}")
    for word in overrides:
        if word.partition("=")[0].strip() in _CHOSEN_HERE:
            raise ConfigError(f"{word}: a recommendation chooses this by itself: leave it out")
    config = absolute_paths(load_config(recipe, overrides))
    with counting("reading the data", "images", config.report.progress) as progress:
        manifest = open_data(config, progress)
    story = _Story()
    part = manifest
    if manifest.counts["train"] > _IMAGES:
        part = training_subset(manifest, shots=max(1, _IMAGES // len(manifest.classes)), seed=config.seed)
    features, scores = _rank_models(config, part, models or [config.model.name], story)
    best = scores[0]
    race = _race(recipe, overrides, config, part, features, best, methods, minutes * 60, story, clock)
    method, sure = _verdict(race, manifest.counts["val"], story)
    command = _command(recipe, overrides, config, best.model, method)
    return Recommendation(best.model, method, sure, scores, race, story.lines, command)


def _command(
    recipe: Path | str | None, overrides: Sequence[str], config: RunConfig, model: str, method: str
) -> str:
    # a weights file belongs to the configured model only
    dropped = ("model.name=",) if model == config.model.name else ("model.name=", "model.weights=")
    words = ["mooring", "train", *([] if recipe is None else [str(recipe)])]
    words += [word for word in overrides if not word.startswith(dropped)]
    words += [f"model.name={model}", f"method={method}"]
    return shlex.join(words)


def standard_error(share: float, images: int) -> float:
    """Of a share measured on so many images; that of one half of an image where all or none are right."""
    kept = min(max(share, 0.5 / images), 1 - 0.5 / images)
    return math.sqrt(kept * (1 - kept) / images)


def _rank_models(
    config: RunConfig, manifest: Manifest, models: Sequence[str], story: _Story
) -> tuple[Features, list[ModelScore]]:
    """Scores, the best first, and the features of the best."""
    classes = len(manifest.classes)
    found: list[tuple[ModelScore, Features]] = []
    for name in models:
        own = name == config.model.name
        model = config.model.model_copy(update={"name": name, **({} if own else {"weights": "auto"})})
        try:
            with counting(f"features of {name}", "images", config.report.progress) as progress:
                features = frozen_features(config.model_copy(update={"model": model}), manifest, progress)
        except DataError:
            raise
        except MooringError as problem:
            if len(models) == 1:
                raise
            story.tell(f"{name} is left out: {problem}")
            continue
        rows, labels = features.train
        if labels.unique().numel() < 2 or len(labels) < 4:
            raise DataError(
                f"expected at least 4 training images of 2 classes to judge features by; got {len(labels)} "
                f"of {labels.unique().numel()}: add images"
            )
        found.append(
            (
                ModelScore(
                    name,
                    cross_validated(rows, labels, classes, seed=config.seed),
                    log_evidence(rows, labels, classes),
                    features.seconds_per_image,
                ),
                features,
            )
        )
    if not found:
        raise ConfigError("--models: none of them can be used:\n  " + "\n  ".join(story.lines))
    found.sort(key=lambda pair: (-pair[0].accuracy, -pair[0].evidence))
    scores = [score for score, _ in found]
    images = len(found[0][1].train[1])
    for score in scores:
        story.tell(
            f"{score.model}: a linear probe on its frozen features gets {100 * score.accuracy:.1f} % "
            f"(5-fold cross-validation on {images} training images, standard error "
            f"{100 * standard_error(score.accuracy, images):.1f}), LogME {score.evidence:.3f}, "
            f"{1000 * score.seconds_per_image:.0f} ms an image"
        )
    if len(scores) > 1:
        gap = scores[0].accuracy - scores[1].accuracy
        error = math.hypot(*(standard_error(score.accuracy, images) for score in scores[:2]))
        agree = max(scores, key=lambda score: score.evidence) is scores[0]
        story.tell(
            f"{scores[0].model} leads by {100 * gap:.1f} points, "
            + ("which is clear" if gap > 2 * error else "which may be chance")
            + (", and LogME agrees" if agree else ", and LogME prefers another")
        )
    return found[0][1], scores


def _race(
    recipe: Path | str | None,
    overrides: Sequence[str],
    config: RunConfig,
    manifest: Manifest,
    features: Features,
    model: ModelScore,
    methods: Sequence[str],
    seconds: float,
    story: _Story,
    clock: Callable[[], float],
) -> dict[str, float]:
    """Method -> top-1 on validation, the best first; the probe is always among them."""
    classes, val = len(manifest.classes), manifest.counts["val"]
    epochs = config.train.epochs if "epochs" in config.train.model_fields_set else _EPOCHS
    # (a shot's training + one validation) x epochs x racers, with a fifth of the time kept back
    affordable = 0.8 * seconds / (max(len(methods), 1) * epochs * model.seconds_per_image)
    # never more than there are features of, so that the probe can be fitted on the same images
    most = max(manifest.split("train").labels.tolist().count(index) for index in range(classes))
    shots = min(_SHOTS, most, int((affordable - val) / (_TRAINING * classes)))
    race = {PROBE: _probe(features, classes)}
    story.tell(
        f"{PROBE}: {100 * race[PROBE]:.1f} % on {val} validation images, fitted in closed form on "
        f"{len(features.train[1])} training images"
    )
    if shots < 1:
        story.tell(
            f"no race: {seconds / 60:g} minutes are too few for {epochs} epochs of {len(methods)} methods at "
            f"{1000 * model.seconds_per_image:.0f} ms an image; give more --minutes, or a smaller train.image_size"
        )
        return race
    train = training_subset(manifest, shots=shots, seed=config.seed)
    story.tell(
        f"race: {counted(shots, 'image')} per class ({train.counts['train']} in all), {epochs} epochs, one seed, one "
        "learning rate for all; judged on validation"
    )
    started = clock()
    with tempfile.TemporaryDirectory(prefix="mooring-race-") as folder:
        outcome = run_comparison(
            Comparison(
                methods=methods,
                out=Path(folder),
                recipe=recipe,
                overrides=[
                    *(word for word in overrides if not word.startswith("model.name=")),
                    f"model.name={model.model}",
                    *([] if model.model == config.model.name else ["model.weights=auto"]),
                    f"train.epochs={epochs}",
                    "report.plots=false",
                    "report.tensorboard=false",
                ],
                seeds=1,
                shots=[shots],
                tests=False,
            ),
            stop=lambda: clock() - started > seconds,
            draw=False,
        )
        if outcome.interrupted and clock() - started <= seconds:
            raise KeyboardInterrupt  # by the user, not by the clock
    race[PROBE] = _probe_on(features, manifest, train, classes)
    story.tell(f"{PROBE} on the race's images alone: {100 * race[PROBE]:.1f} %")
    for record in outcome.records:
        race[record["method"]] = float(from_json_number(record["val"]["top1"]))
        story.tell(
            f"{record['method']}: {100 * race[record['method']]:.1f} %, {record['seconds_per_epoch']:.1f} s an epoch"
        )
    missing = [method for method in methods if method not in race]
    if missing:
        story.tell(f"not raced, the time was over: {', '.join(missing)}")
    return dict(sorted(race.items(), key=lambda item: -item[1]))


def _probe(features: Features, classes: int) -> float:
    weight, bias, _ = ridge_probe(*features.train, classes)
    rows, labels = features.val
    return float(((rows.double() @ weight + bias).argmax(1) == labels).double().mean())


def _probe_on(features: Features, manifest: Manifest, part: Manifest, classes: int) -> float:
    """The probe fitted on the race's images alone; they are among those that features were taken of."""
    kept = set(part.split("train").ids.tolist())
    chosen = [row for row, image in enumerate(manifest.split("train").ids.tolist()) if image in kept]
    rows, labels = features.train
    return _probe(Features((rows[chosen], labels[chosen]), features.val, features.seconds_per_image), classes)


def _verdict(race: dict[str, float], val: int, story: _Story) -> tuple[str, str]:
    """The method to begin with, and how sure that is."""
    ranked = sorted(race.items(), key=lambda item: -item[1])
    method, top = ranked[0]
    if len(ranked) == 1:
        story.tell(
            "only the probe was measured: begin with DR-Tune, the default, and compare it with the probe"
        )
        return "dr_tune", "undecided"
    second, next_best = ranked[1]
    # the same images judge both, so this error is rather too large than too small
    error = math.hypot(standard_error(top, val), standard_error(next_best, val))
    gap = top - next_best
    sure = "clear" if gap > 2 * error else "a tendency" if gap > error else "undecided"
    story.tell(
        f"{method} leads {second} by {100 * gap:.1f} points with a standard error of about {100 * error:.1f} "
        f"({val} validation images, one seed): {sure}"
    )
    if method == PROBE:
        story.tell(
            "with all training images a fine-tuned encoder usually gains more on the probe than in this race"
        )
    if sure != "clear":
        story.tell(f"to decide: mooring compare --methods {method},{second} --seeds 5 --lrs 1e-4,3e-4,1e-3")
    return method, sure
