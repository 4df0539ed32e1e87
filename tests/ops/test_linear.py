"""Compiled operators on their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import erf

import numpy as np
import numpy.typing as npt
import pytest

from tests.ternary_matmul import TARGETS, gamma, runnable, unrunnable
from tvm_ternary.errors import HostError, InputError, OptionError
from tvm_ternary.formats import PerChannel, TernaryTensor
from tvm_ternary.kernels.float32 import reference_a32
from tvm_ternary.kernels.table import KERNELS
from tvm_ternary.ops import Linear, linear
from tvm_ternary.quantize import quantize
from tvm_ternary.target import resolve, target_names

N, K = 37, 50
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@cache
def compiled(scheme: str, bits: int) -> Linear:
    """A linear that several tests share."""
    return linear(quantize(random(N, K), scheme), activation_bits=bits)


def random(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def integer_problem(bits: int) -> tuple[TernaryTensor, Floats]:
    """A weight and rows for which no kernel rounds: activations that quantize to themselves, all scales powers of two.

    Sums are multiples of 1/16 from -16 to 16.
    """
    rng = np.random.default_rng(bits)
    trits = rng.integers(-1, 2, (1, N, K), dtype=np.int8)
    trits[0, :, 0] = 0
    scale = 2.0**-4 if bits != 1 else 0.5
    weight = TernaryTensor.from_trits(trits, np.full((1, N, 1), scale, np.float32), PerChannel())
    limit = 1 if bits == 1 else 9
    x = rng.integers(-limit, limit + 1, (40, K)).astype(np.float32)
    if bits != 1:
        x[:, 0] = 127  # the largest: a step of the int8 quantizer is 1; its weight is zero
    return weight, x


def gelu(y: Doubles) -> Doubles:
    return y * 0.5 * (1 + np.vectorize(erf)(y / np.sqrt(2)))


# What an epilogue may add to an exact sum y. gelu: erf errs by 5e-7 (schedule/cpu/vector_math.py), of which |y| / 2
# counts, and four roundings; silu: exp errs by 2e-7 of its value, and three roundings.
EPILOGUES: dict[str | None, tuple[Callable[[Doubles], Doubles], Callable[[Doubles], Doubles]]] = {
    None: (lambda y: y, np.zeros_like),
    "relu": (lambda y: np.maximum(y, 0), np.zeros_like),
    "gelu": (gelu, lambda y: np.abs(y) * (2.5e-7 + gamma(4))),
    "silu": (lambda y: y / (1 + np.exp(-y)), lambda y: np.abs(y / (1 + np.exp(-y))) * (2e-7 + gamma(3))),
}


# All on one kernel, on the others two: what follows the sum is the same function of it.
@pytest.mark.parametrize(
    ("bits", "epilogue"), [*((8, name) for name in EPILOGUES), (32, "relu"), (32, "gelu"), (1, None), (1, "silu")]
)
def test_epilogues_apply_to_the_sum_with_bias(bits: int, epilogue: str | None) -> None:
    weight, x = integer_problem(bits)
    bias = np.arange(N, dtype=np.float32) / 4 - 5
    y = reference_a32(x, weight, bias)
    apply, error = EPILOGUES[epilogue]
    got = linear(weight, bias, epilogue, activation_bits=bits)(x)
    assert y.min() < -4
    assert y.max() > 4
    assert (np.abs(got - apply(y)) <= error(y)).all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bits", KERNELS)
def test_every_target_that_runs_here_gives_the_same_linear(bits: int, target: str) -> None:
    weight, x = integer_problem(bits)
    got = linear(weight, target=runnable(target).tvm, activation_bits=bits)(x)
    np.testing.assert_array_equal(got, reference_a32(x, weight))


@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 5), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("bits", KERNELS)
def test_leading_dimensions_are_kept(bits: int, leading: tuple[int, ...]) -> None:
    apply = compiled("t2a32g20", bits)
    x = random(*leading, K, seed=1)
    got = apply(x)
    assert got.shape == (*leading, N)
    assert got.dtype == np.float32
    flat = apply(x.reshape(int(np.prod(leading)), K))
    np.testing.assert_array_equal(got.reshape(flat.shape), flat)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    """Nor on how many there are: every variant of a kernel adds in the same order, but for a panel, which first adds
    planes as integers."""
    for bits in KERNELS:
        apply, x = compiled("t1a32", bits), random(21, K, seed=1)
        np.testing.assert_array_equal(apply(x), np.concatenate([apply(row[None]) for row in x]))
        apply = linear(quantize(random(N, K), f"t2a{bits}"), activation_bits=bits)
        y = apply(x)
        alone = np.concatenate([apply(row[None]) for row in x])
        np.testing.assert_allclose(y, alone, rtol=0, atol=0 if bits != 8 else 2**-20 * np.abs(y).max())


def test_any_layout_of_the_activations_will_do() -> None:
    apply, x = compiled("t1a32", 32), random(12, 2 * K)
    np.testing.assert_array_equal(apply(x[::2, ::2]), apply(np.ascontiguousarray(x[::2, ::2])))
    np.testing.assert_array_equal(apply(np.asfortranarray(x[:, :K])), apply(np.ascontiguousarray(x[:, :K])))


def test_bias_may_be_any_sequence_of_numbers() -> None:
    weight, x = integer_problem(32)
    exact = reference_a32(x, weight, np.arange(N, dtype=np.float32))
    for bias in (list(range(N)), np.arange(N, dtype=np.float64), np.arange(2 * N)[::2] // 2):
        np.testing.assert_array_equal(linear(weight, bias)(x), exact)


@pytest.mark.parametrize("scheme", ["t1a8", "t3a8g64"])
def test_packing_changes_a_result_by_less_than_its_roundings(scheme: str) -> None:
    """The whole numbers are the same; planes are summed in another order, and their scales rounded elsewhere."""
    weight, x = quantize(random(N, K), scheme), random(9, K, seed=1)
    fast, dense = (linear(weight, activation_bits=8, packing=packing) for packing in ("fast", "dense"))
    assert (fast.kernel, dense.kernel) == ("matmul_a8", "matmul_a8_dense")
    magnitude = np.abs(x) @ np.abs(weight.scale[:, :, 0, None] * weight.trits()).sum(axis=0).T
    assert (np.abs(dense(x) - fast(x)) <= 2 * gamma(weight.num_planes + 4) * magnitude).all()


def test_a_linear_says_what_it_is() -> None:
    apply = linear(quantize(random(N, K), "t1a8"), activation_bits=8, target=resolve("native").tvm)
    assert apply.shape == (N, K)
    assert apply.kernel == "matmul_a8"
    assert apply.schedule == f"rule:{resolve('native').tier}/matmul_a8.toml"


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"activation_bits": 4}, OptionError, "activation_bits 4: does not exist; expected one of [1, 8, 32]"),
        ({"packing": "tight"}, OptionError, "packing 'tight': does not exist; expected one of fast, dense"),
        ({"packing": "dense"}, OptionError, "packing 'dense': does not exist for a32 schemes; expected a8"),
        (
            {"epilogue": "tanh"},
            OptionError,
            "epilogue 'tanh': does not exist; expected one of relu, gelu, gelu_tanh, silu",
        ),
        ({"target": "z80"}, OptionError, "target z80: no such target"),
        ({"bias": np.ones(N + 1)}, InputError, f"linear: bias has shape ({N + 1},); expected ({N},)"),
        ({"bias": np.ones((N, 1))}, InputError, f"linear: bias has shape ({N}, 1); expected ({N},)"),
        ({"bias": 1.0}, InputError, f"linear: bias has shape (); expected ({N},)"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, object], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        linear(quantize(random(N, K), "t1a32"), **options)  # type: ignore[arg-type]
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize("x", [np.ones((2, K)), np.ones((2, K - 1), np.float32), np.float32(1)], ids=["64", "k", "0d"])
def test_activations_that_do_not_fit_are_refused(x: npt.NDArray[np.floating]) -> None:
    with pytest.raises(InputError) as caught:
        compiled("t1a32", 32)(np.asarray(x))  # type: ignore[arg-type]
    assert str(caught.value) == f"linear: x is {x.dtype} {x.shape}; expected float32 (..., {K})"


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_an_empty_weight_is_refused(shape: tuple[int, int]) -> None:
    weight = quantize(np.zeros(shape, np.float32), "t1a32")
    with pytest.raises(InputError, match="expected at least one row and one column"):
        linear(weight)


def test_a_target_of_another_machine_is_refused_before_it_is_built() -> None:
    others = [name for name in target_names() if unrunnable(resolve(name)) is not None]
    assert others, "this host runs every target there is: name one that it does not"
    for name in others:
        with pytest.raises(HostError) as caught:
            linear(quantize(random(N, K), "t1a32"), target=name)
        assert str(caught.value).startswith(f"target {name}: ")


def test_missing_cpu_features_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    target = resolve("native")
    assert target.features, "the best target of this host needs no feature"
    lacking = sorted(target.features)[0]
    monkeypatch.setattr("tvm_ternary.target.cpu.host_features", lambda: target.features - {lacking})
    with pytest.raises(HostError, match=f"this CPU lacks {lacking};"):
        linear(quantize(random(N, K), "t1a32"), target=target.tvm)


@pytest.mark.parametrize("bits", sorted(KERNELS))
def test_what_is_not_finite_is_not_hidden_by_rounding(bits: int) -> None:
    weight = quantize(np.random.default_rng(0).standard_normal((40, 200), np.float32), "t1a8g64")
    apply = linear(weight, activation_bits=bits)
    for bad in (np.nan, np.inf, -np.inf):
        x = np.ones((3, 200), np.float32)
        x[1, 77] = bad
        y = apply(x)
        assert not np.isfinite(y[1]).any()
        assert np.isfinite(y[[0, 2]]).all()
