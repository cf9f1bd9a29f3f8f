"""What hosts are asked before a training, and what their answers together say."""

from __future__ import annotations

import json
import socket
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mooring.launch import facts as facts_module
from mooring.launch.facts import Facts, Request, code_digest, data_digest, gather
from mooring.launch.findings import Answer, findings
from mooring.launch.hosts import Host
from mooring.launch.plan import Command, LaunchPlan
from mooring.launch.preflight import Preflight, check, preflight
from mooring.launch.request import launch_request
from mooring.launch.supervisor import LaunchError, Limits, Remote

GPU = {"name": "NVIDIA H200", "driver": "570.1", "memory": "143771 MiB"}
GOOD = Facts(
    name="node0", python="3.11.7", packages={"torch": "2.13.0"}, code="abc", data="manifest 0123",
    files={"/w.safetensors": "100 bytes"}, free_bytes=10**12, gpus=[GPU, GPU], meeting="reached",
)  # fmt: skip


def answers(*facts: Facts | None) -> list[Answer]:
    return [
        Answer(Host(f"node{i}", 2), fact, problem="" if fact else "Permission denied", clock=(0.01, 0.1))
        for i, fact in enumerate(facts)
    ]


def found(*facts: Facts | None) -> list[tuple[str, str, bool]]:
    return [(f.host, f.check, f.fatal) for f in findings(answers(*facts), need_bytes=1e9, port=29500)]


def test_equal_hosts_have_nothing_wrong() -> None:
    assert found(GOOD, GOOD, GOOD) == []
    assert Preflight(tuple(answers(GOOD, GOOD)), ()).ready


@pytest.mark.parametrize(
    ("change", "check", "fatal"),
    [
        ({"code": "abd"}, "Mooring's code", True),
        ({"data": "manifest 9999"}, "data", True),
        ({"data": "no data there"}, "data", True),
        ({"packages": {"torch": "2.12.0"}}, "torch", True),
        ({"packages": {}}, "torch", True),
        ({"python": "3.12.1"}, "Python", False),
        ({"files": {"/w.safetensors": "99 bytes"}}, "/w.safetensors", True),
        ({"files": {"/w.safetensors": "no file: No such file or directory"}}, "/w.safetensors", True),
        ({"gpus": [GPU]}, "GPUs", True),
        ({"gpus": [GPU, {**GPU, "driver": "535.9"}]}, "GPU driver", False),
        ({"gpus": [{**GPU, "name": "NVIDIA A100"}] * 2}, "GPU model", False),
        ({"free_bytes": 10**8}, "free disk", True),
        ({"meeting": "no way to node0:29500: timed out"}, "port", True),
    ],
)
def test_one_host_that_differs_is_named(change: dict[str, object], check: str, fatal: bool) -> None:
    assert found(GOOD, GOOD, replace(GOOD, **change)) == [("node2", check, fatal)]  # type: ignore[arg-type]


def test_the_majority_is_taken_to_be_right() -> None:
    assert found(replace(GOOD, code="old"), GOOD, GOOD) == [("node0", "Mooring's code", True)]
    (finding,) = findings(answers(replace(GOOD, code="old"), GOOD, GOOD), need_bytes=0, port=1)
    assert finding.expected == "abc, as on 2 hosts"


def test_silent_hosts_and_wrong_clocks() -> None:
    assert found(GOOD, None) == [("node1", "answers", True)]
    late = Answer(Host("node1", 2), GOOD, clock=(-90.0, 0.2))
    unsure = Answer(Host("node1", 2), GOOD, clock=(20.0, 19.0))
    (finding,) = findings([answers(GOOD)[0], late], need_bytes=0, port=1)
    assert (finding.check, finding.got, finding.fatal) == ("clock", "-90 s against this machine", False)
    assert findings([answers(GOOD)[0], unsure], need_bytes=0, port=1) == []


def test_what_is_fatal_comes_first_and_is_counted() -> None:
    result = Preflight(
        tuple(given := answers(replace(GOOD, python="3.12.0"), GOOD, replace(GOOD, data="no data there"))),
        tuple(findings(given, need_bytes=0, port=1)),
    )
    assert [finding.fatal for finding in result.found] == [True, False]
    with pytest.raises(LaunchError, match="1 of the lines"):
        result.require_ready()


# ---------------------------------------------------------------- facts


def test_the_code_digest_sees_one_changed_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "mooring"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1\n")

    class Spec:
        submodule_search_locations = (str(package),)

    monkeypatch.setattr(facts_module, "find_spec", lambda name: Spec if name == "mooring" else None)
    before = code_digest()
    assert code_digest() == before
    (package / "notes.txt").write_text("not code")
    assert code_digest() == before
    (package / "__init__.py").write_text("a = 2\n")
    assert code_digest() != before


