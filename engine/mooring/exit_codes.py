"""What the exit code of a command says, and whether the same command could do better a second time."""

from __future__ import annotations

DONE = 0
CRASHED = (
    1  # an error nobody expected (Python's own code); of `mooring resume --check`: the run would not be exact
)
USER_ERROR = 2  # settings, data, weights, a refused resume, a full disk: something the user can put right
LOST = 69  # another process, or its machine or link, is lost (EX_UNAVAILABLE of sysexits.h)
HUNG = 74  # nothing moved for too long
PREEMPTED = 75  # a scheduler's signal: saved, and to be continued (EX_TEMPFAIL)
INTERRUPTED = 130  # Ctrl-C

# of a shell or an agent: the program was not found, or could not be run
_NOT_STARTED = (126, 127)


def would_come_again(code: int) -> bool:
    """Whether a command that ended so would end so again: it is not to be started a second time by itself.

    Args:
        code: exit code; negative: ended by that signal.
    """
    return code in (DONE, USER_ERROR, INTERRUPTED, *_NOT_STARTED)


def gravest(codes: list[int]) -> int:
    """The code that tells most about a job whose processes ended with these: a cause before what it brings about."""
    order = (USER_ERROR, HUNG, PREEMPTED, INTERRUPTED)
    failed = [code for code in codes if code]
    for code in order:
        if code in failed:
            return code
    return next((code for code in failed if code not in (LOST, CRASHED)), max(failed, default=DONE))
