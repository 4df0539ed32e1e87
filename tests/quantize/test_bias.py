"""Bias correction against the outputs themselves."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tvm_ternary.quantize.bias import correct_bias, covariance
from tvm_ternary.quantize.compensate import row_errors
from tvm_ternary.quantize.observers import Observer


@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 12))
def test_the_mean_error_vanishes_and_the_rest_is_that_of_the_covariance(seed: int, n: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    w, fitted = rng.standard_normal((2, n, k)).astype(np.float32)
    x = (rng.standard_normal((50, k)) + rng.standard_normal(k)).astype(np.float32)
    observer = Observer(k)
    observer.update(x)
    seen = observer.statistics()
    assert seen.hessian is not None
    bias = correct_bias(w, fitted, seen.mean)
    error = x.astype(np.float64) @ (fitted - w).T.astype(np.float64)
    np.testing.assert_allclose((error + bias).mean(axis=0), 0, atol=1e-5)
    got = row_errors(fitted - w, covariance(seen.hessian, seen.mean))
    np.testing.assert_allclose(got, ((error + bias) ** 2).mean(axis=0), rtol=1e-4, atol=1e-4)
    # Without the correction it is as much more as the squared mean.
    np.testing.assert_allclose(row_errors(fitted - w, seen.hessian) - got, bias.astype(np.float64) ** 2, atol=1e-3)


def test_inputs_that_never_change_have_no_variance() -> None:
    mean = np.array([0.1, 3.0], np.float32)
    got = covariance((np.outer(mean, mean) * 0.9999999).astype(np.float32), mean)
    assert (np.diag(got) >= 0).all()
    np.testing.assert_allclose(got, 0, atol=1e-5)
