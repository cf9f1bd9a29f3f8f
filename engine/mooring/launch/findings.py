"""What the machines' answers say together: what is wrong where, and what to do about it. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mooring.launch.facts import Facts
from mooring.launch.hosts import Host

GIGABYTE = 1e9
# Clocks are compared through a connection: what is less than the answer's delay cannot be told.
CLOCK_SECONDS = 5.0
_UNKNOWN = ("no ", "unknown")
_SLOWEST = "every step waits for the slowest"
_DRIVER = "install one driver, where NCCL complains"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        host: where.
        check: what was looked at.
        got, expected: in words.
        advice: what to do.
        fatal: the training would fail or go wrong; else it is only worth knowing.
    """

    host: str
    check: str
    got: str
    expected: str
    advice: str
    fatal: bool = True


@dataclass(frozen=True, slots=True)
class Answer:
    """What is known about one host: its facts, or why there are none; and its clock against ours in seconds."""

    host: Host
    facts: Facts | None
    problem: str = ""
    clock: tuple[float, float] | None = None  # offset, half the time the answer took


def findings(answers: Sequence[Answer], *, need_bytes: float, port: int) -> list[Finding]:
    """Everything that is wrong or worth knowing, host by host.

    Where machines differ, the majority is taken to be right, and of equals the first host.

    Args:
        answers: one a host, the one that runs rank 0 first.
        need_bytes: free disk space that the run folder needs on every host.
        port: where the processes will meet.
    """
    found = [
        Finding(
            answer.host.name,
            "answers",
            answer.problem,
            "an answer",
            f"try  ssh {answer.host.name} python3 --version  and install Mooring there",
        )
        for answer in answers
        if answer.facts is None
    ]
    there = [answer.facts for answer in answers if answer.facts is not None]
    names = [answer.host.name for answer in answers if answer.facts is not None]
    compared: list[tuple[str, list[str], str, bool]] = [
        ("Python", [facts.python for facts in there], "install the same version", False),
        ("Mooring's code", [facts.code for facts in there], "check out the same commit on every host", True),
        (
            "data",
            [facts.data for facts in there],
            "copy the same images there, or share one manifest folder",
            True,
        ),
        ("GPU model", [_one(gpu["name"] for gpu in facts.gpus) for facts in there], _SLOWEST, False),
        ("GPU driver", [_one(gpu["driver"] for gpu in facts.gpus) for facts in there], _DRIVER, False),
    ]
    for package in sorted({name for facts in there for name in facts.packages}):
        versions = [facts.packages.get(package, "not installed") for facts in there]
        compared.append((package, versions, "install the same requirements.txt on every host", True))
    for file in sorted({name for facts in there for name in facts.files}):
        sizes = [facts.files.get(file, "no file") for facts in there]
        compared.append((file, sizes, "copy the same file there", True))
    for check, values, advice, fatal in compared:
        found += _differing(check, names, values, advice, fatal)
    for answer in answers:
        found += _alone(answer, any(facts.gpus for facts in there), need_bytes, port)
    order = {answer.host.name: place for place, answer in enumerate(answers)}
    return sorted(found, key=lambda finding: (not finding.fatal, order[finding.host]))


def _alone(answer: Answer, with_gpus: bool, need_bytes: float, port: int) -> list[Finding]:
    """What can be told without the other hosts."""
    host, facts = answer.host, answer.facts
    if facts is None:
        return []
    found = []
    for check, text, advice in (
        ("data", facts.data, "give a path that exists on every host"),
        ("port", facts.meeting, f"open port {port} on {{first}}, or choose another with --master-port"),
        *((name, text, "copy the file there") for name, text in facts.files.items()),
    ):
        if text.startswith("no "):
            found.append(
                Finding(host.name, check, text, "it to be there", advice.replace("{first}", "the first host"))
            )
    if with_gpus and len(facts.gpus) < host.slots:
        found.append(
            Finding(
                host.name, "GPUs", f"{len(facts.gpus)}", f"{host.slots}, one a slot",
                "lower the host's slots, or look why nvidia-smi does not show them",
            )
        )  # fmt: skip
    if 0 <= facts.free_bytes < need_bytes:
        found.append(
            Finding(
                host.name, "free disk", f"{facts.free_bytes / GIGABYTE:.1f} GB",
                f"{need_bytes / GIGABYTE:.1f} GB", "free some space, or choose another out=",
            )
        )  # fmt: skip
    if answer.clock is not None:
        offset, doubt = answer.clock
        if abs(offset) - doubt > CLOCK_SECONDS:
            found.append(
                Finding(
                    host.name, "clock", f"{offset:+.0f} s against this machine", f"within {CLOCK_SECONDS:.0f} s",
                    "let chrony or ntpd set it: times in logs and certificates go wrong", fatal=False,
                )
            )  # fmt: skip
    return found


def _differing(
    check: str, names: Sequence[str], values: Sequence[str], advice: str, fatal: bool
) -> list[Finding]:
    """The hosts whose value is not the usual one; what is missing or unknown is told elsewhere."""
    known = [
        (name, value) for name, value in zip(names, values, strict=True) if not value.startswith(_UNKNOWN)
    ]
    if not known:
        return []
    usual = Counter(value for _, value in known).most_common(1)[0][0]
    who = [name for name, value in known if value == usual]
    expected = f"{usual}, as on {who[0] if len(who) == 1 else f'{len(who)} hosts'}"
    return [Finding(name, check, value, expected, advice, fatal) for name, value in known if value != usual]


def _one(values: Iterable[str]) -> str:
    """The one value, or all that there are; "no GPU" where there is none."""
    return ", ".join(sorted(set(values))) or "no GPU"


def overview(answers: Sequence[Answer], found: Sequence[Finding]) -> Mapping[str, str]:
    """One line a check: what the hosts have in common."""
    facts = [answer.facts for answer in answers if answer.facts is not None]
    if not facts:
        return {}
    gpus = sum(len(fact.gpus) for fact in facts)
    wrong = {finding.check for finding in found if finding.fatal}
    lines = {
        "hosts": f"{len(facts)} of {len(answers)} answered",
        "Mooring's code": facts[0].code,
        "data": facts[0].data,
        "GPUs": f"{gpus}" if gpus else "none: CPUs only",
        "free disk": f"at least {min(fact.free_bytes for fact in facts) / GIGABYTE:.0f} GB",
    }
    return {check: text for check, text in lines.items() if check not in wrong}
