"""The speciation gap of a coupled pair: docs/theory.md, section 13.3."""

from decimal import Decimal, localcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ou_theory import speciation as sp
from ou_theory.process import transition_time

LAW = settings(max_examples=25, deadline=None, derandomize=True)
gaps = jax.jit(sp.speciation_gap)


@pytest.mark.parametrize(
    ("g", "common", "difference", "exact", "small", "large"),
    [
        (0.01, 1.62082, 1.59823, 0.02259, 0.02259, 0.02178),
        (0.3, 2.05657, 1.33537, 0.72120, 0.67766, 0.69203),
        (0.5, 2.56495, 1.20364, 1.36131, 1.12944, 1.29040),
        (0.9, 6.11888, 1.01095, 5.10793, 2.03299, 3.37210),
        (0.99, 10.75557, 0.97661, 9.77896, 2.23629, -72.3),
    ],
)
def test_table_of_gaps(x64, g, common, difference, exact, small, large):
    got = [
        sp.mode_speciation_time(5.0, 1.0, 1 - g),
        sp.mode_speciation_time(5.0, 1.0, 1 + g),
        sp.speciation_gap(1.0, g, 24.0, 24.0),
        sp.gap_small_coupling(1.0, g, 24.0),
    ]
    np.testing.assert_allclose([float(v) for v in got], [common, difference, exact, small], atol=5.1e-6)
    assert float(sp.gap_large_spread(1.0, g, 24.0)) == pytest.approx(large, abs=5.1e-6 if g < 0.95 else 0.051)


def test_gap_at_the_bound(x64):
    assert float(sp.gap_at_bound(1.0, 3.75)) == pytest.approx(1.339983459, rel=1e-9)
    assert float(sp.gap_at_bound(1.0, 24.0)) == pytest.approx(11.02704, abs=5e-6)
    assert float(sp.speciation_gap(1.0, 1.0, 24.0, 24.0)) == pytest.approx(float(sp.gap_at_bound(1.0, 24.0)), rel=1e-12)
    assert np.isfinite(float(sp.speciation_gap(1.0, 1.04, 24.0, 24.0)))
    assert float(sp.speciation_gap(1.0, 1.05, 24.0, 24.0)) == np.inf
    assert float(sp.speciation_gap(1.0, -1.05, 24.0, 24.0)) == -np.inf


COUPLINGS = np.linspace(0, 0.999, 60)


@LAW
@given(st.floats(-2, 3), st.floats(-1, 1), st.floats(-1, 1))
def test_gap_is_odd_rising_convex_and_bounded(log_spread, log_b, log_noise):
    spread, b, noise = 10**log_spread, 10**log_b, 10**log_noise
    with jax.enable_x64(True):
        got = np.asarray(gaps(b, b * COUPLINGS, spread, spread, noise))
        np.testing.assert_allclose(gaps(b, -b * COUPLINGS, spread, spread, noise), -got, rtol=1e-12)
        limit = float(sp.gap_at_bound(b, spread, noise))
    assert got[0] == 0
    assert np.all(np.diff(got) > 0)
    assert np.all(np.diff(got, 2) > -1e-9 * got[1:-1])
    assert np.all(got < spread / (2 * noise))
    assert np.all(got < limit)


@LAW
@given(st.floats(-6, 4), st.floats(-9, 0), st.floats(0.1, 3))
def test_gap_keeps_its_digits(log_spread, log_g, b):
    """Against long arithmetic."""
    spread, g = 10**log_spread, b * 10**log_g
    with localcontext(prec=60):
        slow, fast, z = Decimal(b) - Decimal(g), Decimal(b) + Decimal(g), Decimal(spread)
        before = (1 + slow * z).ln() / (2 * slow) if slow else z / 2
        expected = float(before - (1 + fast * z).ln() / (2 * fast))
    with jax.enable_x64(True):
        assert float(gaps(b, g, spread, spread, 1.0)) == pytest.approx(expected, rel=2e-13)


def test_gap_in_single_precision():
    g, spread = np.geomspace(1e-5, 0.99, 13)[:, None], np.geomspace(1e-3, 1e3, 7)
    with jax.enable_x64(True):
        double = np.asarray(gaps(1.0, g, spread, spread, 1.0))
    got = gaps(1.0, g.astype(np.float32), spread.astype(np.float32), spread.astype(np.float32), 1.0)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, double, rtol=1e-4)


def test_limits_of_the_gap(x64):
    for b, spread, noise in ((1.0, 24.0, 1.0), (0.7, 5.0, 2.0)):
        ratio = [float(sp.speciation_gap(b, g, spread, spread, noise) / sp.gap_small_coupling(b, g, spread, noise)) - 1
                 for g in (0.02, 0.01)]  # fmt: skip
        assert ratio[0] / ratio[1] == pytest.approx(4, rel=0.01)  # the next order is g^2 higher
        assert abs(ratio[1]) < 1e-3
        z = b * spread / noise
        by_hand = 0.01 / b**2 * (np.log1p(z) - z / (1 + z))
        assert float(sp.gap_small_coupling(b, 0.01, spread, noise)) == pytest.approx(by_hand, rel=1e-12)
    assert float(sp.gap_small_coupling(1.0, 0.1, 1e-6)) == pytest.approx(0.1 * 0.5e-12, rel=1e-5)
    near = [11.02704492547234 - float(sp.speciation_gap(1.0, 1 - e, 24.0, 24.0)) for e in (2e-3, 1e-3)]
    assert near[0] / near[1] == pytest.approx(2, rel=0.05)


@LAW
@given(st.floats(0.0, 0.99), st.floats(0, 5))
def test_error_of_the_large_spread_form(g, log_spread):
    spread = 10**log_spread
    with jax.enable_x64(True):
        error = sp.speciation_gap(1.0, g, spread, spread) - sp.gap_large_spread(1.0, g, spread)
        assert abs(float(error)) <= float(sp.gap_large_spread_error(1.0, g, spread)) + 1e-12


def test_modes_of_different_strength(x64):
    got = float(sp.speciation_gap(1.3, 0.0, 7.0, 3.0, 0.5))
    assert got == pytest.approx(np.log((1 + 1.3 * 14) / (1 + 1.3 * 6)) / 2.6, rel=1e-12)
    assert float(sp.gap_without_coupling(1.3, 7.0, 3.0, 0.5)) == pytest.approx(got, rel=1e-12)
    expected = transition_time(0.9, 7.0, 0.5) - transition_time(1.7, 3.0, 0.5)
    assert float(sp.speciation_gap(1.3, 0.4, 7.0, 3.0, 0.5)) == pytest.approx(float(expected), rel=1e-12)
    # a mode that never speciates has the time 0
    assert float(sp.speciation_gap(1.0, 0.4, 3.75, -1.0)) == pytest.approx(0.9822124970, rel=1e-9)


@pytest.mark.parametrize("g", [0.0, 0.05, 0.4, 0.95, 1.0, 1.2])
def test_slopes_of_the_gap(x64, g):
    def plain(b, g, u, v, d):
        return transition_time(b - g, u, d) - transition_time(b + g, v, d)

    arguments = (1.0, g, 3.0, 2.0, 0.9)
    got = jax.grad(sp.speciation_gap, argnums=range(5))(*arguments)
    expected = jax.grad(plain, argnums=range(5))(*arguments)
    np.testing.assert_allclose(np.array(got), np.array(expected), rtol=1e-8, atol=1e-10)
