"""The pure plan: ranks, words and environment of every launcher, and what contradicts itself."""

from __future__ import annotations

import base64
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooring.errors import ConfigError
from mooring.launch.hosts import Host
from mooring.launch.plan import (
    Program,
    Rendezvous,
    deepspeed_plan,
    local_plan,
    pdsh_plan,
    torchrun_plan,
    travelling,
)
from mooring.launch.request import LaunchRequest, launch_request
from mooring.launch.slurm import sbatch_script
from mooring.launch.words import decode_words, encode_words

HOSTS = (Host("node0", 2), Host("node1", 2), Host("node2", 2))
PROGRAM = Program("python", "mooring.cli", ("train", "data=my photos"), {"OMP_NUM_THREADS": "1"})
MEETING = Rendezvous("node0", 29501)
TRICKY = ("data=$(touch x)", "out=a b", "k='\"`;|&", "l=\nm", "ü=*")


def test_local_processes_have_their_ranks() -> None:
    plan = local_plan(PROGRAM, 3, port=1234)
    assert [command.environment["RANK"] for command in plan.commands] == ["0", "1", "2"]
    assert {command.environment["WORLD_SIZE"] for command in plan.commands} == {"3"}
    assert plan.commands[2].environment["LOCAL_RANK"] == "2"
    assert plan.commands[2].environment["OMP_NUM_THREADS"] == "1"
    assert plan.commands[0].argv == ("python", "-u", "-m", "mooring.cli", "train", "data=my photos")


def test_deepspeed_tells_every_node_the_whole_world() -> None:
    plan = deepspeed_plan(PROGRAM, (Host("a", 1), Host("b", 3)), MEETING)
    assert [command.ranks for command in plan.commands] == [range(1), range(1, 4)]
    assert plan.world_size == 4
    for node, command in enumerate(plan.commands):
        options = dict(word.split("=", 1) for word in command.argv if word.startswith("--") and "=" in word)
        world = json.loads(base64.urlsafe_b64decode(options["--world_info"]))
        assert world == {"a": [0], "b": [0, 1, 2]}
        assert (options["--node_rank"], options["--master_addr"], options["--master_port"]) == (
            str(node), "node0", "29501",
        )  # fmt: skip
        assert command.argv[-3:] == ("mooring.cli", "train", "data=my photos")


