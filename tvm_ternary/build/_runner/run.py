"""Run the model once on random inputs and time it: python3 run.py [cpu | cuda:N]."""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER / "python"))

import tvm_ternary  # noqa: E402
from tvm_ternary.runtime.sample import random_inputs  # noqa: E402

module = tvm_ternary.load(FOLDER / "@MODEL@", device=sys.argv[1] if len(sys.argv) > 1 else None)
inputs = random_inputs(module.inputs, bounds=module.manifest.bounds, known=module.known_dims)
seconds = module.time(inputs).median
for spec, array in zip(module.outputs, module.run(None, inputs), strict=True):
    print(spec.name, array.dtype, array.shape)
print(f"{1e3 * seconds:.3f} ms on {module.device}")