def test_the_data_digest(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert data_digest(tmp_path, 10) == "no files there"
    (tmp_path / "a" / "x.jpg").write_bytes(b"1234")
    first = data_digest(tmp_path, 10)
    assert first.startswith("1 files ")
    (tmp_path / "a" / "x.jpg").write_bytes(b"12345")
    assert data_digest(tmp_path, 10) != first
    (tmp_path / "manifest.json").write_text(json.dumps({"digest": "f" * 64}))
    assert data_digest(tmp_path, 10) == "manifest " + "f" * 16
    (tmp_path / "manifest.json").write_text("{")
    assert data_digest(tmp_path, 10).startswith("no data that can be read")
    assert data_digest(tmp_path / "none", 10) == "no data there"
    assert data_digest(tmp_path, 10) != data_digest(tmp_path / "a" / "x.jpg", 10)


def asked(folder: Path, port: int, **more: object) -> Request:
    request = Request(
        data=str(folder), files=(str(folder / "w"),), out=str(folder / "not" / "yet"), address="127.0.0.1",
        port=port, first=True, visitors=1, seconds=30,
    )  # fmt: skip
    return replace(request, **more)  # type: ignore[arg-type]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_hosts_find_each_other_at_the_port(tmp_path: Path) -> None:
    port = free_port()
    got: list[Facts] = []
    listens = threading.Thread(target=lambda: got.append(gather(asked(tmp_path, port))))
    listens.start()
    visitor = gather(asked(tmp_path, port, first=False))
    listens.join()
    assert (visitor.meeting, got[0].meeting) == ("reached", "listened, 1 came")
    assert visitor.files == {str(tmp_path / "w"): "no file: No such file or directory"}
    assert visitor.free_bytes > 0
    assert Facts.from_json(json.dumps(asdict(visitor))) == visitor


def test_a_port_in_use_and_one_that_nobody_opens(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        assert gather(asked(tmp_path, port)).meeting.startswith(f"no free port {port}")
    lonely = gather(asked(tmp_path, port, first=False, seconds=0.3))
    assert lonely.meeting.startswith(f"no way to 127.0.0.1:{port}")


# ---------------------------------------------------------------- the whole check, on this machine


@pytest.mark.parametrize(
    "torchrun",
    [pytest.param(False, marks=pytest.mark.slow, id="deepspeed"), pytest.param(True, id="torchrun")],
)
def test_two_processes_are_ready(tmp_path: Path, torchrun: bool) -> None:
    (tmp_path / "x.jpg").write_bytes(b"1")
    hostfile = tmp_path / "hosts"
    hostfile.write_text("localhost slots=2\n")
    request = launch_request(
        ["train"],
        name="x",
        hostfile=hostfile,
        torchrun=torchrun,
        master_port=free_port(),
        env=["GLOO_SOCKET_IFNAME=lo"],
    )
    result = check(request, data=tmp_path, out=tmp_path, files=[], cwd=tmp_path)
    assert result.ready, result
    assert result.collective is not None
    assert (result.collective["world"], result.collective["backend"]) == (2, "gloo")
    assert result.answers[0].clock is not None
    assert abs(result.answers[0].clock[0]) <= result.answers[0].clock[1] + 1


def test_nothing_is_tried_where_something_is_missing(tmp_path: Path) -> None:
    request = launch_request(["train"], name="x", processes=2, master_port=free_port())
    result = check(request, data=tmp_path / "none", out=tmp_path, files=[], cwd=tmp_path)
    assert [finding.check for finding in result.found] == ["data"]
    assert result.collective is None
    assert not result.ready


def test_a_result_behind_a_host_name_is_read(tmp_path: Path) -> None:
    """pdsh puts the host's name before every line."""
    (tmp_path / "x.jpg").write_bytes(b"1")
    said = """print('node0: {"world": 2, "backend": "gloo", "gigabytes_per_second": 0.5}')"""
    host = Host("localhost", 2)
    result = preflight(
        [host],
        replace(asked(tmp_path, free_port()), files=()),
        collective=lambda: LaunchPlan("x", (Command(host, range(2), (sys.executable, "-c", said)),), 2),
        remote=Remote(),
        limits=Limits(connect=120, silence=120),
        cwd=str(tmp_path),
        python=sys.executable,
        environment={},
        need_bytes=0,
    )
    assert result.collective is not None and result.collective["world"] == 2
