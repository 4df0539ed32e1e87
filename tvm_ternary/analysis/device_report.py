"""What an artifact asks of a GPU, as tables of text."""

from __future__ import annotations

from tvm_ternary.analysis.report import Table
from tvm_ternary.runtime.manifest import Manifest


def device_table(manifest: Manifest) -> Table:
    """Where a model runs: on a GPU the architectures that there is code for, the CUDA it needs, and the graph."""
    target = manifest.target
    rows = [("runs on", "the CPU" if target.device == "cpu" else "an NVIDIA GPU")]
    if target.device == "cuda":
        rows += [
            ("machine code for", " ".join(target.archs) or "no GPU"),
            ("PTX, for later GPUs", "none" if target.ptx is None else f"of {target.ptx}"),
            ("compiled by CUDA", str(target.cuda)),
            ("a run is", "recorded as a CUDA graph at first" if manifest.graph else "a launch for each kernel"),
        ]
    return Table(("", ""), tuple(rows))


def kernels_table(manifest: Manifest) -> Table:
    """A row for every GPU kernel and architecture: registers and bytes of a thread, shared memory of a block."""
    columns = ("GPU kernel", "arch", "registers", "shared bytes", "local bytes", "spilled bytes")
    rows = tuple(
        (
            item.kernel,
            item.arch,
            *(str(n) for n in (item.registers, item.shared_bytes, item.local_bytes, item.spill_bytes)),
        )
        for item in manifest.kernels
    )
    return Table(columns, rows, frozenset({2, 3, 4, 5}))
