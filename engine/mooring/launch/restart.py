"""Starts a command again from where it was when it was taken down, up to so many times."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Sequence
from types import FrameType

from mooring.exit_codes import HUNG, PREEMPTED, would_come_again
from mooring.launch.parent_death import ended_with_its_parent
from mooring.stop_signals import PREEMPTION, is_unwanted


def run_with_restarts(
    first: Sequence[str],
    again: Sequence[str],
    restarts: int,
    *,
    note: Callable[[str], None],
) -> int:
    """Runs ``first``, and ``again`` as long as the command was taken down or crashed; returns its last exit code.

    An error that the user must put right ends the loop: it would come again. SIGTERM and SIGUSR1 are passed on and end
    the loop, too: the scheduler that sends them to this process wants both to end, and starts the job anew itself.
    Ctrl-C reaches the command by itself, from the terminal. Where this process is killed, the command gets SIGTERM.

    Args:
        first, again: the words of the command; ``again`` continues what ``first`` began.
        restarts: how often ``again`` may be started.
        note: told about each restart.

    Returns:
        the exit code as a shell has it: 128 and the signal's number for a command that was killed.
    """
    told_to_stop: list[int] = []
    running: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        told_to_stop.append(number)
        for process in running:
            process.send_signal(number)

    def wait_for_it(number: int, frame: FrameType | None) -> None:
        told_to_stop.append(number)

    handlers = {signal.SIGINT: wait_for_it, **dict.fromkeys(PREEMPTION, pass_on)}
    before = {
        number: signal.signal(number, handler)
        for number, handler in handlers.items()
        if not is_unwanted(number)
    }
    code = 0
    try:
        for attempt in range(restarts + 1):
            # a command without this process would go on, unknown to whoever starts it anew
            process = subprocess.Popen(again if attempt else first, preexec_fn=ended_with_its_parent())
            running[:] = [process]
            if told_to_stop and told_to_stop[-1] in PREEMPTION:  # came between two commands
                process.send_signal(told_to_stop[-1])
            code = process.wait()
            running.clear()
            if told_to_stop and code == -told_to_stop[-1] and told_to_stop[-1] in PREEMPTION:
                code = PREEMPTED  # it had not come so far as to say so itself
            if would_come_again(code) or told_to_stop or attempt == restarts:
                break
            note(
                f"{_what_happened(code)}: starting again from its newest state, restart {attempt + 1} of {restarts}"
            )
        return code if code >= 0 else 128 - code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _what_happened(code: int) -> str:
    if code < 0:
        return f"the run was killed by {_signal_name(-code)}"
    return {PREEMPTED: "the run was preempted", HUNG: "the run hung"}.get(
        code, f"the run failed with exit code {code}"
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
