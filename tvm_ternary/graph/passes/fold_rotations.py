"""Turn matrices around an attention at compile time, so that heads need not be turned in every run.

Before::

    v = reshape(matmul(x, Wv) + b); y = matmul(reshape(rotate(attention(.., rotate(v)))), Wo)

After, with the columns of Wv and b, and the rows of Wo, turned head by head::

    v = reshape(matmul(x, Wv) + b); y = matmul(reshape(attention(.., v)), Wo)

The matrix of a rotation is symmetric and its own inverse, so both sides are the same product, and each is decided by
itself. Between an attention and a matrix may be what moves elements (reshapes, transpositions, a split of joined
projections), a factor and constants that are added. A rotary embedding or a norm of heads is in the way of queries and
keys; a matrix that something else reads, or that is ternary already, in that of its part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvm_ternary.formats.hadamard import hadamard, hadamard_matrix
from tvm_ternary.graph.importer import ImportedModel
from tvm_ternary.graph.passes.dataflow import with_main
from tvm_ternary.graph.passes.find_attention import Match, Operand
from tvm_ternary.graph.passes.moves import Ids, Moves, axes_of, without_copies
from tvm_ternary.graph.passes.rotate import block_of

QUERY, KEY, VALUE, RESULT = "query", "key", "value", "result"
Parts = frozenset[str]
"""Some of what an attention takes and gives."""


def fold_rotations(
    model: ImportedModel, matches: Mapping[str, Match], wanted: Mapping[str, Collection[str]]
) -> tuple[ImportedModel, dict[str, Parts]]:
    """Turn what can be turned in the model's matrices.

    Parameters
    ----------
    model : ImportedModel
    matches : mapping of str to Match
        Attentions of its module.
    wanted : mapping of str to collection of str
        Of each of them the parts that are to be turned, heads by heads: ``query``, ``key``, ``value``, ``result``.

    Returns
    -------
    model : ImportedModel
        With turned matrices and biases; a matrix is turned when it is read.
    folded : dict of str to frozenset of str
        The parts that need no kernel any more.
    """
    folder = _Folder(model)
    folded = {
        name: frozenset(part for part in wanted[name] if folder.fold(match, part)) for name, match in matches.items()
    }
    if not folder.turns:
        return model, folded
    sums = {var: (folder.source(var), bias) for var, bias in folder.biases.items()}
    module = _Biases(model.module, sums).run() if sums else model.module
    return replace(model, module=module, params=_Turned(model.params, folder.turns)), folded


@dataclass(frozen=True, eq=False)
class Turn:
    """Which rows (``axis`` 0) or columns (1) of a matrix are turned together: ``groups`` (n, block)."""

    axis: int
    groups: npt.NDArray[np.int64]

    def apply(self, matrix: npt.NDArray[np.float32]) -> None:
        """Turn them in place; sums are float64."""
        turn = hadamard_matrix(self.groups.shape[1])
        for group in self.groups:
            if self.axis:
                matrix[:, group] = matrix[:, group] @ turn
            else:
                matrix[group] = turn @ matrix[group]


@dataclass
class _Walk:
    """What became of the elements of a tensor on their way to an attention, or from it to matrices.

    Attributes
    ----------
    reached : dict of relax.Var to Ids
        The elements at the end of the way: of the operand, or of what a product multiplies by its matrix.
    shifted : dict of relax.Var to Ids
        Those to which a constant was added, by the sum.
    elsewhere : list of Ids
        Those that something else reads.
    """

    reached: dict[relax.Var, Ids] = field(default_factory=dict)
    shifted: dict[relax.Var, Ids] = field(default_factory=dict)
    elsewhere: list[Ids] = field(default_factory=list)


class _Folder(Moves):
    """Decides part by part, and notes what is to be turned.

    Attributes
    ----------
    turns : dict of str to list of Turn
        By the names of matrices.
    biases : dict of relax.Var to (...) float32
        What sums add now.
    """

    def __init__(self, model: ImportedModel) -> None:
        main = model.module["main"]
        super().__init__(main)
        self.returned = main.body.body
        self.matrices = {var for var in main.params[int(main.attrs["num_input"]) :] if var.name not in model.ternary}
        self.turns: dict[str, list[Turn]] = {}
        self.biases: dict[relax.Var, npt.NDArray[np.float32]] = {}

    def fold(self, match: Match, part: str) -> bool:
        """Whether a part is turned by matrices, which are noted then."""
        if part == RESULT:
            return self._fold_result(match)
        states = match.states
        operand = {
            QUERY: match.query,
            KEY: states[1] if states else match.key,
            VALUE: states[3] if states else match.value,
        }[part]
        return self._is_only(part, operand.value, match) and self._fold_operand(operand)

    def _fold_operand(self, operand: Operand) -> bool:
        """By the columns of the matrix that an operand is a product with."""
        block = block_of(operand.layout, int(operand.extents["d"]))
        product = self._product_of(operand.value)
        if block == 1 or product is None:
            return False
        dims = self.extents(product)
        if dims is None:
            return False
        walk = _Walk()
        self._follow(product, np.broadcast_to(np.arange(dims[-1]), dims), walk, ends={operand.value})
        reached = walk.reached.get(operand.value)
        if reached is None:
            return False
        groups = without_copies(reached).reshape(-1, block)
        if len(np.unique(groups)) < groups.size or any(np.isin(ids, groups).any() for ids in walk.elsewhere):
            return False
        return self._note(walk, groups, {self.calls[product].args[1].name: Turn(1, groups)})

    def _fold_result(self, match: Match) -> bool:
        """By the rows of all matrices that the result is multiplied by."""
        shape = match.shape("")
        block, dims = block_of(match.layout, shape.value_size), self.extents(match.result)
        if block == 1 or dims is None:
            return False
        ids = np.arange(shape.heads * shape.value_size).reshape(shape.heads, shape.value_size)
        apart = ids.reshape([n if axis in "hd" else 1 for axis, n in zip(match.layout, dims, strict=True)])
        walk = _Walk()
        self._follow(match.result, np.broadcast_to(apart, dims), walk)
        if walk.elsewhere or not walk.reached:
            return False
        turns = {}
        for product, reached in walk.reached.items():
            rows = without_copies(reached)
            if not axes_of(reached)[-1] or rows.ndim != 1 or not np.array_equal(np.sort(rows), ids.ravel()):
                return False
            turns[self.calls[product].args[1].name] = Turn(0, np.argsort(rows).reshape(-1, block))
        return self._note(walk, ids.reshape(-1, block), turns)

    def _note(self, walk: _Walk, groups: npt.NDArray[np.int64], turns: Mapping[str, Turn]) -> bool:
        """Note turns and the biases that go with them; nothing where a bias cannot be turned."""
        biases = {}
        for var, ids in walk.shifted.items():
            if not np.isin(without_copies(ids), groups).any():
                continue
            bias = self._turned(self.biases.get(var, self.shift(var)), ids, groups)
            if bias is None:
                return False
            biases[var] = bias
        self.biases |= biases
        for name, turn in turns.items():
            self.turns.setdefault(name, []).append(turn)
        return True

    @staticmethod
    def _turned(
        bias: npt.NDArray[np.float32] | None, ids: Ids, groups: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32] | None:
        """What is added to elements, turned with them; None where it is not the same wherever an element is."""
        extents = [] if bias is None else [1] * (ids.ndim - bias.ndim) + list(bias.shape)
        if bias is None or any(n > 1 and not varies for n, varies in zip(extents, axes_of(ids), strict=True)):
            return None
        alone = without_copies(ids)
        kept = [n if varies else 1 for n, varies in zip(ids.shape, axes_of(ids), strict=True)]
        values = np.zeros(max(int(alone.max()), int(groups.max())) + 1, np.float32)
        values[alone] = np.broadcast_to(bias, kept).reshape(alone.shape)
        values[groups] = hadamard(values[groups], groups.shape[1])
        return values[alone].reshape(kept)

    def _follow(self, var: relax.Var, ids: Ids, walk: _Walk, ends: Collection[relax.Var] = ()) -> None:
        """Follow elements to ``ends``, or, where there are none, to products with matrices."""
        if var in ends:
            walk.reached[var] = ids
            return
        for reader in self.readers[var]:
            if not ends and self._is_product(reader) and self.calls[reader].args[0] == var:
                walk.reached[reader] = ids
                continue
            moved = dict(self.moved(var, reader, ids))
            if not moved:
                walk.elsewhere.append(without_copies(ids))
            for to, places in moved.items():
                if self.shift(to) is not None:
                    walk.shifted[to] = places
                self._follow(to, places, walk, ends)

    def _product_of(self, expr: relax.Expr) -> relax.Var | None:
        """The product with a matrix that a value is made of by moves."""
        while not self._is_product(expr):
            source = self.source(expr)
            if source is None:
                return None
            expr = source
        return expr

    def _is_product(self, expr: relax.Expr) -> bool:
        """Whether a value is a product with a float matrix that nothing else reads."""
        call = self.call_of(expr, "matmul")
        return call is not None and call.args[1] in self.matrices and self.readers[call.args[1]] == {expr}

    def _is_only(self, part: str, var: relax.Var, match: Match) -> bool:
        """Whether an operand is nothing else, here or elsewhere; joined to a past it may be an output, which goes."""
        mixed = self.only_reader(match.softmax)
        if mixed is not None and self.call_of(mixed, "reshape") is not None:
            mixed = self.only_reader(mixed)
        product, place = (mixed, 1) if part == VALUE else (match.scores.product, (QUERY, KEY).index(part))
        joined = {match.key.value, match.value.value} if match.states else set()

        def leads_there(one: relax.Var) -> bool:
            for reader in self.readers[one] - ({self.returned} if one in joined else set()):
                if reader == product:
                    right = [n for n, factor in enumerate(self.calls[reader].args) if factor == one] == [place]
                else:
                    moved = reader in joined or self.call_of(reader, *_TO_PRODUCT) is not None
                    right = moved and leads_there(reader)
                if not right:
                    return False
            return True

        return leads_there(var)


_TO_PRODUCT = ("reshape", "permute_dims", "repeat", "broadcast_to", "expand_dims")
"""What may be between an operand, as `find_attention` gives it, and the product that reads it."""


class _Turned(Mapping[str, np.ndarray]):
    """Matrices of which some are turned whenever they are read, and not kept."""

    def __init__(self, matrices: Mapping[str, np.ndarray], turns: Mapping[str, Collection[Turn]]) -> None:
        self._matrices, self._turns = matrices, turns

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._turns:
            return self._matrices[name]
        matrix = np.array(self._matrices[name], np.float32)
        for turn in self._turns[name]:
            turn.apply(matrix)
        return matrix

    def __contains__(self, name: object) -> bool:
        return name in self._matrices

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)


@relax.expr_functor.mutator
class _Biases(relax.PyExprMutator):
    """Replaces the constants of sums."""

    def __init__(
        self, module: tvm.IRModule, sums: Mapping[relax.Var, tuple[relax.Expr, npt.NDArray[np.float32]]]
    ) -> None:
        super().__init__(module)
        self.main, self.sums = module["main"], sums

    def run(self) -> tvm.IRModule:
        return with_main(self.builder_, self.visit_expr(self.main))

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        if binding.var in self.sums:
            moved, bias = self.sums[binding.var]
            self.set_var_remap(binding.var, self.builder_.emit(relax.op.add(self.visit_expr(moved), relax.const(bias))))
        else:
            super().visit_var_binding_(binding)
