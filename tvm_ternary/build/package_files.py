"""What goes into a package: libraries, the runtime half of this package, headers, licences, texts."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from tvm_ternary.build.runner import BINARY, SOURCES
from tvm_ternary.errors import HostError
from tvm_ternary.runtime.artifact import Artifact
from tvm_ternary.runtime.library import CUDART, VARIABLE_CUDART, find_cudart, find_runtime, find_runtime_cuda
from tvm_ternary.runtime.manifest import TensorSpec
from tvm_ternary.runtime.weights import read_weights

# The half of this package that runs artifacts.
_RUNTIME_HALF = ("__init__.py", "errors.py", "target", "runtime")
# Parts of tvm_ffi that are for building against it. Its library for tests is none: the Python binding is linked to it.
_NOT_TO_RUN = (
    "__pycache__",
    "include",
    "src",
    "3rdparty",
    "share",
    "cython",
    "CMakeLists.txt",
    "*.pyi",
)
_DISTRIBUTIONS = ("tvm-ternary", "apache-tvm", "apache-tvm-ffi", "typing_extensions")
_LICENCE = re.compile("licen[cs]e|notice|copying|eula", re.IGNORECASE)


def runtime_libraries(artifact: Artifact) -> list[Path]:
    """Give the shared libraries that a run of an artifact loads, the driver's left out.

    Raises
    ------
    HostError
        If one is not found.
    """
    beside = artifact.path.parent
    found = [package_folder("tvm_ffi") / "lib" / "libtvm_ffi.so", find_runtime(beside)]
    if artifact.manifest.target.device == "cuda":
        cudart = find_cudart(beside)
        if isinstance(cudart, str):
            hint = f"install nvidia-cuda-runtime, or name the file in {VARIABLE_CUDART}"
            raise HostError(CUDART, "CUDA's runtime library was not found", hint)
        found += [find_runtime_cuda(beside), cudart]
    return found


def package_folder(name: str) -> Path:
    """Give the folder of an installed module.

    Raises
    ------
    HostError
        If it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise HostError(name, "is not installed", "install apache-tvm-ffi==0.1.14.post1")
    return Path(spec.origin).parent


def copy_model(artifact: Artifact, folder: Path) -> None:
    """Copy the artifact, and its weights where they lie beside it, after checking them."""
    info, source = artifact.manifest.weights, artifact.path.parent
    if info.file is not None:
        read_weights(source, info)
        shutil.copyfile(source / info.file, folder / info.file)
    shutil.copyfile(artifact.path, folder / artifact.path.name)


def copy_headers(folder: Path) -> None:
    """Copy what `runner.cpp` includes."""
    for name in ("dlpack", "tvm"):
        shutil.copytree(package_folder("tvm_ffi") / "include" / name, folder / name)


def copy_python(folder: Path) -> None:
    """Copy what ``run.py`` imports beside numpy."""
    ours, ignore = Path(__file__).parents[1], shutil.ignore_patterns(*_NOT_TO_RUN)
    (folder / "tvm_ternary").mkdir(parents=True)
    for name in _RUNTIME_HALF:
        if (ours / name).is_dir():
            shutil.copytree(ours / name, folder / "tvm_ternary" / name, ignore=ignore)
        else:
            shutil.copyfile(ours / name, folder / "tvm_ternary" / name)
    shutil.copytree(package_folder("tvm_ffi"), folder / "tvm_ffi", ignore=ignore)
    shutil.copyfile(package_folder("typing_extensions") / "typing_extensions.py", folder / "typing_extensions.py")
    # tvm_ffi finds its library by the list of files in here; without it, by that of another copy that is installed.
    shutil.copytree(_metadata("apache-tvm-ffi"), folder / _metadata("apache-tvm-ffi").name)


def copy_licences(folder: Path, libraries: Sequence[Path]) -> None:
    """Copy the licences of all that is in the package, those of CUDA where its library is."""
    folder.mkdir()
    for name in _DISTRIBUTIONS:
        for file in _metadata(name).rglob("*"):
            if file.is_file() and _LICENCE.search(file.name):
                shutil.copyfile(file, folder / f"{name}-{file.name}")
    for library in libraries:
        if library.name == CUDART:
            # Of the package nvidia-cuda-runtime (in site-packages/nvidia/cu13/lib), or of a CUDA toolkit.
            places = [*library.parents[3].glob("nvidia_cuda_runtime-*.dist-info/**/*"), *library.parents[1].glob("*")]
            for file in places:
                if file.is_file() and _LICENCE.search(file.name):
                    shutil.copyfile(file, folder / f"cuda-{file.name}")


def write_texts(folder: Path, artifact: Artifact, command: str, built: bool) -> None:
    """Write ``run.py``, ``runner.cpp`` and ``README.txt``.

    Parameters
    ----------
    folder : Path
        The package, otherwise complete.
    artifact : Artifact
    command : str
        Builds the runner.
    built : bool
        Whether it has been built here.
    """
    manifest, cuda = artifact.manifest, artifact.manifest.target.device == "cuda"
    inputs = [f"{re.sub('[^A-Za-z0-9._-]', '_', spec.name)}.npy" for spec in manifest.inputs]
    values = {
        "NAME": manifest.model.name,
        "MODEL": artifact.path.name,
        "MODEL_FILE": f"{artifact.path.name:12}",
        "TARGET": manifest.target.name,
        "ARCHITECTURE": artifact.architecture,
        "BESIDE": "NVIDIA's driver for CUDA 13.0 or later and " if cuda else "",
        "INPUTS": " ".join(inputs),
        "BINARY": f"{BINARY} was built from it here" if built else "There was no C++ compiler to build it here",
        "COMMAND": command,
        "PYTHON": _python_version(),
        "FFI": importlib.metadata.version("apache-tvm-ffi"),
        "INPUT_SPECS": _lines(manifest.inputs),
        "OUTPUT_SPECS": _lines(manifest.outputs),
        "CUDA": f"; that of {CUDART} is NVIDIA's" if cuda else "",
    }
    for name in ("run.py", "README.txt"):
        text = (SOURCES / name).read_text()
        (folder / name).write_text(re.sub("@([A-Z_]+)@", lambda found: values[found[1]], text))
    shutil.copyfile(SOURCES / "runner.cpp", folder / "runner.cpp")


def _metadata(distribution: str) -> Path:
    """Give the folder that describes an installed distribution."""
    found = importlib.metadata.distribution(distribution)
    record = next(file for file in found.files or () if file.name == "RECORD")
    return Path(str(found.locate_file(record))).parent


def _python_version() -> str:
    """Tell which Python the copied binary of tvm_ffi is for, by its name."""
    (core,) = (file.name for file in package_folder("tvm_ffi").glob("core.*.so"))
    version = re.search("cpython-3([0-9]+)", core)
    return f"Python 3.{version[1]}" if version else "Python 3.12 or later"


def _lines(specs: Sequence[TensorSpec]) -> str:
    return "\n".join(f"    {spec}" for spec in specs) or "    none"