def test_torchrun_static_and_elastic() -> None:
    static = torchrun_plan(PROGRAM, HOSTS, MEETING)
    assert "--node-rank=2" in static.commands[2].argv
    assert {"--nnodes=3", "--nproc-per-node=2", "--master-addr=node0"} <= set(static.commands[1].argv)
    elastic = torchrun_plan(
        PROGRAM, HOSTS, Rendezvous("node0", backend="c10d", min_nodes=2, restarts=5, job="first")
    )
    assert {
        "--nnodes=2:3", "--max-restarts=5", "--rdzv-backend=c10d", "--rdzv-endpoint=node0:29500",
        "--rdzv-id=first", "--rdzv-conf=is_host=1", "--local-addr=node0",
    } <= set(elastic.commands[0].argv)  # fmt: skip
    assert "--rdzv-conf=is_host=0" in elastic.commands[1].argv
    assert not any(word.startswith("--node-rank") for word in elastic.commands[1].argv)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: deepspeed_plan(PROGRAM, HOSTS, Rendezvous("n", backend="c10d")), "add --torchrun"),
        (lambda: torchrun_plan(PROGRAM, HOSTS, Rendezvous("n", min_nodes=2)), "add --rendezvous c10d"),
        (lambda: torchrun_plan(PROGRAM, HOSTS, Rendezvous("n", backend="c10d", min_nodes=4)), "from 1 to 3"),
        (lambda: torchrun_plan(PROGRAM, (Host("a", 1), Host("b", 2)), MEETING), "equally many"),
    ],
)  # fmt: skip
def test_contradictions_are_named(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_printed_plan_is_what_a_shell_would_run() -> None:
    """Settings that a shell would change stay one word each."""
    text = torchrun_plan(Program("py", "m", TRICKY), HOSTS, MEETING).text()
    lines = [block.split("\n", 1)[1] for block in text.split("\n\n")[1:]]
    assert len(lines) == 3
    for line in lines:
        assert tuple(shlex.split(line)[-len(TRICKY) :]) == TRICKY


@given(st.lists(st.text(max_size=20), min_size=1, max_size=5))
def test_words_survive_their_encoding(words: list[str]) -> None:
    encoded = encode_words(words)
    assert decode_words(encoded) == words
    assert shlex.quote(encoded) == encoded or "=" in encoded


def test_encoded_words_run_the_module(tmp_path: Path) -> None:
    (tmp_path / "shows.py").write_text("import sys; print(sys.argv[1:])")
    done = subprocess.run(
        [sys.executable, "-m", "mooring.launch.words", encode_words(("shows", *TRICKY))],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"{list(TRICKY)}\n"


def test_pdsh_sees_only_words_that_no_shell_changes() -> None:
    plan = pdsh_plan(Program("py", "mooring.cli", TRICKY), "hosts", HOSTS, MEETING)
    (command,) = plan.commands
    assert command.ranks == range(6)
    assert decode_words(command.argv[-1]) == ["mooring.cli", *TRICKY]


def test_only_what_training_needs_travels() -> None:
    here = {
        "NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "v0", "PYTHONPATH": "x", "OMP_NUM_THREADS": "2", "HOME": "/r",
        "AWS_SECRET_ACCESS_KEY": "s", "CUDA_VISIBLE_DEVICES": "0", "TORCHELASTIC_RUN_ID": "1", "SSH_AUTH_SOCK": "y",
        "HF_TOKEN": "secret", "RANK": "3",
    }  # fmt: skip
    assert travelling(here, {"A": "b", "OMP_NUM_THREADS": "1"}) == {
        "NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "v0", "PYTHONPATH": "x", "OMP_NUM_THREADS": "1", "A": "b",
    }  # fmt: skip


# ---------------------------------------------------------------- requests


def request(*words: str, **options: Any) -> LaunchRequest:
    return launch_request(["train", *(words or ("data=x", "out=run"))], name="run", **options)


def test_the_launcher_follows_from_the_options(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("a slots=2\nb slots=2\n")
    assert request().launcher == "local"
    assert request(processes=3).plan().world_size == 3
    assert request(torchrun=True, processes=2).rendezvous.address == "127.0.0.1"
    remote = request(hostfile=hostfile)
    assert (remote.launcher, remote.rendezvous.address, remote.is_remote) == ("deepspeed", "a", True)
    assert request(hostfile=hostfile, torchrun=True).launcher == "torchrun"
    assert request(hostfile=hostfile, pdsh=True).launcher == "pdsh"
    assert request(slurm=True, nodes="2").launcher == "slurm"


def test_all_contradictions_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        request(
            pdsh=True, processes=2, nodes="3:2", sbatch=["x"], rendezvous="c10d", env=["A", "1=2"],
        )  # fmt: skip
    for word in (
        "--pdsh: needs",
        "--sbatch",
        "--rendezvous c10d: belongs",
        "got 'A'",
        "got '1=2'",
        "1 <= MIN",
    ):
        assert word in str(error.value)


def test_a_restart_continues_the_run() -> None:
    assert request("data=x", "resume=old", restarts=2).again().words == ("train", "data=x", "resume=auto")
    # torchrun restarts by itself: with the words it was given
    elastic = request(torchrun=True, rendezvous="c10d", restarts=2)
    assert elastic.words[-1] == "resume=auto"
    assert (elastic.restarts, elastic.rendezvous.restarts) == (0, 2)


def test_the_batch_script_quotes_settings_and_lets_slurm_choose(tmp_path: Path) -> None:
    asked = request(
        *TRICKY, slurm=True, nodes="4", gpus_per_node=8, sbatch=["partition=gpu", "exclusive", "nodes=5"]
    )
    assert asked.allocation is not None
    text = sbatch_script(asked.program, asked.allocation, asked.rendezvous, folder=tmp_path)
    options = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"partition=gpu", "exclusive", "nodes=5", "gpus-per-node=8", "ntasks-per-node=1"} <= set(options)
    assert "nodes=4" not in options  # the user's own option wins
    assert '--node-rank="$SLURM_NODEID"' in text
    assert '--master-addr="$first"' in text
    with pytest.raises(ConfigError, match="--sbatch"):
        bad = request(slurm=True, nodes="1", sbatch=["time=1 --wrap=x"])
        assert bad.allocation is not None
        sbatch_script(bad.program, bad.allocation, bad.rendezvous, folder=tmp_path)


def test_the_batch_script_runs_its_words_unchanged(tmp_path: Path) -> None:
    """bash itself, with stand-ins for what only a cluster has: ``srun`` runs its words on one node."""
    tools = tmp_path / "bin"
    tools.mkdir()
    stand_ins = {
        "scontrol": "#!/bin/sh\necho node0\nseq -f node%.0f 20000\n",  # more than a pipe holds
        "srun": '#!/bin/sh\nshift\nSLURM_NODEID=1 exec "$@"\n',
        "python": f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(tmp_path / "shows.py"))} "$@"\n',
    }
    (tmp_path / "shows.py").write_text("import json, sys; print(json.dumps(sys.argv[1:]))")
    for name, text in stand_ins.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    asked = request(*TRICKY, slurm=True, nodes="2", processes=3)
    assert asked.allocation is not None
    program = Program(str(tools / "python"), "mooring.cli", asked.words, {"A": "b c"})
    text = sbatch_script(program, asked.allocation, asked.rendezvous, folder=tmp_path)
    done = subprocess.run(
        ["bash"], input=text, capture_output=True, text=True, check=True, cwd=tmp_path,
        env={"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "node[0-1]"},
    )  # fmt: skip
    checked, words = map(json.loads, done.stdout.splitlines())
    assert checked == [
        "-m",
        "mooring.cli",
        "preflight",
        "--slurm",
        "--processes=3",
        "--master-port=29500",
        *TRICKY,
    ]
    assert {"--nnodes=2", "--nproc-per-node=3", "--node-rank=1", "--master-addr=node0"} <= set(words)
    assert words[words.index("mooring.cli") :] == ["mooring.cli", "train", *TRICKY, "resume=auto"]
