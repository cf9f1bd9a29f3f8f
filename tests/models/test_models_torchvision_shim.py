"""The shim is tried in fresh processes: in this one timm may be imported already."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("first_try", ["", "try: import torchvision\nexcept RuntimeError: pass\n"])
def test_timm_and_torchmetrics_import_after_the_shim(first_try: str) -> None:
    code = (
        first_try
        + "from mooring.models.torchvision_shim import import_timm, import_torchvision\n"
        + "timm = import_timm(); tv = import_torchvision(); assert import_torchvision() is tv\n"
        + "import torchmetrics, torch\n"
        + "from torchvision.transforms import v2\n"
        + "print(tuple(v2.CenterCrop(2)(torch.zeros(3, 4, 4)).shape), timm.is_model('resnet18'))"
    )
    assert run(code) == "(3, 2, 2) True"


def test_another_failure_of_torchvision_is_not_hidden(tmp_path) -> None:
    broken = tmp_path / "torchvision"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('quite another reason')")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from mooring.models.torchvision_shim import import_torchvision\n"
        "try: import_torchvision()\n"
        "except RuntimeError as err: print(err)"
    )
    assert run(code) == "quite another reason"
