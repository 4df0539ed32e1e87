"""The model benchmark: a compiled model beside onnxruntime on the same file, in turns, every answer looked at first."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.bench.engines import WrongAnswerError
from tvm_ternary.bench.model_costs import Costs, compile_apart, first_result_apart
from tvm_ternary.bench.model_peers import FLOAT, INT8, PEERS, SPIN, choose_model_peers, feeds_of, open_session
from tvm_ternary.bench.timing import Spread, pace_of, time_turns, turn_ratio
from tvm_ternary.errors import OptionError
from tvm_ternary.runtime.arrays import aligned
from tvm_ternary.runtime.module import Module, load
from tvm_ternary.runtime.sample import random_inputs

Arrays = dict[str, npt.NDArray[Any]]
Progress = Callable[[str, int, int], None]

FLOAT_SCHEME = "float"
"""The name under which no matrix becomes ternary."""

TURNS = 9
# A float model is within 1e-4 of onnxruntime. One that rounds to int8 on its way can flip roundings; beyond this it
# computes something else.
_FLOAT_BOUND = 5e-2


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes
    ----------
    model : Path
        Anything that `tvm_ternary.compile` takes.
    reference : Path or None
        The ``.onnx`` file that the peers run; None where the model has no graph.
    schemes : tuple of str
        As for `tvm_ternary.compile`, or ``float``.
    constants : mapping
        Inputs that become constants of ours; the peers are given them as inputs.
    layers : tuple of str or None
        Which matrices become ternary.
    static : bool
        Compile for each shape, with its numbers; otherwise once, dimensions left open.
    target : str
    """

    model: Path
    reference: Path | None
    schemes: tuple[str, ...]
    constants: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[str, ...] | None = None
    static: bool = False
    target: str = "native"

    def options(self, scheme: str, dims: Mapping[str, int]) -> dict[str, Any]:
        """Arguments of `tvm_ternary.compile` for one scheme."""
        chosen: dict[str, Any] = {"scheme": scheme, "layers": None if self.layers is None else list(self.layers)}
        if scheme == FLOAT_SCHEME:
            chosen = {"layers": [], "embeddings": "float"}
        constants = {name: np.asarray(value).tolist() for name, value in self.constants.items()}
        fixed = dict(dims) if self.static else {}
        return {**chosen, "dims": fixed, "constants": constants, "target": self.target}


@dataclass(frozen=True)
class ModelMeasurement:
    """One scheme on one shape with some threads.

    Attributes
    ----------
    model, scheme : str
    dims : dict of str to int
        Sizes of the named dimensions.
    threads : int
    time : Spread
        Microseconds of a run.
    error : float or None
        Largest relative error (2-norm) of an output against onnxruntime in float32; None without it.
    first_seconds : float
        From loading to the first result, beyond reading the file, in a process of its own.
    costs : Costs
        Of compiling.
    peers : dict of str to Spread
    ratios : dict of str to float
        Median over the turns of a peer's time over ours in the same turn: above 1 we are faster.
    peer_errors : dict of str to float
    """

    model: str
    scheme: str
    dims: dict[str, int]
    threads: int
    time: Spread
    error: float | None
    first_seconds: float
    costs: Costs
    peers: dict[str, Spread]
    ratios: dict[str, float]
    peer_errors: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """A line: times in microseconds."""
        return {**asdict(self), "costs": self.costs.as_json()}


