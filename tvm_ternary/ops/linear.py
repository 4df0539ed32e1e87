"""A linear layer, for those who have a matrix and no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm

from tvm_ternary.errors import InputError, OptionError
from tvm_ternary.formats import TernaryTensor, require_packing
from tvm_ternary.kernels.matmul import EPILOGUES, Epilogue
from tvm_ternary.kernels.shape import MatmulShape
from tvm_ternary.kernels.table import KERNELS
from tvm_ternary.schedule import dispatch
from tvm_ternary.schedule.records import open_logs
from tvm_ternary.target import Target, require_host, resolve


class Linear:
    """y = epilogue(x w^T + bias) for a ternary w, compiled for any number of rows; made by `linear`.

    Attributes
    ----------
    shape : (N, K)
        out_features, in_features.
    kernel : str
        The kernel it runs.
    schedule : str
        Where its schedule comes from: the shipped tuning records or the file of tiles.
    functions : dict
        The compiled functions: ``matmul``, and ``rows`` where the activations are prepared first.
    """

    def __init__(
        self,
        weight: TernaryTensor,
        bias: npt.NDArray[np.float32] | None,
        epilogue: str | None,
        activation_bits: int,
        packing: str,
        target: Target,
    ) -> None:
        layer = dispatch.Layer(MatmulShape.of(weight), activation_bits, packing)
        end = Epilogue(bias is not None, epilogue)
        matmul, self.schedule = dispatch.matmul_of(layer, target, open_logs(target.name), epilogue=end)
        self.shape, self.kernel = weight.shape, layer.kernel.matmul.name
        self._row, self._sizes = layer.kernel, layer.shape
        functions = {"matmul": matmul}
        if (rows := dispatch.rows_of(layer, target)) is not None:
            functions["rows"] = rows
        module = tvm.IRModule({name: func.with_attr("global_symbol", name) for name, func in functions.items()})
        library = tvm.compile(module, tvm.target.Target(target.tvm))
        self.functions = {name: library[name] for name in functions}
        constants = [*layer.kernel.pack(weight).values(), *([bias] if bias is not None else [])]
        self._constants = [tvm.runtime.tensor(array) for array in constants]

    def __call__(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Multiply.

        Parameters
        ----------
        x : (..., K) float32

        Returns
        -------
        (..., N) float32

        Raises
        ------
        InputError
            If x has another dtype or last dimension.
        """
        n, k = self.shape
        if x.dtype != np.float32 or x.ndim < 1 or x.shape[-1] != k:
            raise InputError("linear", f"x is {x.dtype} {x.shape}; expected float32 (..., {k})")
        rows = tvm.runtime.tensor(np.ascontiguousarray(x.reshape(-1, k)))
        m = rows.shape[0]
        activations = [rows]
        if "rows" in self.functions:
            operands = self._row.matmul.activations
            activations = [tvm.runtime.empty(o.shape(self._sizes, m), o.dtype) for o in operands]
            self.functions["rows"](rows, *activations)
        y = tvm.runtime.empty((m, n), "float32")
        self.functions["matmul"](*activations, *self._constants, y)
        return np.asarray(y.numpy()).reshape(*x.shape[:-1], n)


def linear(
    weight: TernaryTensor,
    bias: npt.ArrayLike | None = None,
    epilogue: str | None = None,
    target: str | Mapping[str, Any] = "native",
    *,
    activation_bits: int = 32,
    packing: str = "fast",
) -> Linear:
    """Compile a linear layer with a ternary weight.

    Parameters
    ----------
    weight : TernaryTensor
        (N, K), from `tvm_ternary.quantize`.
    bias : (N,) array_like, optional
        Float32.
    epilogue : str, optional
        ``relu``, ``gelu``, ``gelu_tanh`` or ``silu``.
    target : str or mapping
        As in `tvm_ternary.compile`; it must be one that this host can run.
    activation_bits : int
        32 multiplies float activations, 8 quantizes each row to int8 first, 1 to ternary.
    packing : str
        ``fast``, or ``dense`` for five trits a byte (int8 activations only): see `tvm_ternary.compile`.

    Returns
    -------
    Linear
        ``y = linear(x)``, x (..., K) float32, y (..., N) float32, any number of rows.

    Raises
    ------
    OptionError
        If an option names something that does not exist.
    InputError
        If the weight is empty or for transformed inputs, or the bias does not have N values.
    HostError
        If this host cannot run the target's code.
    """
    if activation_bits not in KERNELS:
        raise OptionError(f"activation_bits {activation_bits}", f"does not exist; expected one of {sorted(KERNELS)}")
    require_packing(packing, activation_bits)
    if epilogue is not None and epilogue not in EPILOGUES:
        raise OptionError(f"epilogue {epilogue!r}", f"does not exist; expected one of {', '.join(EPILOGUES)}")
    if 0 in weight.shape:
        raise InputError("linear", f"weight has shape {weight.shape}; expected at least one row and one column")
    if weight.transform is not None:
        raise InputError("linear", "weight is for transformed inputs; expected one for inputs as they are")
    values = None if bias is None else np.asarray(bias, dtype=np.float32, order="C")
    if values is not None and values.shape != weight.shape[:1]:
        raise InputError("linear", f"bias has shape {values.shape}; expected {weight.shape[:1]}")
    resolved = resolve(target)
    require_host(resolved, "leave target out to compile for this host")
    return Linear(weight, values, epilogue, activation_bits, packing, resolved)
