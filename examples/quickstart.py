"""Compile a model of yours and run it: python examples/quickstart.py MODEL.onnx"""

import sys

import tvm_ternary as tt
from tvm_ternary.runtime.sample import random_inputs

artifact = tt.compile(sys.argv[1], "model.so", scheme="t2a8g64")
for layer in artifact.manifest.layers:
    print(layer.name, layer.shape, layer.scheme or layer.reason)

module = tt.load("model.so", threads=1)
outputs = module.run(None, random_inputs(module.inputs))
for spec, output in zip(module.outputs, outputs, strict=True):
    print(spec.name, output.dtype, output.shape)
