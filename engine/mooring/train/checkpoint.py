"""The state of a run: what it holds, how it is saved while the training goes on, and how it is put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mooring.config.schema import CheckpointSettings, RunConfig
from mooring.distributed import ALONE, Ranks, is_lost_rank
from mooring.errors import RunFolderError
from mooring.models.deferred import is_deferred
from mooring.report.records import write_text_atomic
from mooring.report.run_folder import existing_run, is_run
from mooring.state.background import Background
from mooring.state.encoding import TreeView
from mooring.state.file_systems import keepers
from mooring.state.retention import Retention
from mooring.state.rng import capture_rng, restore_rng
from mooring.state.snapshot import HostMemory
from mooring.state.store import FOLDER, CheckpointRef, CheckpointStore
from mooring.train import best_weights
from mooring.train.exactness import Difference, differences, run_facts
from mooring.train.health.memory import is_out_of_memory
from mooring.train.other_ranks import resharded_part

if TYPE_CHECKING:
    from mooring.train.engine import Engine

SHARED = "shared"
_SAVED = "saved.txt"  # says that a checkpoint once stood, where they were deleted since


def engine_state(engine: Engine) -> dict[str, Any]:
    """Everything the rest of the run depends on, by part, with the engine's own tensors.

    ``shared`` is equal on all ranks, and rank 0 alone has it; ``rank-R`` is what rank R has for itself: its random
    streams, its place in the data, its banks, the statistics of its batches.
    """
    own = {
        # parameters are equal on all ranks, running statistics are of the batches that a rank has seen
        "buffers": dict(engine.method.named_buffers()),
        "ema_buffers": None if engine.ema is None else dict(engine.ema.buffers),
        "extra": engine.method.extra_state(),
        "source": engine.train_source.state_dict(),
        "source_stream": None if engine.source_stream is None else engine.source_stream.state_dict(),
        "mixer": engine.mixer.state_dict(),
        "loop": engine.loop,
        "rng": capture_rng(),
    }
    # every rank has a part in bringing them together
    weights, optimizer = engine.backend.weights(), engine.backend.state_dict()
    if engine.backend.divided:
        own["optimizer"] = optimizer
    parts: dict[str, Any] = {own_part(engine.backend.rank): own}
    if engine.backend.rank == 0:
        parts[SHARED] = {
            "step": engine.global_step,
            "epochs_validated": engine.epochs_validated,
            "method": weights,
            "optimizer": None if engine.backend.divided else optimizer,
            "ema": None if engine.ema is None else engine.ema.state_dict(),
            "best": engine.best.state_dict(),
            "health": engine.health.state_dict(),
            "inexact": engine.inexact,
        }
    return parts


def own_part(rank: int) -> str:
    """The name of a rank's own part of the state."""
    return f"rank-{rank}"


def restore_engine(engine: Engine, state: Mapping[str, Any]) -> None:
    """Puts ``state`` into a freshly built engine.

    Args:
        engine: of the same settings and data, or of others that the state still fits.
        state: ``shared`` and this rank's own part, as ``engine_state`` returned them.

    Raises:
        ValueError: the state does not fit this engine; it is half restored and of no use.
    """
    shared, own = state[SHARED], state[own_part(engine.backend.rank)]
    optimizer = own["optimizer"] if engine.backend.divided else shared["optimizer"]
    _restore(engine, shared, own, lambda: engine.backend.load_state_dict(optimizer))


def restore_checkpoint(engine: Engine, store: CheckpointStore, ref: CheckpointRef) -> None:
    """Puts a checkpoint into a freshly built engine, which may be of another number of ranks, backend or ZeRO stage.

    A rank reads its own part; where the state is divided otherwise here, also what it needs of the others', one after
    the other and without comparing them with the manifest.

    Raises:
        ValueError, RunFolderError: the state does not fit this engine; it is half restored and of no use.
    """
    shared, world = store.read(ref, SHARED), store.facts(ref)["world"]

    def views() -> Iterator[TreeView]:
        return (store.view(ref, own_part(rank)) for rank in range(world))

    if world == engine.backend.world:
        own = store.read(ref, own_part(engine.backend.rank))
    else:
        own = resharded_part(engine, list(views()), int(shared["step"]))
    whole = shared["optimizer"]
    saved = whole if whole is not None else own.get("optimizer")

    def load_optimizer() -> None:
        if saved is not None and engine.backend.takes(saved):
            engine.backend.load_state_dict(saved)
        elif whole is not None:
            engine.backend.load_redistributed([whole])
        else:
            engine.backend.load_redistributed(view["optimizer"] for view in views())

    _restore(engine, shared, own, load_optimizer)


