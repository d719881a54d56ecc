"""Roots in time: brackets, ends, derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ou_theory.roots import falling_root, require

LAW = settings(max_examples=25, deadline=None, derandomize=True)


def power(t, a, p):
    return a - t**p


def overflowing(t, a):
    return jnp.where(t > 5, jnp.nan, a - t)


def lost_below(t, a):
    return jnp.where(t < 1e-3, jnp.nan, a - t)


def saturating(t, a):
    return jnp.exp(-t) + a


@LAW
@given(st.floats(1e-6, 1e6), st.floats(0.1, 6), st.floats(1e-8, 1e8))
def test_root_whatever_the_guess(a, p, scale):
    with jax.enable_x64(True):
        got = falling_root(power, jnp.asarray(scale), jnp.asarray(a), jnp.asarray(p))
    assert float(got) == pytest.approx(a ** (1 / p), rel=1e-12)


def test_single_precision():
    a = np.geomspace(1e-4, 1e4, 9)
    got = falling_root(power, jnp.ones(9), jnp.asarray(a), jnp.full(9, 3.0))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, a ** (1 / 3), rtol=1e-6)


def test_ends(x64):
    one = jnp.asarray(1.0)
    assert float(falling_root(power, one, jnp.asarray(-1.0), one)) == 0
    assert float(falling_root(saturating, one, jnp.asarray(0.5))) == np.inf
    assert float(falling_root(overflowing, one, jnp.asarray(3.0))) == pytest.approx(3)
    assert float(falling_root(overflowing, one, jnp.asarray(8.0))) == np.inf  # not below the overflow
    assert float(falling_root(lost_below, one, jnp.asarray(2e-3))) == pytest.approx(2e-3)
    assert float(falling_root(lost_below, one, jnp.asarray(5e-4))) == 0
    assert np.isnan(float(falling_root(power, one, jnp.asarray(np.nan), one)))


def rough_level(t, a):
    return jnp.where(t < 1, 2 - t, 1 - 0.01 * t) - a


def roughness(t, a):
    return 0.02 * jnp.ones_like(t)


def test_a_root_takes_a_fall_that_can_be_told_from_rounding(x64):
    one = jnp.asarray(1.0)
    for a, root, seen in ((1.5, 0.5, 0.5), (0.9, 10.0, np.inf), (0.5, 50.0, 50.0)):  # falls by 0.05, 0.01 and 0.05
        assert float(falling_root(rough_level, one, jnp.asarray(a))) == pytest.approx(root)
        got = falling_root(rough_level, one, jnp.asarray(a), rounding=roughness)
        assert float(got) == pytest.approx(seen)
    assert float(falling_root(rough_level, one, jnp.asarray(3.0), rounding=roughness)) == 0


def test_three_derivatives(x64):
    def root(a):
        return falling_root(power, jnp.asarray(1.0), a, jnp.asarray(3.0))

    derivative, a = root, 2.0
    for factor in (1 / 3, -2 / 9, 10 / 27):
        derivative = jax.grad(derivative)
        order = {1 / 3: -2 / 3, -2 / 9: -5 / 3, 10 / 27: -8 / 3}[factor]
        assert float(derivative(a)) == pytest.approx(factor * a**order, rel=1e-9)


def test_no_root_has_no_gradient_and_no_nan(x64):
    starts = jnp.array([-1.0, 2.0])
    grads = jax.vmap(jax.grad(lambda a: falling_root(power, jnp.asarray(1.0), a, jnp.asarray(1.0))))(starts)
    np.testing.assert_allclose(grads, [0, 1])
    assert float(jax.grad(lambda a: falling_root(saturating, jnp.asarray(1.0), a))(0.5)) == 0


def test_require_speaks_of_concrete_values_only():
    with pytest.raises(ValueError, match="one must be positive"):
        require(jnp.array([1.0, -1.0]) > 0, "one must be positive")
    require(True, "never")
    jax.jit(lambda x: require(x > 0, "traced"))(-1.0)
