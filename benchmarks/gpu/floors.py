"""What no schedule can go below on an H100: ``python -m benchmarks.gpu.floors`` writes docs/gpu_benchmark.md anew."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu.cases import ARCH, TIMED_ROWS, TIMED_SCHEMES, TIMED_SHAPES
from tvm_ternary.formats import Scheme
from tvm_ternary.kernels.cost import Cost, matmul_cost
from tvm_ternary.kernels.shape import MatmulShape
from tvm_ternary.kernels.table import kernel_for
from tvm_ternary.target import CUDA_ARCHS

DOCUMENT, PICTURE = Path("docs/gpu_benchmark.md"), Path("docs/gpu_floors.png")
BEGIN, END = "<!-- floors: python -m benchmarks.gpu.floors -->", "<!-- end -->"
GPU = CUDA_ARCHS[ARCH]


def cost(n: int, k: int, text: str, rows: int) -> Cost:
    """Of a product of M rows."""
    scheme = Scheme.parse(text)
    groups, size = scheme.granularity.groups(k), scheme.granularity.group_size(k)
    kernel = kernel_for(scheme.activation_bits, bfloat=scheme.bfloat).matmul
    return matmul_cost(kernel, MatmulShape(n, k, scheme.planes, groups, size), rows)


def floor(n: int, k: int, text: str, rows: int) -> float:
    """Microseconds."""
    return 1e6 * cost(n, k, text, rows).floor(GPU, Scheme.parse(text).activation_bits)


def dense(n: int, k: int, rows: int) -> float:
    """Microseconds below which a product in bfloat16 cannot be: weights, activations and results of two bytes."""
    moved = 2 * (n * k + rows * k + rows * n)
    return 1e6 * max(moved / GPU.bandwidth, 2 * n * k * rows / (GPU.int8_peak / 2))


def table() -> str:
    """Markdown: a row a matrix, a column an M, and what it is of the floor of bfloat16."""
    head = "| N x K | scheme | weights, MB | " + " | ".join(f"M = {m}" for m in TIMED_ROWS) + " |"
    rows = [head, "|" + "---|" * (3 + len(TIMED_ROWS))]
    for n, k in TIMED_SHAPES:
        cells = " | ".join(f"{dense(n, k, m):.1f}" for m in TIMED_ROWS)
        rows.append(f"| {n} x {k} | bfloat16 | {2 * n * k / 1e6:.1f} | {cells} |")
        for text in TIMED_SCHEMES:
            cells = " | ".join(f"{floor(n, k, text, m):.1f}" for m in TIMED_ROWS)
            rows.append(f"| | {text} | {cost(n, k, text, 1).weight_bytes / 1e6:.1f} | {cells} |")
    return "\n".join(rows)


def document(text: str) -> str:
    """The document with its table made anew."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


def draw() -> None:
    """The floors of one matrix over M."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), constrained_layout=True)
    n, k = TIMED_SHAPES[-1]
    many = [2**i for i in range(14)]
    axes.loglog(many, [dense(n, k, m) for m in many], color="black", linestyle="--", label="bfloat16, dense")
    for text in ("t1a8", "t2a8g128", "t1a16"):
        axes.loglog(many, [floor(n, k, text, m) for m in many], label=text)
    axes.set(
        xlabel="rows M", ylabel="microseconds at least", title=f"What an H100 allows, {n} x {k}: counted, not measured"
    )
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend()
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    DOCUMENT.write_text(document(DOCUMENT.read_text()))
    draw()
