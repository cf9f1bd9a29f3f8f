"""Two machines on one: network and UTS namespaces joined by a virtual cable, with an ssh server in each.

Everything lies in a temporary folder and in namespaces of its own: keys, host names, addresses. The nodes share that
folder, but for ``local/`` in it, where each has a disk of its own. Root's own ssh files and the machine's network stay
untouched. Processes are ended by their ids: the namespaces share the machine's process numbers, and a ``pkill`` on one
"node" would reach the other.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

ADDRESSES = {"node0": "10.77.0.1", "node1": "10.77.0.2"}
CABLE = "v0"
_PROGRAMS = ("ip", "sshd", "ssh", "ssh-keygen", "unshare", "nsenter")
_INSTALL = "make two-nodes"


def require_two_nodes() -> None:
    """Skips the test, with the reason, where no namespaces can be made."""
    if os.geteuid() != 0:
        pytest.skip("two nodes on one machine need root (network namespaces)")
    missing = [name for name in _PROGRAMS if _program(name) is None]
    if missing:
        pytest.skip(f"two nodes on one machine need {', '.join(missing)}: {_INSTALL}")
    tried = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"this machine makes no namespaces: {tried.stderr.strip()}")


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


class TwoNodes:
    """The nodes, up. Use ``two_nodes()``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._spaces = {name: f"mooring-{os.getpid()}-{name}" for name in ADDRESSES}
        self._servers: dict[str, subprocess.Popen[str]] = {}
        self.settings: dict[str, str] = {}  # of the environment of every command

    @property
    def environment(self) -> dict[str, str]:
        """For a launch on node0: ssh finds its keys, gloo the cable."""
        return {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin",
            "GLOO_SOCKET_IFNAME": CABLE,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            **self.settings,
        }

    def command(self, node: str, words: Sequence[str]) -> list[str]:
        """``words`` as run on a node."""
        # not `ip netns exec`: that one hides the control groups, which Slurm looks for
        space = self._spaces[node]
        own = (
            f"mount --bind {self.folder / 'names'} /etc/hosts && "
            f"mount --bind {self.folder / f'disk-{node}'} {self.folder / 'local'} && "
            f'hostname {node} && exec "$@"'
        )
        return [
            "nsenter",
            f"--net=/run/netns/{space}",
            "unshare",
            "--uts",
            "--mount",
            "sh",
            "-c",
            own,
            "sh",
            *words,
        ]

    def start(
        self, words: Sequence[str], *, node: str = "node0", environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Starts a command on a node; its output is read by the caller."""
        return subprocess.Popen(
            self.command(node, words),
            cwd=self.folder,
            env=self.environment | dict(environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(
        self,
        words: Sequence[str],
        *,
        node: str = "node0",
        timeout: float = 600,
        environment: Mapping[str, str] | None = None,
    ) -> tuple[int, str]:
        """Runs a command on a node to its end: exit code and output."""
        process = self.start(words, node=node, environment=environment)
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            process.kill()
            process.wait()
        return process.returncode, output

    def bytes_over_the_cable(self) -> int:
        """Sent by node0 so far."""
        done = subprocess.run(
            ["ip", "netns", "exec", self._spaces["node0"], "cat", f"/sys/class/net/{CABLE}/statistics/tx_bytes"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return int(done.stdout)

    def cut_the_cable(self) -> None:
        self._ip("-n", self._spaces["node1"], "link", "set", CABLE, "down")

    def join_the_cable(self) -> None:
        self._ip("-n", self._spaces["node1"], "link", "set", CABLE, "up")

    def pids(self, node: str) -> list[int]:
        """Processes of a node, its ssh server included."""
        done = subprocess.run(
            ["ip", "netns", "pids", self._spaces[node]], capture_output=True, text=True, check=False
        )
        return [int(word) for word in done.stdout.split()]

    def switch_off(self, node: str) -> None:
        """All at once, as when the power fails."""
        for pid in self.pids(node):
            _kill(pid)
        self._servers.pop(node).wait()

    def switch_on(self, node: str) -> None:
        """Starts the node's ssh server, and waits until it listens."""
        server = subprocess.Popen(
            self.command(node, [str(_program("sshd")), "-D", "-e", "-f", str(self.folder / "sshd_config")]),
            stderr=subprocess.PIPE,
            text=True,
        )
        assert server.stderr is not None
        for line in server.stderr:
            if "Server listening" in line:
                break
        else:
            raise AssertionError(f"the ssh server of {node} did not start")
        self._servers[node] = server

    def wait_until_idle(self, node: str, *, seconds: float = 180) -> list[int]:
        """Until only ssh servers are left on a node; returns what is still there after that time.

        Behind a cut cable the server of a connection waits for the network's own timeouts; what it started does not.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            left = [pid for pid in self.pids(node) if _name(pid) not in ("", "sshd")]
            if not left:
                return []
            time.sleep(0.1)
        return left

    def up(self) -> None:
        Path("/run/sshd").mkdir(parents=True, exist_ok=True)
        self._write_files()
        for space in self._spaces.values():
            self._ip("netns", "add", space)
            self._ip("-n", space, "link", "set", "lo", "up")
        first, second = self._spaces.values()
        self._ip("link", "add", CABLE, "netns", first, "type", "veth", "peer", "name", CABLE, "netns", second)
        for name, space in self._spaces.items():
            self._ip("-n", space, "addr", "add", f"{ADDRESSES[name]}/24", "dev", CABLE)
            self._ip("-n", space, "link", "set", CABLE, "up")
        for name in self._spaces:
            self.switch_on(name)

    def down(self) -> None:
        for name, space in self._spaces.items():
            for pid in self.pids(name):
                _kill(pid)
            if name in self._servers:
                self._servers.pop(name).wait()
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)

    def _ip(self, *words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"

    def _write_files(self) -> None:
        folder = self.folder
        for name in ("id", "host"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True
            )
        shutil.copy(folder / "id.pub", folder / "authorized")
        (folder / "sshd_config").write_text(
            f"Port 22\nHostKey {folder / 'host'}\nAuthorizedKeysFile {folder / 'authorized'}\nStrictModes no\n"
            "UsePAM no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\nPidFile none\n"
        )
        (folder / "ssh_config").write_text(
            f"Host node0 node1\nUser root\nIdentityFile {folder / 'id'}\nIdentitiesOnly yes\n"
            f"StrictHostKeyChecking no\nUserKnownHostsFile {os.devnull}\nLogLevel ERROR\n"
        )
        for name in ("bin", "local", *(f"disk-{node}" for node in ADDRESSES)):
            (folder / name).mkdir()
        wrapper = folder / "bin" / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {_program("ssh")} -F {folder / "ssh_config"} "$@"\n')
        wrapper.chmod(0o755)
        names = [f"{address} {host}\n" for host, address in ADDRESSES.items()]
        (folder / "names").write_text("127.0.0.1 localhost\n" + "".join(names))
        (folder / "hosts").write_text("node0 slots=1\nnode1 slots=1\n")


def _name(pid: int) -> str:
    """Of a process; empty where it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@contextmanager
def two_nodes(folder: Path) -> Iterator[TwoNodes]:
    """Two nodes, up; taken down again whatever happens."""
    nodes = TwoNodes(folder)
    try:
        nodes.up()
        yield nodes
    finally:
        nodes.down()
