"""Dependence runs one way: every import of both packages, function-level ones too, against design section 1."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

# room -> the other rooms of `mooring` it may import. A room is a subpackage, or a module at the top.
_GROUND = {
    "collectives",
    "errors",
    "exit_codes",
    "parsing",
    "distributed",
    "regular_file",
    "signs",
    "stop_signals",
    "syncing",
    "traffic",
}
ALLOWED: dict[str, set[str]] = {
    "exit_codes": set(),
    "signs": set(),
    "stop_signals": {"exit_codes"},
    "errors": {"exit_codes"},
    "parsing": set(),
    "regular_file": set(),
    "syncing": set(),
    "traffic": set(),
    "distributed": {"errors", "exit_codes", "traffic"},
    "collectives": {"distributed", "traffic"},
    "config": _GROUND,
    "launch": _GROUND | {"config"},
    "data": _GROUND | {"config"},
    "models": _GROUND | {"config"},
    "state": _GROUND | {"config"},
    "report": _GROUND | {"config", "data", "models"},
    "methods": _GROUND | {"config", "data", "models"},
    "train": _GROUND | {"config", "data", "models", "state", "report", "methods"},
    "comparison": _GROUND | {"config", "data", "report", "methods", "train"},
    "advice": _GROUND | {"config", "data", "models", "report", "methods", "train", "comparison"},
    "capacity": _GROUND | {"config", "data", "models", "methods"},
    "cli": _GROUND
    | {"capacity"}
    | {"config", "data", "models", "state", "report", "methods", "train", "launch", "comparison", "advice"},
}
MAY_USE_KERNELS = {"methods", "models", "train", "cli", "report"}
# Parts that a user may not have: imported inside functions only, so that `import mooring` works without.
OPTIONAL = {"nvidia", "deepspeed", "triton", "transformers", "apex"}


def imports(path: Path, package: str) -> Iterator[tuple[str, bool, int]]:
    """Each imported module, whether the import runs when the file is imported, and its line."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    deferred = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            # `from mooring import data` imports the room `data`
            names = [
                f"{base}.{alias.name}" if base in ("mooring", "mooring_kernels") else base
                for alias in node.names
            ]
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "mooring"
        ):
            names = [f"mooring.{node.attr}"]  # the lazy public names: an import in all but form
        for name in names:
            yield name, id(node) not in deferred, node.lineno  # type: ignore[attr-defined]


def files(root: Path, package: str) -> Iterator[tuple[Path, str]]:
    """Each source file with the dotted name of its package."""
    for path in sorted((root / package).rglob("*.py")):
        yield path, ".".join(path.relative_to(root).parent.parts)


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_every_room_of_the_engine_has_a_rule(repository: Path) -> None:
    source = repository / "engine" / "mooring"
    rooms = {p.name for p in source.iterdir() if (p / "__init__.py").is_file()}
    rooms |= {p.stem for p in source.glob("*.py")} - {"__init__", "__main__"}
    assert rooms <= set(ALLOWED), (
        f"add {sorted(rooms - set(ALLOWED))} to ALLOWED, and say what they may import"
    )


def test_the_engine_depends_one_way(repository: Path) -> None:
    root = repository / "engine"
    found = []
    for path, package in files(root, "mooring"):
        relative = path.relative_to(root / "mooring")
        room = relative.parts[0] if len(relative.parts) > 1 else relative.stem
        if room in ("__init__", "__main__"):
            continue  # the public names, from every room
        for name, _, line in imports(path, package):
            top = name.split(".")[0]
            if name in ("mooring", "mooring.__version__"):
                continue  # what is used of a bare `import mooring` is looked at by itself
            wrong = (
                (top == "mooring" and room_of(name) not in {room, *ALLOWED[room]})
                or (top == "mooring_kernels" and room not in MAY_USE_KERNELS)
                or top in ("bench", "tests", "demo")
            )
            if wrong:
                found.append(f"{relative}:{line} imports {name}; {room} may import {sorted(ALLOWED[room])}")
    assert not found, "\n".join(found)


def test_the_kernels_never_import_the_engine(repository: Path) -> None:
    root = repository / "kernels"
    found = [
        f"{path.relative_to(root)}:{line} imports {name}"
        for path, package in files(root, "mooring_kernels")
        for name, _, line in imports(path, package)
        if name.split(".")[0] in ("mooring", "bench", "tests", "demo")
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("folder,package", [("engine", "mooring"), ("kernels", "mooring_kernels")])
def test_optional_packages_are_imported_in_functions(repository: Path, folder: str, package: str) -> None:
    root = repository / folder
    # Triton kernels cannot be written without Triton: these files are imported by functions alone.
    triton_files = {
        "gpu.py",
        "gpu_cases.py",
        "tiles.py",
        "row_mean.py",
        "triton_launch.py",
        "ahead_of_time.py",
    }
    triton_modules = {name.removesuffix(".py") for name in triton_files} - {"triton_launch"}
    found = [
        f"{path.relative_to(root)}:{line} imports {name} at module level"
        for path, dotted in files(root, package)
        for name, at_import, line in imports(path, dotted)
        if at_import
        and (
            (name.split(".")[0] in OPTIONAL and path.name not in triton_files)
            or (name.split(".")[-1] in triton_modules and path.name not in triton_files)
        )
    ]
    assert not found, "\n".join(found)


def test_no_package_marker_lies_in_a_source_root(repository: Path) -> None:
    """`kernels` and `engine` are source roots, not packages: one of them would shadow another distribution."""
    for root in ("engine", "kernels"):
        assert not (repository / root / "__init__.py").exists()


def test_a_forbidden_import_is_seen(tmp_path: Path) -> None:
    """The walk itself: plain, from, relative, aliased and function-level imports."""
    file = tmp_path / "sample.py"
    file.write_text(
        "import mooring.train.engine as e\nfrom mooring import train\nfrom ..train import engine\n"
        "from . import scan\n\n\ndef f():\n    from mooring.train import engine\n"
        "    import mooring\n    mooring.Engine\n"
    )
    seen = [(name, at_import) for name, at_import, _ in imports(file, "mooring.data")]
    assert seen == [
        ("mooring.train.engine", True),
        ("mooring.train", True),
        ("mooring.train", True),
        ("mooring.data", True),
        ("mooring.train", False),
        ("mooring", False),
        ("mooring.Engine", False),
    ]