def _restore(
    engine: Engine, shared: Mapping[str, Any], own: Mapping[str, Any], load_optimizer: Callable[[], None]
) -> None:
    engine.method.load_extra_state(own["extra"])
    if is_deferred(engine.method):  # no process has room for all of it
        engine.hand_over()
        engine.backend.load_weights(shared["method"])
    else:
        with engine.backend.whole(engine.method, write=True):
            engine.method.load_state_dict(shared["method"])
        engine.hand_over()
    for name, buffer in engine.method.named_buffers():
        buffer.copy_(own["buffers"][name])  # last: what begins anew gives all ranks rank 0's
    load_optimizer()
    if engine.ema is not None:
        engine.ema.load_state_dict(shared["ema"] | {"buffers": own["ema_buffers"]})
    engine.train_source.load_state_dict(own["source"])
    if engine.source_stream is not None:
        engine.source_stream.load_state_dict(own["source_stream"])
    engine.mixer.load_state_dict(own["mixer"])
    engine.best.load_state_dict(shared["best"])
    engine.health.load_state_dict(shared["health"])
    engine.global_step = int(shared["step"])
    engine.epochs_validated = int(shared["epochs_validated"])
    engine.loop = dict(own["loop"])
    engine.inexact = list(shared["inexact"])
    restore_rng(own["rng"])


