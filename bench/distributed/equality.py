"""``python -m bench.distributed.equality``: every method x ViT and CNN x plain data parallelism and every ZeRO stage x
2 and 4 gloo ranks, held against one process; one record a cell. Arguments go to tests/distributed/equality_table.py.
"""

from __future__ import annotations

import os
import subprocess
import sys

from bench.environment import ROOT

_SETTINGS = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    # the cases are those of the tests, which nothing imports: a process of their own
    path = [str(ROOT), str(ROOT / "tests" / "methods"), os.environ.get("PYTHONPATH", "")]
    script = ROOT / "tests" / "distributed" / "equality_table.py"
    environment = os.environ | _SETTINGS | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    raise SystemExit(subprocess.run([sys.executable, script, *sys.argv[1:]], env=environment).returncode)


if __name__ == "__main__":
    main()
