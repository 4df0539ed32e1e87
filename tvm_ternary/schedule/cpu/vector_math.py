"""exp, erf, tanh, sigmoid and tests for NaN of float32, written so that they vectorise.

LLVM lowers these to calls into the scalar maths library, one element at a time. Here they become additions,
multiplications and integer shifts, which any CPU does on whole vectors. Bounds that the tests hold, against float64 and
over all of float32: `exp` and `exp_to_one` 2e-7 relative (zero where the result would be denormal), `erf` 5e-7
absolute, `tanh` 4e-7 relative, `sigmoid` 4e-7 relative where the result is at least 1e-37.

References
----------
exp: S. L. Moshier, Cephes Mathematical Library, ``expf``.
erf, tanh: rational approximations of Eigen, ``generic_fast_erf`` and ``generic_fast_tanh`` in
``GenericPacketMathFunctions.h``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tvm_ffi
from tvm import tirx
from tvm.ir import Call, Expr, Op
from tvm.tirx import Let, PrimFunc, Select, Var

LOG2E = 1.44269504088896341
# ln 2 in two parts: the first has few bits, so that n times it is exact.
LN2_HIGH = 0.693359375
LN2_LOW = -2.12194440e-4
# Adding 1.5 * 2^23 to a small float leaves its nearest integer in the low bits.
ROUND = 12582912.0
ROUND_BITS = 0x4B400000
# exp is zero below, where its value would be denormal and arithmetic many times slower, and infinite above.
EXP_LOW = -87.33654
EXP_HIGH = 89.0
EXP_TO_ONE = (8.2902722e-3, 4.1898161e-2, 1.6667639e-1, 4.9999148e-1, 9.9999970e-1, 1.0)
EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)

ERF_CLAMP = 3.832506856900711
ERF_ABOVE = (
    2.2905065861350646e-4,
    3.4082910107109506e-3,
    5.0955695062380861e-2,
    1.8520832239976145e-1,
    1.128379143519084,
)
ERF_BELOW = (
    -1.1791602954361697e-7,
    2.3547966471313185e-5,
    1.0179625278914885e-3,
    1.4070470171167667e-2,
    1.1098505178285362e-1,
    4.9746925110067538e-1,
    1.0,
)

TANH_CLAMP = 7.90531110763549805
TANH_TINY = 4e-4
TANH_ABOVE = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
TANH_BELOW = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)

INFINITY_BITS = 0x7F800000

# x * x is cheaper than a library call; other exponents stay.
POWERS = (2, 3, 4)


def _f32(value: float) -> Expr:
    return tirx.const(value, "float32")


def _i32(value: int) -> Expr:
    return tirx.const(value, "int32")


def _let(value: Expr, body: Callable[[Expr], Expr], dtype: str = "float32") -> Expr:
    var = Var("t", dtype)
    return Let(var, value, body(var))


def _horner(x: Expr, coefficients: Sequence[float]) -> Expr:
    result = _f32(coefficients[0])
    for coefficient in coefficients[1:]:
        result = result * x + _f32(coefficient)
    return result


def _clamp(x: Expr, low: float, high: float) -> Expr:
    """Limit x; comparisons are written so that a NaN stays one."""
    return _let(Select(x > _f32(high), _f32(high), x), lambda below: Select(below < _f32(low), _f32(low), below))


def _power_of_two(n: Expr) -> Expr:
    return tirx.reinterpret("float32", (n + _i32(127)) << _i32(23))


def _polynomial(r: Expr) -> Expr:
    """e to the r of at most half of ln 2."""
    return _horner(r, EXP) * (r * r) + r + _f32(1.0)


def exp(x: Expr) -> Expr:
    """e to the x: x = n ln 2 + r, a polynomial in r, times 2 to the n."""

    def scaled(n: Expr, value: Expr) -> Expr:
        # In two factors, for 2 to the 128 is no float while the product may be one.
        return _let(n >> _i32(1), lambda half: value * _power_of_two(half) * _power_of_two(n - half), "int32")

    def reduced(x: Expr, rounded: Expr) -> Expr:
        n = tirx.reinterpret("int32", rounded) - _i32(ROUND_BITS)
        whole = rounded - _f32(ROUND)
        remainder = x - whole * _f32(LN2_HIGH) - whole * _f32(LN2_LOW)
        return _let(n, lambda n: scaled(n, _let(remainder, _polynomial)), "int32")

    def within(x: Expr) -> Expr:
        return _let(x * _f32(LOG2E) + _f32(ROUND), lambda rounded: reduced(x, rounded))

    def whole_range(x: Expr) -> Expr:
        return Select(x < _f32(EXP_LOW), _f32(0.0), _let(_clamp(x, EXP_LOW, EXP_HIGH), within))

    return _let(x, whole_range)


def exp_to_one(x: Expr) -> Expr:
    """`exp` for x that is not above 0, as softmax has it: no bound above, and 2 to the n is one factor.

    The nearest integer comes with the bias of an exponent, so that a shift makes it a power of two. The polynomial is
    the best one of its degree, relative to e to the r, that is 1 for 0: three operations less than that of `exp`.
    """
    biased = ROUND + 127

    def within(x: Expr, rounded: Expr) -> Expr:
        whole = rounded - _f32(biased)
        power = tirx.reinterpret("float32", tirx.reinterpret("int32", rounded) << _i32(23))
        remainder = x - whole * _f32(LN2_HIGH) - whole * _f32(LN2_LOW)
        return _let(remainder, lambda r: _horner(r, EXP_TO_ONE)) * power

    def whole_range(x: Expr) -> Expr:
        return Select(x < _f32(EXP_LOW), _f32(0.0), _let(x * _f32(LOG2E) + _f32(biased), lambda n: within(x, n)))

    return _let(x, whole_range)


def erf(x: Expr) -> Expr:
    """The error function: an odd rational function within the range where it is not yet one."""

    def rational(x: Expr, square: Expr) -> Expr:
        return x * _horner(square, ERF_ABOVE) / _horner(square, ERF_BELOW)

    return _let(
        _let(x, lambda x: _clamp(x, -ERF_CLAMP, ERF_CLAMP)),
        lambda x: _let(x * x, lambda square: rational(x, square)),
    )


def tanh(x: Expr) -> Expr:
    """The hyperbolic tangent: x itself near zero, an odd rational function, then one."""

    def rational(x: Expr, square: Expr) -> Expr:
        value = x * _horner(square, TANH_ABOVE) / _horner(square, TANH_BELOW)
        return Select(square < _f32(TANH_TINY * TANH_TINY), x, value)

    return _let(
        _let(x, lambda x: _clamp(x, -TANH_CLAMP, TANH_CLAMP)),
        lambda x: _let(x * x, lambda square: rational(x, square)),
    )


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + e to the -x)."""
    return _f32(1.0) / (_f32(1.0) + exp(_f32(0.0) - x))


