"""SECURITY.md promises nothing that no test holds: each row names tests, and each named test is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path


def rows(text: str) -> list[tuple[str, list[str]]]:
    """(promise, the tests it names) for each row of the table."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if (
            line.startswith("|")
            and len(cells) == 2
            and not set(cells[0]) <= set("-: ")
            and cells[0] != "promise"
        ):
            found.append((cells[0], re.findall(r"`(tests/[^`]+)`", cells[1])))
    return found


def test_every_promise_names_tests_that_exist(repository: Path) -> None:
    promised = rows((repository / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(promised) >= 15
    for promise, tests in promised:
        assert tests, f"no test is named for: {promise}"
        for named in tests:
            file, _, function = named.partition("::")
            path = repository / file
            assert path.is_file() and path.name.startswith("test_"), f"{promise}: there is no {file}"
            functions = {
                node.name
                for node in ast.parse(path.read_text(encoding="utf-8")).body
                if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
            }
            assert functions, f"{promise}: {file} holds no test"
            assert not function or function in functions, f"{promise}: {file} has no {function}"


def test_a_row_without_a_test_is_seen() -> None:
    table = "| promise | test |\n|---|---|\n| safe | none |\n| sound | `tests/x/test_x.py::test_y`, `tests/z.py` |"
    assert rows(table) == [("safe", []), ("sound", ["tests/x/test_x.py::test_y", "tests/z.py"])]
