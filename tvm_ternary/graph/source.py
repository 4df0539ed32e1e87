"""Every kind of model by one door."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_ternary.formats.tensor_files import checkpoint_files
from tvm_ternary.graph.importer import ImportedModel, import_onnx
from tvm_ternary.graph.models.checkpoint import import_checkpoint
from tvm_ternary.graph.models.gguf import GGUF, import_gguf
from tvm_ternary.graph.models.settings import FILE
from tvm_ternary.graph.passes.fix_inputs import fix_inputs
from tvm_ternary.graph.quantized import GRAPH, import_quantized, is_quantized

if TYPE_CHECKING:
    from hashlib import _Hash


def import_model(
    source: str | Path,
    dims: Mapping[str, int | str] | None = None,
    constants: Mapping[str, Any] | None = None,
    convolutions: Callable[[str], bool] = lambda name: False,
    *,
    past: bool = False,
) -> ImportedModel:
    """Import a model from wherever it is.

    Parameters
    ----------
    source : path
        An ``.onnx`` file, a checkpoint folder (``config.json`` and safetensors), a folder that ``tvm-ternary quantize``
        has written, or a ``.gguf`` file.
    dims : mapping, optional
        Values for symbolic dimensions, or what one is equal to: another, or arithmetic (``32*rows``); the others stay
        symbolic.
    constants : mapping, optional
        Values for inputs that are to become constants.
    convolutions : callable, optional
        Which weights of convolutions become matrices, by name; by default none. A quantized folder knows its own.
    past : bool
        Whether a decoder of a checkpoint or GGUF file gets keys and values of the past as inputs, and gives those of
        all tokens. A graph of ONNX has what it has.

    Returns
    -------
    ImportedModel

    Raises
    ------
    ModelError
        If a file is missing or damaged, or the architecture is not known.
    UnsupportedOperatorError
        If a node of a graph cannot be imported; names it.
    OptionError, InputError
        If a dimension or an input does not exist, or a value does not fit it.
    """
    path = Path(source)
    if path.is_dir():
        if is_quantized(path):
            return import_quantized(path, dims, constants, past=past)
        return fix_inputs(import_checkpoint(path, past=past), dims, constants)
    if path.suffix == GGUF:
        return fix_inputs(import_gguf(path, past=past), dims, constants)
    return import_onnx(path, dims, constants, convolutions=convolutions)


def model_digest(source: str | Path) -> str:
    """The SHA-256 of what `import_model` reads.

    Returns
    -------
    str
        Of a file its own; of a folder one over the names and contents of its configuration, graph and
        tensor files.
    """
    path = Path(source)
    digest = sha256()
    if not path.is_dir():
        _add_file(digest, path)
        return digest.hexdigest()
    for file in (path / FILE, path / GRAPH, *checkpoint_files(path)):
        if file.is_file():
            digest.update(file.name.encode() + b"\0")
            _add_file(digest, file)
    return digest.hexdigest()


def _add_file(digest: _Hash, path: Path) -> None:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
