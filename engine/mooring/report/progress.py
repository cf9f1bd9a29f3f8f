"""What a run shows while it goes on: a bar on a terminal, a line now and then in a log, or nothing.

All of it goes to stderr, so that stdout carries results only.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Literal, Protocol, Self, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from mooring.report.metrics import counted, duration, metric, shown_metrics
from mooring.report.terminal import stderr

Mode = Literal["auto", "bar", "plain", "quiet"]
_EVALUATION_ORDER = (
    "top1", "top5", "mean_per_class", "ece", "nll", "unseen_recall_at_1", "unseen_nearest_mean", "source_top1",
)  # fmt: skip


class Plan(Protocol):
    """What progress needs to know of a run before it starts."""

    @property
    def model(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def train_images(self) -> int: ...
    @property
    def classes(self) -> int: ...
    @property
    def steps_per_epoch(self) -> int: ...
    @property
    def total_steps(self) -> int: ...


class Progress:
    """The quiet form, and the base of the others; use as a context manager around the run."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def start(self, plan: Plan, epochs: int) -> None:
        """Called once, before the first step."""

    def advance(self, step: int, values: Mapping[str, float] | None) -> None:
        """``step`` optimizer steps are done; ``values`` where metrics were drained after this one."""

    def evaluated(self, kind: str, epoch: int, values: Mapping[str, float]) -> None:
        """The model after ``epoch`` (from 0) was evaluated on the ``kind`` split."""

    def note(self, text: str) -> None:
        """A line for people."""


class _Shown(Progress):
    """What bar and plain share: the state of the run in words."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._plan: Plan | None = None
        self._epochs = 0
        self._first_step: int | None = None
        self._started = 0.0
        self._values: dict[str, float] = {}

    def line(self, text: str) -> None:
        raise NotImplementedError

    def start(self, plan: Plan, epochs: int) -> None:
        self._plan, self._epochs = plan, epochs
        self._first_step, self._started = None, self._clock()
        self.line(
            f"{plan.method} on {plan.model}: {counted(plan.train_images, 'training image')}, "
            f"{counted(plan.classes, 'class', 'classes')}, {counted(plan.total_steps, 'step')} in "
            f"{counted(epochs, 'epoch')}, {plan.device}"
        )

    def evaluated(self, kind: str, epoch: int, values: Mapping[str, float]) -> None:
        shown = [
            f"{metric(name).label} {metric(name).show(values[name])}"
            for name in shown_metrics(_EVALUATION_ORDER, self._plan.classes if self._plan else None)
            if name in values
        ]
        where = f"{kind}, best epoch" if kind.startswith("test") else kind
        self.line(f"epoch {epoch + 1}/{self._epochs}  {where}  {'  '.join(shown)}")

    def note(self, text: str) -> None:
        self.line(text)

    def _epoch(self, step: int) -> str:
        assert self._plan is not None, "advance before start"
        return f"epoch {min(self._epochs, (step - 1) // self._plan.steps_per_epoch + 1)}/{self._epochs}"

    def _update(self, step: int, values: Mapping[str, float] | None) -> None:
        if self._first_step is None:
            self._first_step = step - 1  # a continued run does not start at 0
        if values is not None:
            self._values = dict(values)

    def _state(self) -> str:
        words = []
        if "loss" in self._values:
            words.append(f"loss {metric('loss').show(self._values['loss'])}")
        if "lr" in self._values:
            words.append(f"lr {self._values['lr']:.1e}")
        if "images_per_second" in self._values:
            words.append(f"{metric('images_per_second').show(self._values['images_per_second'])} img/s")
        return "  ".join(words)

    def _eta(self, step: int) -> str:
        """Time left at the mean speed so far, evaluation included."""
        assert self._plan is not None and self._first_step is not None
        done = step - self._first_step
        return duration((self._clock() - self._started) / done * (self._plan.total_steps - step))


class PlainProgress(_Shown):
    """One line per interval: for logs and pipes.

    Args:
        file: where to write.
        interval: seconds between two step lines; evaluations and notes always have one.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        file: TextIO | None = None,
        *,
        interval: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(clock)
        self._file = file
        self._interval = interval
        self._last = -float("inf")

    def line(self, text: str) -> None:
        print(text, file=self._file if self._file is not None else stderr(), flush=True)

    def start(self, plan: Plan, epochs: int) -> None:
        super().start(plan, epochs)
        self._last = -float("inf")  # the first drained step shows at once that the run lives

    def advance(self, step: int, values: Mapping[str, float] | None) -> None:
        self._update(step, values)
        assert self._plan is not None
        if values is None or self._clock() - self._last < self._interval:
            return
        self._last = self._clock()
        total = self._plan.total_steps
        self.line(f"{self._epoch(step)}  step {step}/{total}  {self._state()}  ETA {self._eta(step)}")


class BarProgress(_Shown):
    """A live bar under the lines of finished epochs."""

    def __init__(
        self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(clock)
        self._console = console if console is not None else Console(file=stderr())
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TextColumn("{task.fields[eta]}"),
        ]
        self._bar = RichProgress(*columns, console=self._console, transient=True)
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def line(self, text: str) -> None:
        self._console.print(escape(text), highlight=False)

    def start(self, plan: Plan, epochs: int) -> None:
        super().start(plan, epochs)
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task("preparing", total=plan.total_steps, state="", eta="")

    def advance(self, step: int, values: Mapping[str, float] | None) -> None:
        self._update(step, values)
        assert self._task is not None, "advance before start"
        self._bar.update(
            self._task,
            completed=step,
            description=self._epoch(step),
            state=self._state(),
            eta=f"ETA {self._eta(step)}",
        )


def resolve_mode(mode: Mode) -> Literal["bar", "plain", "quiet"]:
    """``auto`` is a bar on a terminal that can draw one, else plain; ranks other than 0 are quiet."""
    if int(os.environ.get("RANK", "0")) != 0:
        return "quiet"
    if mode != "auto":
        return mode
    return "bar" if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else "plain"


def make_progress(mode: Mode = "auto") -> Progress:
    """The progress of a training run."""
    forms: dict[str, Callable[[], Progress]] = {"bar": BarProgress, "plain": PlainProgress, "quiet": Progress}
    return forms[resolve_mode(mode)]()


@contextmanager
def counting(description: str, unit: str, mode: Mode = "auto") -> Iterator[Callable[[int, int], None]]:
    """Progress of a count, such as the files of a scan; gives ``callback(done, total)``."""
    shown = resolve_mode(mode)
    if shown == "quiet":
        yield lambda done, total: None
        return
    started, last = time.monotonic(), time.monotonic()
    if shown == "plain":

        def plain(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= 15 or done == total:
                last = time.monotonic()
                rate = done / max(last - started, 1e-9)
                print(f"{description}: {done}/{total} {unit}, {rate:.0f}/s", file=stderr(), flush=True)

        yield plain
        return
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
    ]
    with RichProgress(*columns, console=Console(file=stderr()), transient=True) as bar:
        task = bar.add_task(description, total=None, rate="")

        def live(done: int, total: int) -> None:
            rate = done / max(time.monotonic() - started, 1e-9)
            bar.update(task, completed=done, total=total, rate=f"{rate:.0f} {unit}/s")

        yield live