class Checkpoints:
    """Saves an engine's state, one checkpoint at a time.

    A save copies the state into host memory and returns; a thread does the rest. The next save waits until the one
    before it is on the disk, so there is never more than one copy, and its buffers are used again.

    Args:
        store: where to.
        settings: whether in the background.
    """

    def __init__(self, store: CheckpointStore, settings: CheckpointSettings) -> None:
        self.store = store
        self._in_background = settings.background
        self._memory = HostMemory()
        self._background = Background()
        self._newest: CheckpointRef | None = None
        self._facts: dict[str, Any] | None = None

    def save(
        self,
        engine: Engine,
        reason: str,
        *,
        score: tuple[float, float] | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Takes the state as it is now; its checkpoint stands when ``wait`` returns.

        Args:
            engine: between two steps.
            reason: for people.
            score: validation top-1 and loss of this state, where it was just validated.
            before: called on every rank before the checkpoint is committed, from the thread that writes.

        Raises:
            RunFolderError: the save before this one failed.
        """
        self._background.wait()  # its copy of the state is this one's
        parts = self._memory.take(engine_state(engine))
        step = engine.global_step
        self._facts = self._facts or run_facts(engine)  # they do not change while a process lives
        facts = self._facts | {best_weights.FACT: engine.best.epoch}

        def write() -> None:
            ref = self.store.write(step, reason, parts, facts=facts, score=score, before=before)
            self._newest = ref
            if self.store.ranks.is_first:
                with suppress(OSError):  # the checkpoint stands, and the next one makes up for it
                    self._after(ref)

        if self._in_background:
            self._background.start(write)
        else:
            write()

    def _after(self, ref: CheckpointRef) -> None:
        """What may change in the run folder once a checkpoint stands."""
        run = self.store.folder.parent
        if not (run / _SAVED).exists():
            write_text_atomic(
                run / _SAVED, f"saved first after step {ref.step}: to go on, this run needs {FOLDER}/\n"
            )
        best_weights.prune(run, best_weights.best_epochs(self.store))

    def go_on_from(self, engine: Engine, ref: CheckpointRef) -> None:
        """Sets aside what another course of the run saved after ``ref``, which ``engine`` was resumed from.

        Raises:
            RunFolderError: the folder cannot be changed.
        """
        store, ranks = self.store, self.store.ranks
        if ref.folder.parent.resolve() != store.folder.resolve():
            return  # it is another run's
        if not ranks.broadcast(any(other.place > ref.place for other in store.refs())):
            return
        before = ranks.on_first(partial(best_weights.best_epochs, store)) or set()
        store.set_later_aside(ref)

        def settle() -> None:
            named = best_weights.best_epochs(store)
            gone = set() if named is None else before - named
            best_weights.settle(store.folder.parent, engine.best.epoch, named, gone)

        ranks.on_first(settle)

    def check(self) -> None:
        """Raises what a save that is over came to, where it failed; returns at once.

        With several processes the error waits for the next ``save`` or ``wait``: there all ranks raise it together.
        """
        if self.store.ranks.world == 1:
            self._background.check()

    def wait(self) -> CheckpointRef | None:
        """The newest checkpoint that this engine wrote, once it stands.

        Raises:
            RunFolderError: it could not be written.
        """
        self._background.wait()
        return self._newest


def open_checkpoints(run: Path, settings: CheckpointSettings, ranks: Ranks = ALONE) -> Checkpoints:
    """The checkpoints of a run folder, for writing."""
    keep = Retention(settings.keep_last, settings.keep_best, settings.keep_every)
    keeping = keepers(run, ranks)
    # a group of its own: the thread that writes must not get in the way of the training's exchanges
    return Checkpoints(CheckpointStore(run / FOLDER, ranks.apart(), keepers=keeping, keep=keep), settings)


# ---------------------------------------------------------------- continuing


def run_to_continue(config: RunConfig) -> Path | None:
    """The run folder that ``config.resume`` names, or None for a fresh run. It may hold no checkpoint yet.

    Raises:
        RunFolderError: what was named is no run folder, or ``resume=auto`` without ``out``.
    """
    if config.resume is None:
        return None
    if config.resume == "auto" and config.out is None:
        raise RunFolderError("resume=auto continues the run in out=; got no out")
    run = config.out if config.resume == "auto" else Path(config.resume)
    assert run is not None
    if is_run(run):
        return run
    if config.resume == "auto":
        return None
    raise RunFolderError(
        f"resume: expected the folder of an earlier run; {config.resume} holds no config.toml"
    )


def require_unsaved(run: Path) -> None:
    """For a run without a checkpoint that is to start from its beginning: none ever stood there.

    Raises:
        RunFolderError: one did: starting anew would wipe a run that was trained.
    """
    if (run / _SAVED).exists() or _steps_in_result(run):
        raise RunFolderError(
            f"{run} was trained and saved, but {run / FOLDER} holds no checkpoint any more: put that folder back, or "
            "start a new run with out=FOLDER; going on from the beginning would wipe the log and the best weights"
        )


def _steps_in_result(run: Path) -> int:
    try:
        steps = existing_run(run).read_json("result.json")["steps"]
    except (RunFolderError, LookupError, TypeError):
        return 0
    return steps if isinstance(steps, int) else 0


def resume(engine: Engine, ref: CheckpointRef, *, allow_inexact: bool = False) -> list[Difference]:
    """Loads a checkpoint into a freshly built ``engine``; returns what is not as it was.

    Args:
        engine: nothing was trained yet.
        ref: which one.
        allow_inexact: go on where the run would not continue bit for bit; it is recorded in ``engine.inexact``.

    Raises:
        RunFolderError: the checkpoint is damaged, does not fit, or the run would not be the same; the engine is of no
            use then.
    """
    ranks, folder = engine.ranks, ref.folder.parent
    store = CheckpointStore(folder, ranks, keepers=keepers(folder, ranks))
    store.fetch(ref, (SHARED, own_part(ranks.rank)))
    found = compared(engine, store, ref)
    told = ranks.gather([difference for difference in found if difference.breaks])
    breaking = list(dict.fromkeys(difference for own in told for difference in own))  # of all, on all
    if breaking:  # what is divided otherwise is read from the parts of all, and not compared as it is read
        store.fetch(ref)
        store.check(ref)
    if (obstacle := obstacle_to(engine, store, ref)) is not None:
        because = "\nthese differ:\n  " + "\n  ".join(map(str, breaking)) if breaking else ""
        raise RunFolderError(
            f"{ref.folder} cannot be continued by this run: {obstacle}{because}\nrestore what differs, or start "
            "another run with out=FOLDER"
        ) from obstacle
    if breaking and not allow_inexact:
        raise RunFolderError(
            "the run would not continue bit for bit; these differ:\n  "
            + "\n  ".join(map(str, breaking))
            + "\nrestore them, or go on all the same with --allow-inexact (allow_inexact=true), which is recorded"
        )
    if breaking:
        engine.inexact = [
            *engine.inexact,
            {"step": engine.global_step, "differences": [str(difference) for difference in breaking]},
        ]
    return found


def obstacle_to(engine: Engine, store: CheckpointStore, ref: CheckpointRef) -> Exception | None:
    """Loads a checkpoint; why that cannot be done, whatever is allowed, or None: it is done.

    Whether a state of other settings can be put into an engine only the engine's parts can tell.

    Args:
        engine: freshly built; of no use where the state does not fit.
        store: its parts are fetched, and those of other ranks whole.
    """
    try:
        restore_checkpoint(engine, store, ref)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as err:
        if is_lost_rank(err) or is_out_of_memory(err):
            raise
        return err
    return None


def compared(engine: Engine, store: CheckpointStore, ref: CheckpointRef) -> list[Difference]:
    """What of ``engine`` is not as it was when the checkpoint was taken.

    Raises:
        RunFolderError: the checkpoint does not say.
    """
    try:
        return differences(store.facts(ref), run_facts(engine))
    except ValueError as err:
        raise RunFolderError(f"{ref.folder} does not say what it was trained with ({err})") from err
