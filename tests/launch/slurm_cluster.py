"""A real Slurm cluster on the two nodes of ``two_nodes``: controller and node daemons, with a key of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from two_nodes import ADDRESSES, TwoNodes

_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "munged", "setpriv")


def require_slurm() -> None:
    """Skips the test, with the reason, where Slurm is not installed."""
    missing = [
        name for name in _PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None
    ]
    if missing:
        pytest.skip(f"no Slurm here ({', '.join(missing)}): make two-nodes")


class Slurm:
    """The cluster, up. Use ``slurm()``."""

    def __init__(self, nodes: TwoNodes) -> None:
        self.nodes = nodes
        self.folder = nodes.folder / "slurm"
        self._daemons: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> Mapping[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *words: str) -> str:
        """A Slurm command on node0; its output."""
        code, output = self.nodes.run(words, environment=self.environment, timeout=180)
        assert code == 0, output
        return output

    def state(self, job: str) -> str:
        """``PENDING``, ``RUNNING``, ``COMPLETED``, ``FAILED``, ..."""
        shown = self.run("scontrol", "show", "job", job, "--oneliner")
        return next(word.removeprefix("JobState=") for word in shown.split() if word.startswith("JobState="))

    def wait_for(self, job: str, *, seconds: float = 600) -> str:
        """The job's last state."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            assert time.monotonic() < deadline, f"job {job} is still {state}"
            time.sleep(0.5)
        return state

    def up(self) -> None:
        keys = self.folder / "munge"
        keys.mkdir(parents=True)
        owner = pwd.getpwnam("munge")
        (keys / "key").write_bytes(os.urandom(1024))
        (keys / "key").chmod(0o400)
        # munged insists on folders that nobody else can write, up to the root
        for path in (keys, keys / "key"):
            os.chown(path, owner.pw_uid, owner.pw_gid)
        for folder in (keys, *keys.parents):
            if folder.stat().st_uid == 0 and folder.stat().st_mode & 0o055 != 0o055 and folder != Path("/"):
                folder.chmod(folder.stat().st_mode | 0o055)
        self._configure(keys)
        self._daemon(
            "node0", "setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups", "munged",
            "--foreground", f"--socket={keys / 'socket'}", f"--key-file={keys / 'key'}",
            f"--log-file={keys / 'log'}", f"--pid-file={keys / 'pid'}", f"--seed-file={keys / 'seed'}",
        )  # fmt: skip
        self._until(lambda: (keys / "socket").exists(), "munged")
        self._daemon("node0", "slurmctld", "-D")
        for node in ADDRESSES:
            self._daemon(node, "slurmd", "-D", "-N", node)
        self._until(lambda: self._idle() == len(ADDRESSES), "the nodes of the cluster")

    def down(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()  # unshare and ip exec into the daemon: this is its process
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _idle(self) -> int:
        code, output = self.nodes.run(
            ["sinfo", "--noheader", "--Node", "--format=%T"], environment=self.environment, timeout=60
        )
        return output.split().count("idle") if code == 0 else 0

    @staticmethod
    def _until(ready, what: str) -> None:  # type: ignore[no-untyped-def]
        deadline = time.monotonic() + 180
        while not ready():
            assert time.monotonic() < deadline, f"{what} did not start"
            time.sleep(0.2)

    def _daemon(self, node: str, *words: str) -> None:
        log = (self.folder / f"{words[0]}-{node}.log").open("wb")
        self._daemons.append(
            subprocess.Popen(
                self.nodes.command(node, words),
                env={**os.environ, **self.environment, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        )

    def _configure(self, keys: Path) -> None:
        for name in ("state", *(f"spool-{node}" for node in ADDRESSES)):
            (self.folder / name).mkdir()
        lines = [
            "ClusterName=test",
            f"SlurmctldHost=node0({ADDRESSES['node0']})",
            "SlurmUser=root",
            "SlurmdUser=root",
            "AuthType=auth/munge",
            f"AuthInfo=socket={keys / 'socket'}",
            "CryptoType=crypto/munge",
            f"StateSaveLocation={self.folder / 'state'}",
            f"SlurmdSpoolDir={self.folder}/spool-%n",
            f"SlurmctldPidFile={self.folder}/slurmctld.pid",
            f"SlurmdPidFile={self.folder}/slurmd-%n.pid",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "MpiDefault=none",
            "ReturnToService=2",
            "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none",
            *(
                f"NodeName={name} NodeAddr={address} CPUs=1 State=UNKNOWN"
                for name, address in ADDRESSES.items()
            ),
            f"PartitionName=all Nodes={','.join(ADDRESSES)} Default=YES MaxTime=INFINITE State=UP",
        ]
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")


@contextmanager
def slurm(nodes: TwoNodes) -> Iterator[Slurm]:
    """A cluster of both nodes, up; taken down again whatever happens."""
    cluster = Slurm(nodes)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