def measure_model(
    subject: Subject,
    sizes: Sequence[Mapping[str, int]],
    threads: Sequence[int],
    *,
    peers: Sequence[str] = (FLOAT, INT8),
    data: Mapping[str, npt.NDArray[Any]] | None = None,
    turns: int = TURNS,
    progress: Progress = lambda stage, done, total: None,
) -> Iterator[ModelMeasurement]:
    """Compile, check and measure.

    Parameters
    ----------
    subject : Subject
    sizes : sequence of mappings
        The shapes: numbers for named dimensions.
    threads : sequence of int
        Of ours and of the peers.
    peers : sequence of str
        Keys of `tvm_ternary.bench.model_peers.PEERS`.
    data : mapping of str to array, optional
        Inputs of a run; random ones that fit the model where it is left out.
    turns : int
        Of each engine; in a turn it is called once or several times, by how long a call takes.
    progress : callable
        Told of each step.

    Yields
    ------
    ModelMeasurement
        As soon as it is there: for every number of threads and shape, every scheme.

    Raises
    ------
    OptionError
        If an option has no meaning, or there are peers and no ``.onnx`` file.
    ModelError, UnsupportedOperatorError
        If the model cannot be compiled, or onnxruntime refuses it.
    WrongAnswerError
        If the float model computes something else than onnxruntime, or any gives NaN or another shape.
    """
    names = choose_model_peers(peers if subject.reference is not None else ())
    if turns < 1:
        raise OptionError("turns", f"is {turns}; expected at least 1")
    with tempfile.TemporaryDirectory(prefix="tvm-ternary-bench-") as scratch:
        folder = Path(scratch)
        built = _compile(subject, sizes, folder, progress)
        changed: dict[str, Path] = {}
        for done, name in enumerate(names):
            progress("peers", done, len(names))
            assert subject.reference is not None
            changed[name] = PEERS[name](subject.reference, folder)
        progress("measure", 0, len(threads) * len(sizes))
        for done, (count, index) in enumerate((t, i) for t in threads for i in range(len(sizes))):
            libraries = {scheme: built[scheme, index if subject.static else 0] for scheme in subject.schemes}
            case = _Case(subject, sizes[index], count, data, libraries, changed, folder)
            yield from case.measure(turns)
            progress("measure", done + 1, len(threads) * len(sizes))


Built = tuple[Path, Costs]


def _compile(
    subject: Subject, sizes: Sequence[Mapping[str, int]], folder: Path, progress: Progress
) -> dict[tuple[str, int], Built]:
    shapes = sizes if subject.static else sizes[:1]
    built: dict[tuple[str, int], Built] = {}
    for scheme in subject.schemes:
        for index, dims in enumerate(shapes):
            progress("compile", len(built), len(subject.schemes) * len(shapes))
            library = folder / f"{len(built)}.so"
            built[scheme, index] = library, compile_apart(subject.model, library, subject.options(scheme, dims))
    return built


