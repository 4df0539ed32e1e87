"""Float matrices to ternary ones."""

from tvm_ternary.quantize.exact import recognise
from tvm_ternary.quantize.methods import METHODS, Method
from tvm_ternary.quantize.quantizer import quantization_error, quantize
from tvm_ternary.quantize.refit import refit_scales

__all__ = ["METHODS", "Method", "quantization_error", "quantize", "recognise", "refit_scales"]