def power(x: Expr, exponent: Expr) -> Expr | None:
    """x to a small whole constant power, by multiplication; None for any other exponent."""
    if not isinstance(exponent, tirx.FloatImm) or float(exponent.value) not in POWERS:
        return None
    factors = int(exponent.value)

    def multiply(x: Expr) -> Expr:
        result = x
        for _ in range(factors - 1):
            result = result * x
        return result

    return _let(x, multiply)


def _magnitude_bits(x: Expr) -> Expr:
    return tirx.reinterpret("int32", x) & _i32(0x7FFFFFFF)


def isnan(x: Expr) -> Expr:
    """Whether the exponent is all ones and the fraction is not zero."""
    return _magnitude_bits(x) > _i32(INFINITY_BITS)


def isinf(x: Expr) -> Expr:
    """Whether the exponent is all ones and the fraction is zero."""
    return tirx.EQ(_magnitude_bits(x), _i32(INFINITY_BITS))


def isfinite(x: Expr) -> Expr:
    """Whether the exponent is not all ones."""
    return _magnitude_bits(x) < _i32(INFINITY_BITS)


FUNCTIONS: dict[str, Callable[..., Expr | None]] = {
    "tirx.exp": exp,
    "tirx.erf": erf,
    "tirx.tanh": tanh,
    "tirx.sigmoid": sigmoid,
    "tirx.pow": power,
    "tirx.isnan": isnan,
    "tirx.isinf": isinf,
    "tirx.isfinite": isfinite,
}


def expand_vector_math(func: PrimFunc) -> PrimFunc:
    """Replace calls on float32 that LLVM would make one element at a time by code that vectorises.

    Parameters
    ----------
    func : PrimFunc
        Scheduled; loops marked as vectorised are not yet lowered.

    Returns
    -------
    PrimFunc
    """

    def expand(call: Call) -> Expr:
        write = FUNCTIONS.get(call.op.name) if isinstance(call.op, Op) else None
        if write is None or str(call.args[0].ty) != "float32":
            return call
        result = write(*call.args)
        return call if result is None else result

    return func.with_body(tvm_ffi.structural_map(func.body, (Call, expand)))
