"""What an artifact says about itself: a JSON document, version 1, read and written without loss.

It holds no time and no absolute path, so that the same input gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from tvm_ternary.errors import ArtifactError, LayoutError

FORMAT = "tvm-ternary"
VERSION = 2
DTYPES = (
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
)

_T = TypeVar("_T")


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type and shape of a model's input or output.

    Parameters
    ----------
    name : str
        As in the model file.
    dtype : str
        numpy's name, one of `DTYPES`.
    shape : tuple of int or str
        A number is fixed. A name is a dimension that the caller chooses; the same name is the same number in every
        tensor.

    Raises
    ------
    LayoutError
        If the dtype is none that the runtime can carry, or a dimension is negative or nameless.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise LayoutError(f"tensor {self.name}", f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        for dim in self.shape:
            valid = dim != "" if isinstance(dim, str) else type(dim) is int and dim >= 0
            if not valid:
                raise LayoutError(f"tensor {self.name}", f"has dimension {dim!r}; expected a number >= 0 or a name")

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class ModelInfo:
    """The model file: its name inside, its file name without folder, and its SHA-256."""

    name: str
    file: str
    sha256: str


@dataclass(frozen=True)
class LayerInfo:
    """What became of one matrix.

    Parameters
    ----------
    name : str
        The matrix.
    shape : (out_features, in_features)
        N and K.
    became : str
        ``ternary`` or ``float32``.
    scheme, kernel, layout : str or None
        None where it stayed float.
    bits_per_weight : float
        Scales and padding counted.
    schedule : str
        ``rule``, ``shipped``, ``tuned`` or ``dlight``.
    error : float or None
        Frobenius norm of (ternary - float) over that of float.
    reason : str or None
        Why it stayed float.
    epilogue : str or None
        What its kernel does to a product before storing it (``bias + gelu + residual``); with several uses that
        differ, each, after a semicolon. None where it does nothing.
    """

    name: str
    shape: tuple[int, ...]
    became: str
    scheme: str | None
    bits_per_weight: float
    kernel: str | None
    layout: str | None
    schedule: str
    error: float | None
    reason: str | None
    epilogue: str | None = None


@dataclass(frozen=True)
class FunctionInfo:
    """One compiled function of the library, the kernel it is (None for the rest of the graph) and who scheduled it."""

    name: str
    kernel: str | None
    schedule: str


@dataclass(frozen=True)
class TargetInfo:
    """The target's name, its TVM dictionary, and the CPU features the code needs (sorted, as in ``/proc/cpuinfo``)."""

    name: str
    tvm: dict[str, Any] = field(hash=False)
    features: tuple[str, ...]


@dataclass(frozen=True)
class WeightsInfo:
    """The weights' checksum and place.

    Parameters
    ----------
    sha256 : str
        Of the file, when they lie beside; otherwise of their contents (`tvm_ternary.build.artifact.describe_weights`).
    bytes : int
        Size of the tensors' data.
    file : str or None
        Name of the safetensors file, which lies in the artifact's folder. None: they are inside.
    names : tuple of str
        When beside: the parameters of ``main`` after the inputs, in order.
    """

    sha256: str
    bytes: int
    file: str | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # The name comes from a file and is opened: it must not lead out of the artifact's folder.
        if self.file is not None and ("/" in self.file or self.file in ("", ".", "..")):
            raise LayoutError("weights", f"file is {self.file!r}; expected a name without folder")


@dataclass(frozen=True)
class SizesInfo:
    """Bytes of all weights before and after."""

    weights_before: int
    weights_after: int


