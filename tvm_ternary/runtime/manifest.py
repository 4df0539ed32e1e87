"""What an artifact says about itself: a JSON document, version 5, read and written without loss.

It holds no time and no absolute path, so that the same input gives the same bytes.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from tvm_ternary.errors import ArtifactError, LayoutError
from tvm_ternary.runtime.reader import Reader

FORMAT = "tvm-ternary"
VERSION = 5

SMALL_OUTPUT = 1 << 16
"""Bytes below which a runtime copies an output. A larger one is never memory of the library's weights."""
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
    "bfloat16",
    "float32",
    "float64",
)
DEVICES = ("cpu", "cuda")
# 90 is compute capability 9.0; an "a" at the end is code for no other capability than this one.
_ARCH = re.compile("sm_[0-9]{2,3}a?")


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type and shape of a model's input or output.

    Parameters
    ----------
    name : str
        As in the model file.
    dtype : str
        One of `DTYPES`; `tvm_ternary.runtime.arrays.dtype_of` gives numpy's.
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
    """What became of one matrix or table.

    Parameters
    ----------
    name : str
        As in the model.
    shape : (out_features, in_features)
        N and K; of a table, its own.
    became : str
        ``ternary``; ``int8``, a table of rows with a scale each; or ``float32``.
    scheme, kernel, layout : str or None
        None where it did not become ternary.
    bits_per_weight : float
        Scales and padding counted.
    schedule : str
        ``rule``, ``shipped``, ``tuned`` or ``dlight``.
    error : float or None
        Frobenius norm of (what it became - float) over that of float.
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
    """One compiled function of the library, the kernel it is (None for the rest of the graph) and who scheduled it.

    ``layers`` says whose weights its first call in a run reads, its second, and so on: names of ``Manifest.layers``, or
    empty for weights without a name. It is empty altogether where a run does not always make the same calls.
    """

    name: str
    kernel: str | None
    schedule: str
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class TargetInfo:
    """What the code was made for and asks of the host.

    Parameters
    ----------
    name : str
        As ``--target`` takes it.
    tvm : dict
        The TVM target.
    features : tuple of str
        CPU features the code needs, sorted, as in ``/proc/cpuinfo``.
    device : str
        Where the model runs: ``cpu`` or ``cuda``.
    archs : tuple of str
        GPU architectures that there is machine code for, such as ``sm_90``; empty on the CPU.
    ptx : str or None
        The architecture, ``sm_90``, whose PTX is inside as well: the driver compiles it for any later GPU.
    cuda : str or None
        Version of the nvcc that made the machine code, ``13.0``. The driver must know this major version.

    Raises
    ------
    LayoutError
        If the device is none of these, or machine code for GPUs is there on the CPU or missing on CUDA.
    """

    name: str
    tvm: dict[str, Any] = field(hash=False)
    features: tuple[str, ...]
    device: str = "cpu"
    archs: tuple[str, ...] = ()
    ptx: str | None = None
    cuda: str | None = None

    def __post_init__(self) -> None:
        subject = f"target {self.name}"
        if self.device not in DEVICES:
            raise LayoutError(subject, f"device is {self.device!r}; expected {' or '.join(DEVICES)}")
        named = [*self.archs, *([] if self.ptx is None else [self.ptx])]
        for arch in named:
            if not _ARCH.fullmatch(arch):
                raise LayoutError(subject, f"arch is {arch!r}; expected one such as 'sm_90'")
        if (self.device == "cuda") != bool(named):
            raise LayoutError(subject, f"device is {self.device} with GPU code for {', '.join(named) or 'no GPU'}")
        if self.device == "cuda" and not re.fullmatch("[0-9]+[.][0-9]+", self.cuda or ""):
            raise LayoutError(subject, f"cuda is {self.cuda!r}; expected a version such as '13.0'")


@dataclass(frozen=True)
class KernelInfo:
    """What one kernel takes of a GPU, as the assembler reports it: registers and bytes a thread, bytes a block.

    Parameters
    ----------
    kernel : str
        Its name in the machine code.
    arch : str
        Which machine code, such as ``sm_90``.
    registers : int
        32-bit registers of a thread.
    shared_bytes : int
        Shared memory of a block whose size is known when compiled.
    local_bytes : int
        Stack of a thread, which lies in device memory.
    spill_bytes : int
        Bytes that a thread stores for want of registers.
    """

    kernel: str
    arch: str
    registers: int
    shared_bytes: int
    local_bytes: int
    spill_bytes: int


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
        The parameters of ``main`` after the inputs, in order; of weights inside the large ones.
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
class AttentionInfo:
    """What an attention over a whole text, which keeps nothing, does with its keys.

    Parameters
    ----------
    name : str
        ``attention.3``, counted from 0 in the order of computing.
    mode : str
        ``full``, ``ternary-keys`` or ``adaptive``.
    key_planes : int
        Ternary planes of the keys older than the window.
    window : int or None
        Last keys that stay in float; None: all.
    rotated : bool
        Whether heads are turned by a Hadamard matrix before they are rounded.
    reason : str or None
        Why it is as it is, where that was decided and not asked for.
    """

    name: str
    mode: str
    key_planes: int
    window: int | None
    rotated: bool
    reason: str | None = None


@dataclass(frozen=True)
class CacheInfo:
    """Keys and values of one attention that the library keeps from run to run, in arrays that a runtime gives it.

    Parameters
    ----------
    name, value : str
        The model's inputs that held the keys and the values of the past.
    batch : int or str
        Sequences: a number, or a dimension of the inputs.
    past : str
        The dimension that was their length.
    length : int or str
        Tokens that a run appends: a number, or a dimension of the inputs.
    kv_heads, size, value_size : int
        Heads of keys and values, elements of a key's and of a value's.
    mode : str
        ``full``, ``ternary-keys``, ``ternary-keys-values`` or ``adaptive``.
    key_planes, value_planes : int
        Ternary planes, of tokens older than the window.
    window : int or None
        Last tokens that stay in float, unless whoever loads it says otherwise; None: all.
    rotated : bool
        Whether heads are turned by a Hadamard matrix before they are kept.
    reason : str or None
        Why it is as it is, where that was decided and not asked for.
    """

    name: str
    value: str
    batch: int | str
    past: str
    length: int | str
    kv_heads: int
    size: int
    value_size: int
    mode: str
    key_planes: int
    value_planes: int
    window: int | None
    rotated: bool
    reason: str | None = None


@dataclass(frozen=True)
class Manifest:
    """Everything an artifact says about itself; see the parts for their fields.

    ``bounds`` holds the largest value of a named dimension, or of a sum of some (``length + past``), where the model
    sets one, by its table of positions for example; every named dimension is at least 1. ``versions`` maps a package
    (``tvm-ternary``, ``apache-tvm``, ``apache-tvm-ffi``) to its version. ``kernels`` has a row for every GPU kernel and
    architecture, none on the CPU. ``graph`` says that a run is captured as a CUDA graph and launched as one from then
    on. ``caches`` are parameters of ``main`` between inputs and weights: a shape of one dimension, how many tokens
    there are; the same number for each sequence as int32; and the arrays of each cache in turn.
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
    kernels: tuple[KernelInfo, ...] = ()
    graph: bool = False
    caches: tuple[CacheInfo, ...] = ()
    attentions: tuple[AttentionInfo, ...] = ()

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
        return _manifest(Reader(subject), body)


def _manifest(reader: Reader, body: dict[str, Any]) -> Manifest:
    reader.check_keys(Manifest, body, "")
    bounds: dict[str, int] = reader.value(dict, body, "bounds")
    for name, most in bounds.items():
        if type(most) is not int or most < 1:
            raise reader.error(f"manifest.bounds.{name} is {most!r}; expected a number of at least 1")
    return Manifest(
        model=reader.one(ModelInfo, body, "model"),
        inputs=reader.many(TensorSpec, body, "inputs"),
        outputs=reader.many(TensorSpec, body, "outputs"),
        bounds=bounds,
        scheme=reader.value(str, body, "scheme"),
        layers=reader.many(LayerInfo, body, "layers"),
        functions=reader.many(FunctionInfo, body, "functions"),
        target=reader.one(TargetInfo, body, "target"),
        versions=reader.value(dict, body, "versions"),
        weights=reader.one(WeightsInfo, body, "weights"),
        sizes=reader.one(SizesInfo, body, "sizes"),
        kernels=reader.many(KernelInfo, body, "kernels"),
        graph=reader.value(bool, body, "graph"),
        caches=reader.many(CacheInfo, body, "caches"),
        attentions=reader.many(AttentionInfo, body, "attentions"),
    )