class _Case:
    """All engines on one shape with some threads, loaded, and their answers looked at."""

    def __init__(
        self,
        subject: Subject,
        dims: Mapping[str, int],
        threads: int,
        data: Mapping[str, npt.NDArray[Any]] | None,
        libraries: Mapping[str, Built],
        changed: Mapping[str, Path],
        folder: Path,
    ) -> None:
        self._subject, self._dims, self._threads, self._folder = subject, dict(dims), threads, folder
        self._libraries = libraries
        self._modules = {scheme: load(library, threads=threads) for scheme, (library, _) in libraries.items()}
        module = next(iter(self._modules.values()))
        free = {} if subject.static else self._dims
        given = dict(data) if data else random_inputs(module.inputs, free, 0, module.manifest.bounds)
        # As the outputs of a run are, which become the inputs of the next where they are keys of the past.
        self._inputs = {name: aligned(np.asarray(array)) for name, array in given.items()}
        self._sessions = {name: open_session(path, threads) for name, path in changed.items()}
        self._feeds = {name: feeds_of(one, self._inputs, subject.constants) for name, one in self._sessions.items()}
        self._want = self._reference()

    def measure(self, turns: int) -> Iterator[ModelMeasurement]:
        """Check, then time all of them in turns."""
        errors = {scheme: self._error(scheme, module) for scheme, module in self._modules.items()}
        peer_errors = {name: self._peer_error(name) for name in self._sessions}
        first = {scheme: self._first_result(library) for scheme, (library, _) in self._libraries.items()}
        calls: dict[str, list[Callable[[], Any]]] = {}
        for scheme, module in self._modules.items():
            calls[scheme] = [lambda module=module: module.run(None, self._inputs)]  # type: ignore[misc]
        for name, session in self._sessions.items():
            calls[name] = [lambda session=session, name=name: session.run(None, self._feeds[name])]  # type: ignore[misc]
        # Workers of one engine spin for a while on the cores that the next one needs.
        rests = dict.fromkeys(calls, SPIN) if self._threads > 1 else None
        time.sleep(SPIN)
        samples = time_turns(calls, turns, pace_of(self._threads), rests)
        spread = {name: Spread.of_turns(own) for name, own in samples.items()}
        for scheme in self._modules:
            yield ModelMeasurement(
                model=self._subject.model.name,
                scheme=scheme,
                dims=self._dims,
                threads=self._threads,
                time=spread[scheme],
                error=errors[scheme],
                first_seconds=first[scheme],
                costs=self._libraries[scheme][1],
                peers={name: spread[name] for name in self._sessions},
                ratios={name: turn_ratio(samples[name], samples[scheme]) for name in self._sessions},
                peer_errors=peer_errors,
            )

    def _reference(self) -> Arrays | None:
        """What onnxruntime computes in float32 without changing numbers, by output; None without a graph."""
        if self._subject.reference is None or not self._sessions:
            return None
        session = open_session(self._subject.reference, self._threads, optimize=False)
        names = [value.name for value in session.get_outputs()]
        feeds = feeds_of(session, self._inputs, self._subject.constants)
        return dict(zip(names, session.run(names, feeds), strict=True))

    def _error(self, scheme: str, module: Module) -> float | None:
        names = [spec.name for spec in module.outputs]
        got = dict(zip(names, module.run(None, self._inputs), strict=True))
        error = self._compared(scheme, got)
        if scheme == FLOAT_SCHEME and error is not None and not error <= _FLOAT_BOUND:
            raise WrongAnswerError(
                f"{self._subject.model.name}, {scheme}",
                f"relative error is {error:.1e}; expected at most {_FLOAT_BOUND:.0e}",
                "a fault of this compiler: report it",
            )
        return error

    def _peer_error(self, name: str) -> float:
        session = self._sessions[name]
        names = [value.name for value in session.get_outputs()]
        error = self._compared(name, dict(zip(names, session.run(names, self._feeds[name]), strict=True)))
        assert error is not None
        return error

    def _compared(self, engine: str, got: Arrays) -> float | None:
        """The largest error of an output that the reference has too."""
        for name, array in got.items():
            if array.dtype.kind == "f" and np.isnan(array).any():
                raise WrongAnswerError(f"{engine}, output {name}", "has NaN", "measure with --data")
        if self._want is None:
            return None
        shared = [name for name in got if name in self._want]
        for name in shared:
            if got[name].shape != self._want[name].shape:
                shapes = f"the shape is {got[name].shape}; onnxruntime gives {self._want[name].shape}"
                raise WrongAnswerError(f"{engine}, output {name}", shapes, "report it")
        if not shared:
            raise OptionError("reference", f"has none of the outputs {', '.join(got)}", "name the same model's file")
        return max(relative_error(got[name], self._want[name]) for name in shared)

    def _first_result(self, library: Path) -> float:
        inputs = self._folder / "inputs.npz"
        np.savez(inputs, **self._inputs)  # type: ignore[arg-type]  # an input may not be called allow_pickle
        return first_result_apart(library, inputs, self._threads)


def relative_error(got: npt.NDArray[Any], want: npt.NDArray[Any]) -> float:
    """Norm of the difference over the norm of what is wanted, over what is finite there."""
    finite = np.isfinite(want)
    got, want = got[finite].astype(np.float64), want[finite].astype(np.float64)
    return float(np.linalg.norm(got - want) / max(float(np.linalg.norm(want)), np.finfo(np.float64).tiny))