@dataclass(frozen=True)
class Manifest:
    """Everything an artifact says about itself; see the parts for their fields.

    ``bounds`` holds the largest value of a named dimension where the model sets one, by its table of positions for
    example; every named dimension is at least 1. ``versions`` maps a package (``tvm-ternary``, ``apache-tvm``,
    ``apache-tvm-ffi``) to its version.
    """

    model: ModelInfo
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    bounds: dict[str, int] = field(hash=False)
    scheme: str
    layers: tuple[LayerInfo, ...]
    functions: tuple[FunctionInfo, ...]
    target: TargetInfo
    versions: dict[str, str] = field(hash=False)
    weights: WeightsInfo
    sizes: SizesInfo

    def to_dict(self) -> dict[str, Any]:
        """Give the document as plain dictionaries, lists and scalars."""
        document = {"format": FORMAT, "version": VERSION, **asdict(self)}
        plain: dict[str, Any] = json.loads(json.dumps(document, allow_nan=False))
        return plain

    def to_json(self) -> str:
        """Give the document as text: sorted keys, one line, the same for equal manifests."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, subject: str = "manifest") -> Manifest:
        """Read the text that `to_json` gives.

        Parameters
        ----------
        text : str
            The document.
        subject : str
            What an error names, usually the artifact's path.

        Raises
        ------
        ArtifactError
            If it is not JSON, of another format or version, lacks a key, has an unknown one, or a value is of a wrong
            kind.
        """
        try:
            document = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ArtifactError(subject, f"the manifest is not JSON ({error})", "compile the model again") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ArtifactError(subject, f"the manifest is not of format {FORMAT!r}", "compile the model again")
        got = document.get("version")
        if isinstance(got, bool) or got != VERSION:
            raise ArtifactError(
                subject,
                f"the manifest has version {got!r}; expected {VERSION}",
                "compile the model again, or update tvm-ternary",
            )
        body = {key: value for key, value in document.items() if key not in ("format", "version")}
        return _manifest(_Reader(subject), body)


def _manifest(reader: _Reader, body: dict[str, Any]) -> Manifest:
    reader.check_keys(Manifest, body, "")
    return Manifest(
        model=reader.one(ModelInfo, body, "model"),
        inputs=reader.many(TensorSpec, body, "inputs"),
        outputs=reader.many(TensorSpec, body, "outputs"),
        bounds=reader.bounds(body),
        scheme=reader.value(str, body, "scheme"),
        layers=reader.many(LayerInfo, body, "layers"),
        functions=reader.many(FunctionInfo, body, "functions"),
        target=reader.one(TargetInfo, body, "target"),
        versions=reader.value(dict, body, "versions"),
        weights=reader.one(WeightsInfo, body, "weights"),
        sizes=reader.one(SizesInfo, body, "sizes"),
    )


# The JSON value that a field's annotation admits. Annotations are text here, because of the __future__ import.
_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "str | None": (str, type(None)),
    "float | None": (int, float, type(None)),
    "dict[str, Any]": (dict,),
    "tuple[int, ...]": (list,),
    "tuple[str, ...]": (list,),
    "tuple[int | str, ...]": (list,),
}


@dataclass(frozen=True)
class _Reader:
    """Turns JSON objects into the dataclasses above and names the key that is wrong."""

    subject: str

    def check_keys(self, kind: type, got: object, where: str) -> dict[str, Any]:
        place = f"manifest.{where}" if where else "the manifest"
        if not isinstance(got, dict):
            raise self._error(f"{place} is {type(got).__name__}; expected an object")
        names = {item.name for item in fields(kind)}
        for missing in sorted(names - got.keys()):
            raise self._error(f"{place} lacks {missing!r}")
        for extra in sorted(got.keys() - names):
            raise self._error(f"{place} has the unknown key {extra!r}")
        return got

    def value(self, kind: type[_T], body: Mapping[str, Any], key: str) -> _T:
        got = body[key]
        if not isinstance(got, kind):
            raise self._error(f"manifest.{key} is {type(got).__name__}; expected {kind.__name__}")
        return got

    def bounds(self, body: Mapping[str, Any]) -> dict[str, int]:
        found: dict[str, int] = self.value(dict, body, "bounds")
        for name, most in found.items():
            if type(most) is not int or most < 1:
                raise self._error(f"manifest.bounds.{name} is {most!r}; expected a number of at least 1")
        return found

    def one(self, kind: type[_T], body: Mapping[str, Any], key: str) -> _T:
        return self._build(kind, body[key], key)

    def many(self, kind: type[_T], body: Mapping[str, Any], key: str) -> tuple[_T, ...]:
        return tuple(self._build(kind, item, f"{key}[{i}]") for i, item in enumerate(self.value(list, body, key)))

    def _build(self, kind: type[_T], got: object, where: str) -> _T:
        found = self.check_keys(kind, got, where)
        values: dict[str, Any] = {}
        for item in fields(kind):  # type: ignore[arg-type]
            value = found[item.name]
            allowed = _KINDS[str(item.type)]
            if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
                raise self._error(f"manifest.{where}.{item.name} is {type(value).__name__}; expected {item.type}")
            values[item.name] = tuple(value) if isinstance(value, list) else value
        try:
            return kind(**values)
        except LayoutError as error:
            raise self._error(f"manifest.{where}: {error}") from error

    def _error(self, problem: str) -> ArtifactError:
        return ArtifactError(self.subject, problem, "compile the model again with this version of tvm-ternary")
