"""Hostfiles: what is read, and how errors point at their lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from mooring.errors import ConfigError
from mooring.launch.hosts import Host, parse_hosts, read_hostfile, same_slots


def test_comments_blanks_and_order(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# my machines\n\nnode1 slots=8   # rank 0\n  10.0.0.2  slots=4\nfe80::1 slots=1\n")
    assert read_hostfile(file) == (Host("node1", 8), Host("10.0.0.2", 4), Host("fe80::1", 1))


def test_all_wrong_lines_are_told_with_their_numbers() -> None:
    lines = [
        "node0 slots=2",
        "node1",
        "",
        "node2 slots=two",
        "node0 slots=2",
        "-oProxyCommand=x slots=1",
        "n slots=0",
    ]
    with pytest.raises(ConfigError) as error:
        parse_hosts(lines, origin="hosts")
    assert [line.strip() for line in str(error.value).splitlines()] == [
        "hosts is no hostfile:",
        "line 2: expected NAME slots=COUNT, got 'node1'",
        "line 4: expected slots to be an integer >= 1, got 'two'",
        "line 5: node0 stands already in line 1; add up its slots",
        "line 6: expected a host name or address, got '-oProxyCommand=x'",
        "line 7: expected slots to be an integer >= 1, got '0'",
    ]


@pytest.mark.parametrize("name", ["a;b", "$(id)", "a b", "a@b", "a/b", "--x", ".x", "ä"])
def test_a_name_is_never_more_than_a_name(name: str) -> None:
    with pytest.raises(ConfigError, match="line 1"):
        parse_hosts([f"{name} slots=1"], origin="hosts")


def test_an_empty_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no host"):
        parse_hosts(["# nothing"], origin="hosts")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hostfile(tmp_path / "none")


def test_torchrun_needs_equal_slots() -> None:
    assert same_slots([Host("a", 2), Host("b", 2)], needed_for="torchrun") == 2
    with pytest.raises(ConfigError, match="a slots=2, b slots=1"):
        same_slots([Host("a", 2), Host("b", 1)], needed_for="torchrun")
