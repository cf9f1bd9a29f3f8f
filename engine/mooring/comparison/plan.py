"""What is compared, and the settings of each of its runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mooring.config.keys import SHORTHANDS, all_keys
from mooring.config.load import absolute_paths, load_config
from mooring.config.method_settings import method_names
from mooring.config.schema import RunConfig
from mooring.errors import ConfigError
from mooring.methods.registry import needs_of
from mooring.methods.without_effect import check_effect

BASELINE = "fine_tune"


@dataclass(frozen=True, slots=True)
class Part:
    """How much of the training images the runs see: all of them, or a few-shot or stratified part."""

    shots: int | None = None
    fraction: float | None = None

    @property
    def label(self) -> str:
        """``5 shots``, ``25 %`` or nothing."""
        if self.shots is not None:
            return f"{self.shots} shot" + ("s" if self.shots > 1 else "")
        return f"{100 * self.fraction:g} %" if self.fraction is not None else ""

    @property
    def words(self) -> list[str]:
        """The part as overrides."""
        if self.shots is not None:
            return [f"data.shots={self.shots}"]
        return [f"data.fraction={self.fraction!r}"] if self.fraction is not None else []


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a comparison: its place in it, and its settings."""

    method: str
    part: Part
    lr: float | None
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        """The name of its folder and record."""
        words = [self.method]
        if self.part.shots is not None:
            words.append(f"shots{self.part.shots}")
        if self.part.fraction is not None:
            words.append(f"fraction{self.part.fraction:g}")
        if self.lr is not None:
            words.append(f"lr{self.lr:g}")
        return "-".join([*words, f"seed{self.seed}"])

    def __str__(self) -> str:
        words = [self.method, self.part.label, f"lr {self.lr:g}" if self.lr is not None else ""]
        return ", ".join([*filter(None, words), f"seed {self.seed}"])


@dataclass(frozen=True, slots=True)
class Comparison:
    """Methods under equal budgets: the same settings, data, epochs and batches for all, per seed.

    Attributes:
        methods: names; several joined by ``+`` are one combination.
        out: folder of the runs, records, table and picture.
        recipe, overrides: settings of every run, as ``load_config`` takes them. A ``method.*`` setting goes
            to the methods that have it.
        seeds: how many; they count up from the ``seed`` of the settings.
        shots: images per class to train on, one part of the comparison each; none: all images.
        fractions: the same with shares of each class; not together with shots.
        lrs: learning rates to choose from, for each method and part by itself, by top-1 on the validation
            split of the first seed; one rate, or none, is used as it is.
        tests: False leaves the test split alone altogether.
    """

    methods: Sequence[str]
    out: Path
    recipe: Path | str | None = None
    overrides: Sequence[str] = ()
    seeds: int = 3
    shots: Sequence[int] = ()
    fractions: Sequence[float] = ()
    lrs: Sequence[float] = ()
    tests: bool = True

    def __post_init__(self) -> None:
        problems = []
        for name, values in (
            ("methods", self.methods), ("shots", self.shots), ("fraction", self.fractions), ("lrs", self.lrs),
        ):  # fmt: skip
            if len(set(values)) < len(values):
                problems.append(f"{name}: expected each once, got {', '.join(map(str, values))}")
        if not self.methods:
            problems.append(f"methods: expected at least one, such as {BASELINE},dr_tune; got none")
        if self.seeds < 1:
            problems.append(f"seeds: expected at least 1, got {self.seeds}")
        if self.shots and self.fractions:
            problems.append("shots and fraction both choose training images: give one of them")
        for word in self.overrides:
            key = word.partition("=")[0].strip()
            key = SHORTHANDS.get(key, key)
            other = {
                "method.name": "--methods",
                "out": "--out",
                "data.shots": "--shots",
                "data.fraction": "--fraction",
            }.get(key)
            if key == "resume":
                problems.append("resume: a comparison always continues what is in its folder: leave it out")
            elif other is not None:
                problems.append(f"{key}: in a comparison this is written {other}")
            elif key == "optimizer.lr" and self.lrs:
                problems.append("optimizer.lr: got it beside --lrs: give one of them")
            elif _unowned(key, self.methods):
                problems.append(f"{key}: none of {', '.join(self.methods)} has it")
        if problems:
            raise ConfigError("\n  ".join(["the comparison cannot be made:", *problems]))

    @property
    def parts(self) -> list[Part]:
        """The parts of the training images, at least one."""
        return [
            *(Part(shots=shots) for shots in self.shots),
            *(Part(fraction=fraction) for fraction in self.fractions),
        ] or [Part()]

    @property
    def sweeps(self) -> bool:
        """Whether there is a learning rate to choose."""
        return len(self.lrs) > 1

    def trial(self, method: str, part: Part, lr: float | None, seed: int | None) -> Trial:
        """One run; ``seed`` None is the first.

        Raises:
            ConfigError: a setting is wrong, or the methods do not combine.
        """
        words = [word for word in self.overrides if not _of_others(word, method)]
        words += [f"method={method}", *part.words]
        words += [] if lr is None else [f"optimizer.lr={lr!r}"]
        words += [] if seed is None else [f"seed={seed}"]
        config = absolute_paths(load_config(self.recipe, words))
        needs_of(config.method)  # refuses combinations that are not defined
        check_effect(config)
        trial = Trial(method, part, lr, config.seed, config)
        update = {"out": self.out / "runs" / trial.name, "resume": "auto"}
        return Trial(method, part, lr, config.seed, config.model_copy(update=update))

    def check(self) -> None:
        """Looks at the settings of every run before the first one starts.

        Raises:
            ConfigError: those of one are wrong.
        """
        for method in self.methods:
            for part in self.parts:
                for lr in self.lrs or (None,):
                    self.trial(method, part, lr, None)

    def groups(self) -> Iterator[tuple[Part, str]]:
        """Part by part, each method: what one learning rate is chosen for."""
        for part in self.parts:
            for method in self.methods:
                yield part, method

    @property
    def runs(self) -> int:
        """How many runs it takes."""
        each = len(self.lrs) + self.seeds - 1 if self.sweeps else self.seeds
        return each * len(self.parts) * len(self.methods)


def _owners(key: str) -> tuple[str, ...]:
    known = all_keys().get(key)
    return known.methods if known is not None else ()


def _of_others(word: str, method: str) -> bool:
    owners = _owners(word.partition("=")[0].strip())
    return bool(owners) and not set(method_names(method)) & set(owners)


def _unowned(key: str, methods: Sequence[str]) -> bool:
    owners = _owners(key)
    return bool(owners) and not any(set(method_names(method)) & set(owners) for method in methods)
