"""A user's own measure of a model, a Python function, called for the float and for the ternary model."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_ternary.analysis.accuracy import relative_error, row_cosines
from tvm_ternary.analysis.quality import MetricValue
from tvm_ternary.errors import OptionError, TernaryError
from tvm_ternary.evaluation.models import Arrays, Runner

_EXAMPLE = "for example --metric metrics.py:accuracy"
_FORMS = "def f(run) or def f(inputs, outputs)"

Result = dict[str, float | npt.NDArray[np.float64]]


@dataclass(frozen=True)
class Metric:
    """A measure.

    Parameters
    ----------
    name : str
        Of the function.
    function : callable
        Takes ``run``, a function from a sample's inputs to its outputs, both by name, which has ``inputs`` and
        ``outputs``, the model's; or takes ``inputs, outputs``, lists with an entry a sample of the data. Gives a
        number, or numbers and arrays by name; of an array (rows, width) the rows are compared with the float model's.
    """

    name: str
    function: Callable[..., Any]

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise OptionError(self._subject, f"is a {type(self.function).__name__}; expected a function", _FORMS)
        try:
            takes = [p for p in inspect.signature(self.function).parameters.values() if p.default is p.empty]
        except (TypeError, ValueError) as error:
            raise OptionError(self._subject, f"has no signature ({error})", f"write {_FORMS}") from error
        if len(takes) not in (1, 2) or any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in takes):
            got = ", ".join(map(str, takes)) or "nothing"
            raise OptionError(self._subject, f"takes {got}; expected one or two parameters", f"write {_FORMS}")

    @property
    def wants_outputs(self) -> bool:
        """Whether it takes the inputs and outputs of the data rather than a function that runs the model."""
        return sum(p.default is p.empty for p in inspect.signature(self.function).parameters.values()) == 2

    @property
    def _subject(self) -> str:
        return f"metric {self.name}"

    def measure(self, runner: Runner, inputs: Sequence[Arrays], outputs: Sequence[Arrays]) -> Result:
        """Call it for one model.

        Raises
        ------
        OptionError
            If it raises, or gives something else than numbers.
        """
        arguments = (list(inputs), list(outputs)) if self.wants_outputs else (runner,)
        try:
            result = self.function(*arguments)
        except TernaryError:
            raise
        except Exception as error:
            raise OptionError(self._subject, f"failed on {runner.name}: {_describe(error)}", "mend it") from error
        named = result if isinstance(result, Mapping) else {self.name: result}
        return {str(name): self._value(str(name), value) for name, value in named.items()}

    def _value(self, name: str, value: Any) -> float | npt.NDArray[np.float64]:
        if isinstance(value, Real) or (
            isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "fiub"
        ):
            return float(value)
        if isinstance(value, np.ndarray) and value.ndim >= 1 and value.size and value.dtype.kind in "fiub":
            return value.astype(np.float64)
        got = f"an array {value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        raise OptionError(self._subject, f"gives {got} for {name!r}; expected a number, or a dict of numbers or arrays")


def load_metric(text: str) -> Metric:
    """Read ``FILE.py:FUNCTION``. The file is run as a module; files beside it can be imported.

    Raises
    ------
    OptionError
        If there is no such file or function, the file fails, or the function takes something else.
    """
    file, colon, name = text.rpartition(":")
    if not (colon and file.endswith(".py") and name.isidentifier()):
        raise OptionError("--metric", f"got {text!r}; expected FILE.py:FUNCTION", _EXAMPLE)
    path = Path(file).resolve()
    if not path.is_file():
        raise OptionError("--metric", f"{file}: no such file", _EXAMPLE)
    spec = importlib.util.spec_from_file_location(f"_metric_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _importable(path.parent, spec.name, module):
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise OptionError("--metric", f"{file} cannot be run: {_describe(error)}", "mend it") from error
    if not hasattr(module, name):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise OptionError("--metric", f"{file} has no {name!r}; expected one of {', '.join(known) or 'its functions'}")
    return Metric(name, getattr(module, name))


@contextmanager
def _importable(folder: Path, name: str, module: Any) -> Any:
    """As for a script: its folder comes first where modules are looked for, and it is one itself (dataclasses ask)."""
    sys.path.insert(0, str(folder))
    sys.modules[name] = module
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def compare(name: str, reference: Result, value: Result) -> tuple[MetricValue, ...]:
    """Put what a metric gave for both models side by side.

    Raises
    ------
    OptionError
        If it gave different names, or arrays of different shapes.
    """
    if reference.keys() != value.keys():
        problem = f"gives {', '.join(value)} for one model and {', '.join(reference)} for the float model"
        raise OptionError(f"metric {name}", problem, "give the same names for every model")
    values: list[MetricValue] = []
    for key, a in reference.items():
        b = value[key]
        if isinstance(a, float) and isinstance(b, float):
            values.append(MetricValue(key, a, b))
            continue
        if isinstance(a, float) or isinstance(b, float) or a.shape != b.shape:
            shapes = " and ".join("a number" if isinstance(item, float) else str(item.shape) for item in (b, a))
            raise OptionError(f"metric {name}", f"gives {shapes} for {key!r}; expected the same for every model")
        cosines = row_cosines(a, b)
        values.append(MetricValue(f"{key}: mean cosine to float", 1.0, float(cosines.mean())))
        values.append(MetricValue(f"{key}: least cosine to float", 1.0, float(cosines.min())))
        values.append(MetricValue(f"{key}: relative error", 0.0, relative_error(a, b)))
    return tuple(values)


def _describe(error: BaseException) -> str:
    """Kind, text and place of an exception in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
