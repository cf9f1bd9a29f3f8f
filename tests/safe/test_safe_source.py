"""No source file of this project can run foreign code or open a connection: every call is looked at."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

# Modules that read code out of data, or talk to a network. What stands beside one may import it all the same.
UNPICKLERS = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "jsonpickle",
}
TEXT_FORMATS_WITH_CODE = {"yaml", "ruamel", "oyaml"}
NETWORK = {
    "socket", "ssl", "socketserver", "urllib", "urllib2", "urllib3", "http", "httpx", "requests", "aiohttp", "ftplib",
    "smtplib", "telnetlib", "xmlrpc", "websockets", "paramiko",
}  # fmt: skip
# (file, module or call) -> why it may
ALLOWED = {
    ("engine/mooring/models/weights.py", "pickle"): "catches the refusal of torch.load(weights_only=True)",
    (
        "engine/mooring/models/reachable.py",
        "socket",
    ): "is the server of a download there that the user asked for",
    ("engine/mooring/models/reachable.py", "urllib"): "as above: the proxy in front of it",
    ("engine/mooring/launch/hosts.py", "socket"): "this machine's own name",
    (
        "engine/mooring/launch/facts.py",
        "socket",
    ): "do the machines of a run reach each other, before it starts",
    ("bench/distributed/runs.py", "socket"): "a free port of this machine, where its own ranks meet",
    ("engine/mooring/launch/parent_death.py", "ctypes.CDLL"): "prctl of the C library that is loaded already",
    ("engine/mooring/launch/words.py", "runpy.run_module"): "what a command line of our own launcher names",
}
# called with a name that this project wrote down elsewhere: a table, a caller's literal, a benchmark, a build tool
DYNAMIC_IMPORTS = {
    "engine/mooring/__init__.py", "engine/mooring/errors.py", "engine/mooring/train/exactness.py", "bench/threads.py",
    "setup.py",
}  # fmt: skip

FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__",
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "torch.jit.load", "torch.hub.load",
    "torch.hub.load_state_dict_from_url", "torch.serialization.add_safe_globals", "torch.serialization.safe_globals",
    "np.lib.format.read_array", "numpy.lib.format.read_array", "ctypes.CDLL", "runpy.run_path", "runpy.run_module",
}  # fmt: skip


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of an expression; empty where it is no plain name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def full_names(tree: ast.AST) -> dict[str, str]:
    """Local name -> what it was imported as, so that ``from torch import load as l`` hides nothing."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def offences(file: str, text: str) -> Iterator[str]:
    """What in a source file breaks a promise, as ``file:line what``."""
    tree = ast.parse(text, file)
    names = full_names(tree)
    for node in ast.walk(tree):
        for what in _imported(file, node):
            yield f"{file}:{node.lineno} imports {what}"  # type: ignore[attr-defined]
        if isinstance(node, ast.Call):
            head, _, rest = dotted(node.func).partition(".")
            called = names.get(head, head) + (f".{rest}" if rest else "")
            for what in _called(file, node, called):
                yield f"{file}:{node.lineno} {what}"
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if is_trust(key) and not is_constant(value, False):
                    yield f"{file}:{node.lineno} sets trust_remote_code"


def is_trust(key: ast.expr | None) -> bool:
    return isinstance(key, ast.Constant) and key.value == "trust_remote_code"


def _imported(file: str, node: ast.AST) -> Iterator[str]:
    modules: list[str] = []
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        modules = [node.module]
    for module in modules:
        top = module.split(".")[0]
        if top in UNPICKLERS | TEXT_FORMATS_WITH_CODE | NETWORK and (file, top) not in ALLOWED:
            yield module


def _called(file: str, call: ast.Call, name: str) -> Iterator[str]:
    arguments = {keyword.arg: keyword.value for keyword in call.keywords}
    if None in arguments:  # **options: what is in them is looked at where the dictionary is written
        arguments.pop(None)
    if name in FORBIDDEN_CALLS and (file, name) not in ALLOWED:
        yield f"calls {name}"
    if name == "torch.load" and not is_constant(arguments.get("weights_only"), True):
        yield "calls torch.load without weights_only=True"
    if name in ("numpy.load", "np.load") and not is_constant(arguments.get("allow_pickle"), False):
        yield "calls numpy.load without allow_pickle=False"
    if "shell" in arguments and not is_constant(arguments["shell"], False):
        yield "passes shell="
    if "trust_remote_code" in arguments and not is_constant(arguments["trust_remote_code"], False):
        yield "passes trust_remote_code="
    if name in ("importlib.import_module", "import_module") and file not in DYNAMIC_IMPORTS:
        named = call.args[0] if call.args else None
        if not (isinstance(named, ast.Constant) and isinstance(named.value, str)):
            yield "imports a module whose name is not written here"


def sources(repository: Path) -> list[Path]:
    return [
        *(
            path
            for folder in ("engine", "kernels", "bench", "demo")
            for path in (repository / folder).rglob("*.py")
        ),
        repository / "setup.py",
    ]


def test_no_source_file_breaks_a_promise(repository: Path) -> None:
    files = sources(repository)
    assert len(files) > 200
    found = [
        offence
        for path in files
        for offence in offences(path.relative_to(repository).as_posix(), path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(sorted(found))


def test_every_exception_is_still_needed(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file, what in list(ALLOWED):
        monkeypatch.delitem(ALLOWED, (file, what))
        text = (repository / file).read_text(encoding="utf-8")
        assert any(what in offence for offence in offences(file, text)), f"{file} no longer needs {what}"


@pytest.mark.parametrize(
    "line",
    [
        "import torch\ntorch.load(p)",
        "import torch\ntorch.load(p, weights_only=False)",
        "import torch\ntorch.load(p, weights_only=safe)",
        "from torch import load\nload(p)",
        "import torch as t\nt.load(p)",
        "import pickle",
        "from pickle import loads",
        "import numpy as np\nnp.load(p)",
        "import numpy\nnumpy.load(p, allow_pickle=True)",
        "import yaml",
        "eval('1')",
        "def f():\n    exec(text)",
        "__import__(name)",
        "import subprocess\nsubprocess.run(c, shell=True)",
        "import subprocess\nsubprocess.run(c, shell=flag)",
        "import os\nos.system(c)",
        "from os import system as s\ns(c)",
        "AutoModel.from_pretrained(n, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "import socket",
        "from urllib.request import urlopen",
        "def f():\n    import requests",
        "import importlib\nimportlib.import_module(settings.method)",
        "from importlib import import_module\nimport_module(name)",
        "import torch\ntorch.serialization.add_safe_globals([x])",
        "import torch\ntorch.hub.load_state_dict_from_url(u)",
    ],
)
def test_an_offence_is_seen(line: str) -> None:
    assert list(offences("engine/mooring/sample.py", line)), line


@pytest.mark.parametrize(
    "line",
    [
        "import torch\ntorch.load(p, weights_only=True)",
        "import numpy as np\nnp.load(p, allow_pickle=False)",
        "model.eval()",
        "import re\nre.compile(p)",
        "import subprocess\nsubprocess.run(c)",
        "options = {'trust_remote_code': False}",
        "import importlib\nimportlib.import_module('nvidia.dali')",
    ],
)
def test_what_is_harmless_is_not(line: str) -> None:
    assert not list(offences("engine/mooring/sample.py", line)), line
