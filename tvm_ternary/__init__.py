"""Compile neural networks with ternary weights to one shared library, and run it.

Names are imported when they are first used, so that ``import tvm_ternary`` is quick and running an artifact needs
nothing but the runtime.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvm_ternary import ops as ops
    from tvm_ternary.compiler import Artifact as Artifact
    from tvm_ternary.compiler import compile as compile
    from tvm_ternary.convert.job import QuantizedModel as QuantizedModel
    from tvm_ternary.convert.job import quantize_model as quantize_model
    from tvm_ternary.errors import TernaryError as TernaryError
    from tvm_ternary.evaluation.evaluate import evaluate as evaluate
    from tvm_ternary.formats.scheme import Scheme as Scheme
    from tvm_ternary.formats.ternary import TernaryTensor as TernaryTensor
    from tvm_ternary.quantize.config import LayerQuantizationConfig as LayerQuantizationConfig
    from tvm_ternary.quantize.quantizer import quantize as quantize
    from tvm_ternary.runtime.module import Module as Module
    from tvm_ternary.runtime.module import load as load

# Public name -> the module that holds it.
_HOMES = {
    "Artifact": "tvm_ternary.compiler",
    "LayerQuantizationConfig": "tvm_ternary.quantize.config",
    "Module": "tvm_ternary.runtime.module",
    "QuantizedModel": "tvm_ternary.convert.job",
    "Scheme": "tvm_ternary.formats.scheme",
    "TernaryError": "tvm_ternary.errors",
    "TernaryTensor": "tvm_ternary.formats.ternary",
    "compile": "tvm_ternary.compiler",
    "evaluate": "tvm_ternary.evaluation.evaluate",
    "load": "tvm_ternary.runtime.module",
    "quantize": "tvm_ternary.quantize.quantizer",
    "quantize_model": "tvm_ternary.convert.job",
}

__all__ = [
    "Artifact",
    "LayerQuantizationConfig",
    "Module",
    "QuantizedModel",
    "Scheme",
    "TernaryError",
    "TernaryTensor",
    "compile",
    "evaluate",
    "load",
    "ops",
    "quantize",
    "quantize_model",
]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module("tvm_ternary.ops")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    # Importing a subpackage of the same name has bound it already.
    return globals().setdefault(name, value)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _CallableFolder(ModuleType):
    """The subpackage ``quantize`` when it is called as the function of that name."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.quantize(*args, **options)


class _Package(ModuleType):
    """This package, in which ``quantize`` is a function for users and a subpackage for `import`.

    Python binds the subpackage to the attribute when anything in it is first imported. So that
    ``tvm_ternary.quantize(w)`` works before and after, the subpackage can be called.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "quantize" and isinstance(value, ModuleType):
            value.__class__ = _CallableFolder
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
