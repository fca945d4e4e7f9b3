"""Factors of covariances: what they are, that they do not depend on threads, and matrices that are no covariances."""

from __future__ import annotations

import ctypes
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from imatrix_runner.engines.embedded.native_build import compile_kernels
from imatrix_runner.engines.jobs import Native
from imatrix_runner.engines.worker.quantize.rounding.factor import (
    Factor,
    FactorError,
    Floats,
    factor_bytes,
    factorise,
    matrix_of,
)

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    made = compile_kernels(tmp_path_factory.mktemp("cache"), "any ggml")
    assert isinstance(made, Native), made
    return ctypes.CDLL(str(made.library))


def covariance(n: int, tokens: int, seed: int = 0) -> Floats:
    """Of inputs whose sizes differ and of which neighbours are alike."""
    random = np.random.default_rng(seed)
    inputs = random.standard_normal((tokens, n)) * random.lognormal(0, 1, n)
    inputs[:, 1:] += 0.7 * inputs[:, :-1]
    return np.ascontiguousarray(np.einsum("ti,tj->ij", inputs, inputs, optimize=True) / tokens, np.float32)


def difference(library: ctypes.CDLL, factor: Factor, matrix: Floats) -> float:
    """The greatest of U D U^T from the matrix with damping, relative to the diagonal."""
    u = matrix_of(library, factor).astype(np.float64)
    damped = matrix + factor.damping * np.eye(factor.n)
    root = np.sqrt(np.diagonal(damped))
    product = np.einsum("ik,k,jk->ij", u, factor.conditional.astype(np.float64), u, optimize=True)
    return float(np.abs((product - damped) / root[:, np.newaxis] / root).max())


@pytest.mark.parametrize("n", [32, 64, 96, 224, 576])
def test_the_factors_make_the_covariance(n: int, library: ctypes.CDLL) -> None:
    matrix = covariance(n, 2 * n)
    factor = factorise(library, matrix, 0.01)
    assert difference(library, factor, matrix) < 2e-7
    u = matrix_of(library, factor)
    assert np.array_equal(np.diagonal(u), np.ones(n, np.float32))
    assert not np.tril(u, -1).any()
    assert factor.nbytes == factor_bytes(n)
    assert factor.damping == pytest.approx(0.01 * np.diagonal(matrix).mean())
    assert factor.conditional.min() >= np.float32(factor.damping)
    ratio = factor.conditional / factor.weights
    assert np.all(ratio == ratio[0])
    assert 0.5 <= factor.weights.max() < 1


def test_threads_change_no_bit(library: ctypes.CDLL) -> None:
    matrix = covariance(416, 1000)
    alone = factorise(library, matrix, 0.01)
    for threads in (1, 2, 5):
        with ThreadPoolExecutor(threads) as pool:
            shared = factorise(library, matrix, 0.01, pool)
        assert np.array_equal(shared.panels, alone.panels)
        assert np.array_equal(shared.conditional, alone.conditional)


def test_the_lower_triangle_is_not_read(library: ctypes.CDLL) -> None:
    matrix = covariance(128, 300)
    upper = np.triu(matrix) + np.tril(np.full_like(matrix, np.nan), -1)
    assert np.array_equal(factorise(library, upper, 0.01).panels, factorise(library, matrix, 0.01).panels)


@pytest.mark.parametrize("damping", [1e-4, 0.01, 1.0])
def test_fewer_tokens_than_inputs(damping: float, library: ctypes.CDLL) -> None:
    """The covariance is singular: only damping keeps D above zero."""
    matrix = covariance(256, 40)
    matrix[:, 3] *= 300
    matrix[3] *= 300  # and one input is far greater than all others
    factor = factorise(library, matrix, damping)
    assert factor.conditional.min() >= np.float32(factor.damping)
    assert np.isfinite(factor.panels).all()
    assert difference(library, factor, matrix) < 1e-5


def test_inputs_that_are_always_zero_get_the_damping_alone(library: ctypes.CDLL) -> None:
    matrix = covariance(96, 200)
    dead = [0, 17, 40, 95]
    matrix[dead] = 0
    matrix[:, dead] = 0
    factor = factorise(library, matrix, 0.01)
    u = matrix_of(library, factor)
    assert (factor.conditional[dead] == np.float32(factor.damping)).all()
    assert (u[dead].sum(axis=1) == 1).all()
    assert (u[:, dead].sum(axis=0) == 1).all()


@pytest.mark.parametrize(
    ("row", "column", "value"),
    [
        (5, 5, np.nan),
        (5, 5, np.inf),
        (5, 5, -1),
        (9, 70, np.nan),
        (9, 70, np.inf),
        (3, 4, 1e6),
        (3, 100, -1e30),
        (0, 127, 1e38),
    ],
)
def test_what_is_no_covariance_is_refused(row: int, column: int, value: float, library: ctypes.CDLL) -> None:
    matrix = covariance(128, 300)
    matrix[row, column] = matrix[column, row] = value
    with pytest.raises(FactorError) as caught:
        factorise(library, matrix, 0.01)
    assert caught.value.column is not None
    assert caught.value.column <= row


def test_other_matrices_are_refused(library: ctypes.CDLL) -> None:
    with pytest.raises(FactorError, match="all inputs were zero"):
        factorise(library, np.zeros((64, 64), np.float32), 0.01)
    for wrong in (covariance(40, 100), covariance(64, 100)[:32], np.zeros((0, 0), np.float32)):
        with pytest.raises(FactorError, match="multiple of 32"):
            factorise(library, wrong, 0.01)
    for wrong in (covariance(64, 100).astype(np.float64), np.asfortranarray(covariance(64, 100))):
        with pytest.raises(FactorError, match="C order"):
            factorise(library, wrong, 0.01)
