"""From an imported model to a scheduled module: the phases in a plain list, each of which can be dumped and looked at.

1 ternarize   dimensions that inputs are multiples of are computed, attention becomes one call (on a GPU two, where
              activations have 16 bits and lengths are known), tables become parameters as matrices are, the steps of
              an unrolled loop are multiplied at once, inputs are transformed for matrices that want it, planned
              matrices become calls to ternary kernels
2 bind        weights become constants, unless they are to lie beside the library
3 fuse        images get their channels last (on a CPU), every other operator becomes TensorIR, element-wise chains are
              merged; on a GPU moves too
4 schedule    every function that is not scheduled yet gets a schedule for the target
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tvm
from tvm import relax

from tvm_ternary.errors import OutputError
from tvm_ternary.files import atomic_path
from tvm_ternary.graph.call_layers import call_layers
from tvm_ternary.graph.fuse import SCHEDULED, lower_graph_ops
from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.passes.channels_last import channels_last
from tvm_ternary.graph.passes.define_dimensions import define_dimensions
from tvm_ternary.graph.passes.fuse_attention import fuse_attention
from tvm_ternary.graph.passes.fuse_prompts import Halves, fuse_prompts
from tvm_ternary.graph.passes.join_steps import join_steps
from tvm_ternary.graph.passes.lift_tables import lift_tables
from tvm_ternary.graph.passes.own_outputs import own_outputs
from tvm_ternary.graph.passes.read_through import read_through
from tvm_ternary.graph.passes.ternarize import TernaryLayer, TernaryModule, ternarize
from tvm_ternary.graph.passes.transform_inputs import transform_inputs
from tvm_ternary.kernels.attention import Attention
from tvm_ternary.schedule import cpu
from tvm_ternary.schedule.cuda import graph as cuda
from tvm_ternary.schedule.cuda.attention.prompt import WORTH_IT, attention_rounded, round_operands, why_not
from tvm_ternary.schedule.records import TuningLog
from tvm_ternary.target import Target


@dataclass(frozen=True)
class LoweredModel:
    """A module in which every function is scheduled, ready to be built.

    Attributes
    ----------
    module : tvm.IRModule
    ternary : TernaryModule
        What the first phase made: its parameters and which function is which kernel.
    schedules : dict of str to str
        For every TensorIR function of ``module``, who scheduled it.
    layers : dict of str to tuple of str
        Whose weights its calls read, as `call_layers` says.
    """

    module: tvm.IRModule
    ternary: TernaryModule
    schedules: dict[str, str]
    layers: dict[str, tuple[str, ...]]


def lower(
    model: ImportedModel,
    layers: Mapping[str, TernaryLayer],
    target: Target,
    *,
    bind_weights: bool,
    logs: Sequence[TuningLog] = (),
    dump: Callable[[str, tvm.IRModule], None] = lambda phase, module: None,
) -> LoweredModel:
    """Run the phases.

    Parameters
    ----------
    model : ImportedModel
    layers : mapping of matrix name to TernaryLayer
    target : Target
    bind_weights : bool
        Whether weights become constants of the module; otherwise they stay parameters of ``main``.
    logs : sequence of TuningLog
        Where to look for tuned schedules, in order of precedence.
    dump : callable
        Called with a phase's name and its result.
    """
    module, on_gpu = define_dimensions(model.module), target.kind == "cuda"
    # Before constants are lifted: of a mask that is one it is known that it only hides.
    if on_gpu:
        module = fuse_prompts(module, partial(_prompts, half_of(layers.values())))
    else:
        module = fuse_attention(module, partial(cpu.attention, simd=cpu.simd_of(tvm.target.Target(target.tvm))))
    module, params = lift_tables(module, model.params, model.tables)
    module = join_steps(module)
    # Recurrences, which importers make, get their schedule with the rest.
    made = (name for name, function in _functions(module) if function.attrs.get(SCHEDULED, False))
    attentions = dict.fromkeys(made, "rule:attention")
    transforms = {name: t for name, layer in layers.items() if (t := layer.weight.transform) is not None}
    module = transform_inputs(module, transforms, target)
    rotations = [name for name, function in _functions(module) if function.attrs.get(SCHEDULED, False)]
    ternary = ternarize(module, params, layers, target, logs)
    dump("ternarize", ternary.module)
    # Kept while the module is worked on: calls are told by where their weights lie.
    bound = _tensors(ternary) if bind_weights else {}
    module = relax.transform.BindParams("main", bound)(ternary.module) if bound else ternary.module
    dump("bind", module)
    module = lower_graph_ops(module if target.kind == "cuda" else channels_last(module))
    # Behind the folding of constants, which would undo copies. From a GPU every output is copied anyway.
    module = read_through(module) if target.kind == "cuda" else own_outputs(module)
    dump("fuse", module)
    rules = cuda if target.kind == "cuda" else cpu
    module, schedules = rules.schedule_module(module, tvm.target.Target(target.tvm))
    dump("schedule", module)
    ours = {name: ternary.sources.get(name, "rule:activations") for name in (*rotations, *ternary.kernels)}
    sources = schedules | ours | attentions
    who = {name: sources[name] for name in sorted(dict(_functions(module)))}
    named = {tensor.data_ptr(): var.name for var, tensor in bound.items()}
    return LoweredModel(module, ternary, who, call_layers(module, named, {*ternary.matrices, *model.embeddings}))


def half_of(layers: Iterable[TernaryLayer]) -> str | None:
    """The 16 bits that activations of some layers are rounded to; of two kinds the one that has no limit."""
    kinds = {"bfloat16" if layer.bfloat else "float16" for layer in layers if layer.activation_bits == 16}
    return min(kinds, default=None)


def _prompts(kind: str | None, shape: Attention, lengths: tuple[int | None, ...]) -> Halves | None:
    """Attention on a GPU in 16 bits; where no layer has those, all stays float32."""
    batch, queries, keys = lengths
    if kind is None or batch is None or queries is None or keys is None or why_not(shape, lengths) is not None:
        return None
    if queries < WORTH_IT:
        return None
    known = batch, queries, keys
    return *round_operands(shape, known, kind=kind), attention_rounded(shape, known, kind=kind)


def _functions(module: tvm.IRModule) -> Iterator[tuple[str, tvm.tirx.PrimFunc]]:
    for var, function in module.functions_items():
        if isinstance(function, tvm.tirx.PrimFunc):
            yield var.name_hint, function


def _tensors(ternary: TernaryModule) -> dict[relax.Var, tvm.runtime.Tensor]:
    """Values of the parameters, by variable, since two names may differ only in punctuation."""
    main = ternary.module["main"]
    inputs = int(main.attrs["num_input"])
    return dict(zip(main.params[inputs:], map(tvm.runtime.tensor, ternary.params.values()), strict=True))


def dump_to(folder: str | Path | None) -> Callable[[str, tvm.IRModule], None]:
    """A ``dump`` that writes ``NN-PHASE.py`` into ``folder``, or does nothing where that is None.

    Raises
    ------
    OutputError
        If the folder cannot be made or written.
    """
    if folder is None:
        return lambda phase, module: None
    root = Path(folder)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(str(root), f"cannot make this folder: {error.strerror}") from error
    count = 0

    def write(phase: str, module: tvm.IRModule) -> None:
        nonlocal count
        count += 1
        with atomic_path(root / f"{count:02d}-{phase}.py") as path:
            path.write_text(module.script(show_meta=False))

    return write


def is_static(module: tvm.IRModule) -> bool:
    """Whether every tensor of ``main`` has a shape of numbers alone."""
    symbolic: list[relax.Expr] = []

    def visit(expr: relax.Expr) -> None:
        kind = getattr(expr, "ty", None)
        if isinstance(kind, relax.TensorType):
            known = isinstance(kind.shape, relax.ShapeExpr)
            if not known or not all(isinstance(dim, tvm.tirx.IntImm) for dim in kind.shape.values):
                symbolic.append(expr)

    relax.analysis.post_order_visit(module["main"], visit)
    return not symbolic
