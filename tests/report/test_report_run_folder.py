"""Run folders: where they are made, and what is refused before hours are spent."""

from __future__ import annotations

import errno
import json
import os
import signal
from datetime import datetime
from pathlib import Path

import pytest

from mooring.config.load import load_config
from mooring.errors import RunFolderError
from mooring.report.environment import collect_environment, write_environment
from mooring.report.run_folder import RunFolder, default_run_name, existing_run, is_run, open_run_folder

NOW = datetime(2026, 1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["data=my photos"], "my_photos-tf_efficientnet_lite0-dr_tune-20260102-030405"),
        (["data=a/list.csv", "method=lp_ft"], "list-tf_efficientnet_lite0-lp_ft-20260102-030405"),
        (["data=/", "model.name=local-dir:/x/vit tiny"], "data-vit_tiny-dr_tune-20260102-030405"),
        (["data=photos.v2"], "photos.v2-tf_efficientnet_lite0-dr_tune-20260102-030405"),
        (["data=bücher/..hidden"], "hidden-tf_efficientnet_lite0-dr_tune-20260102-030405"),
    ],
)
def test_default_name(overrides: list[str], name: str) -> None:
    assert default_run_name(load_config(None, overrides), NOW) == name


def test_a_fresh_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    folder = open_run_folder(tmp_path / "a" / "b")
    assert folder.path.is_dir()
    assert not list(folder.path.iterdir())
    assert open_run_folder(tmp_path / "a" / "b").path == folder.path, "an empty folder may be used"


def test_what_a_kill_leaves_of_a_small_file_is_no_obstacle_and_removed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    open_run_folder(run)
    child = os.fork()
    if child == 0:
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        RunFolder(run).write_text("config.toml", "seed = 0\n")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (left,) = run.iterdir()
    assert left.name.startswith(".config.toml.")
    assert not is_run(run)  # what resume=auto asks
    open_run_folder(run).remove_unfinished()
    assert not list(run.iterdir())
    (run / ".config.toml.swp").write_text("mine")
    with pytest.raises(RunFolderError, match="which is not empty"):
        open_run_folder(run)


def test_what_cannot_be_a_run_folder_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(RunFolderError, match="expected a folder, got the file"):
        open_run_folder(file)
    with pytest.raises(
        RunFolderError, match=r"not empty: choose another out=, or continue that run with resume="
    ):
        open_run_folder(tmp_path)
    with pytest.raises(RunFolderError, match="can be written"):
        open_run_folder(file / "below")
    with pytest.raises(RunFolderError, match=r"got a folder without config\.toml"):
        open_run_folder(tmp_path, resume=True)
    with pytest.raises(RunFolderError, match="got nothing"):
        existing_run(tmp_path / "nowhere")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0:  # permission bits do not stop root, but no one makes folders in /proc
        place = Path("/proc")
        if not (place / "self").exists():
            pytest.skip("root writes everywhere on this system")
    else:
        tmp_path.chmod(0o500)
        place = tmp_path
    with pytest.raises(
        RunFolderError, match=r"expected a folder that can be written, .*; choose another out="
    ):
        open_run_folder(place / "run")


def test_a_full_disk_is_noticed_first(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"at least 1000000000000000 MB free"):
        open_run_folder(tmp_path / "run", need_bytes=10**21)


def test_who_continues_is_not_told_to_choose_another_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunFolder(tmp_path).write_text("config.toml", "seed = 0\n")
    with pytest.raises(RunFolderError, match=r"got \d+ MB: free some space$"):
        open_run_folder(tmp_path, resume=True, need_bytes=10**21)

    def read_only(**arguments: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(
        RunFolderError, match=r"Read-only file system; put that right: a run goes on in its own"
    ):
        open_run_folder(tmp_path, resume=True)


def test_the_folder_to_continue_may_hold_a_run(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_text("config.toml", "seed = 0\n")
    assert open_run_folder(tmp_path, resume=True) == existing_run(tmp_path) == RunFolder(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["metrics.jsonl", "tensorboard", "heartbeat/.rank-0.part", "model/config.json.partial", ".curves.png"],
)
def test_a_folder_to_continue_has_no_links_where_it_is_written_over(name: str, tmp_path: Path) -> None:
    run, victim = tmp_path / "run", tmp_path / "victim"
    (run / name).parent.mkdir(parents=True)
    (run / "config.toml").write_text("")
    victim.touch()
    (tmp_path / "elsewhere").mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "elsewhere")  # on a larger disk: what lies in it is checked
    open_run_folder(run, resume=True)
    (run / name).symlink_to(victim)
    with pytest.raises(RunFolderError, match=f"{name}: .*symbolic link to {victim}"):
        open_run_folder(run, resume=True)


def test_json_files(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(RunFolderError, match=r"expected result\.json, got none"):
        folder.read_json("result.json")
    folder.write_json("result.json", {"top1": float("nan")})
    assert folder.read_json("result.json") == {"top1": "nan"}
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(RunFolderError, match="expected JSON"):
        folder.read_json("result.json")


def test_environment_names_what_ran_and_not_who(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "somebody"))
    monkeypatch.setattr("sys.argv", ["mooring", "train", f"data={tmp_path}/somebody/photos"])
    found = collect_environment()
    assert found["command"] == ["mooring", "train", "data=~/photos"]
    assert {"torch", "timm", "numpy"} <= set(found["packages"])
    assert found["cpu"]["threads"] >= 1
    assert set(found["parts"]) >= {"CUDA", "DALI", "Triton", "DeepSpeed", "Apex", "torchvision ops"}
    assert "somebody" not in json.dumps(found)


def test_a_continued_run_keeps_the_earlier_environments(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for parts in range(3):
        write_environment(folder)
        assert len(folder.read_json("environment.json").get("earlier", [])) == parts
