"""The orthonormal DCT and its bands: docs/theory.md, section 3."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
from hypothesis import given, settings
from hypothesis import strategies as st

from ou_theory.modes import Directions, band_mean, dct2, idct2, pair_modes, radial_bands, rank_groups

LAW = settings(max_examples=25, deadline=None, derandomize=True)
# few shapes, so that laws do not compile anew for every example
shapes = st.sampled_from([(8, 8, 3), (4, 8, 1), (5, 3, 2), (1, 6, 1)])
seeds = st.integers(0, 2**32 - 1)


def draw(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape)


@LAW
@given(seeds, shapes)
def test_transform_is_scipys(seed, shape):
    x = draw(seed, (2, *shape))
    with jax.enable_x64(True):
        got = dct2(jnp.asarray(x))
        np.testing.assert_allclose(got, scipy.fft.dctn(x, axes=(1, 2), norm="ortho"), atol=1e-13)


@LAW
@given(seeds, shapes)
def test_parseval_and_inverse(seed, shape):
    x = draw(seed, shape)
    with jax.enable_x64(True):
        c = dct2(jnp.asarray(x))
        assert float((c**2).sum()) == pytest.approx((x**2).sum(), rel=1e-12)
        np.testing.assert_allclose(idct2(c), x, atol=1e-13)
        np.testing.assert_allclose(dct2(idct2(jnp.asarray(x))), x, atol=1e-13)


def test_unit_white_noise_has_unit_variance_in_every_coefficient():
    noise = draw(0, (4096, 8, 8, 1)).astype(np.float32)
    variance = np.mean(np.square(dct2(jnp.asarray(noise))), 0)
    np.testing.assert_allclose(variance, 1, atol=5 * np.sqrt(2 / 4096))


def test_constant_image_is_dc_alone(x64):
    c = np.array(dct2(jnp.full((6, 4, 2), 3.0)))
    np.testing.assert_allclose(c[0, 0], 3 * np.sqrt(24), rtol=1e-14)
    c[0, 0] = 0
    np.testing.assert_allclose(c, 0, atol=1e-13)


def test_transform_keeps_the_dtype():
    assert dct2(jnp.ones((4, 4, 1), jnp.bfloat16)).dtype == jnp.bfloat16
    assert idct2(jnp.ones((4, 4, 1), jnp.float32)).dtype == jnp.float32


def test_whole_numbers_are_transformed_as_floats():
    pixels = np.arange(48).reshape(4, 4, 3)
    np.testing.assert_allclose(idct2(dct2(pixels)), pixels, atol=1e-4)


# --- common and difference mode


def test_pair_modes_rotate_the_pair(x64):
    a, b = draw(1, (2, 5, 8, 8, 3))
    common, difference = pair_modes(jnp.stack([a, b]))
    np.testing.assert_allclose(idct2(common), (a + b) / np.sqrt(2), atol=1e-13)
    np.testing.assert_allclose(idct2(difference), (a - b) / np.sqrt(2), atol=1e-13)
    assert float((common**2 + difference**2).sum()) == pytest.approx((a**2 + b**2).sum(), rel=1e-12)


def test_exchange_of_replicas_flips_the_difference():
    x = jnp.asarray(draw(2, (2, 4, 4, 1)))
    common, difference = pair_modes(x)
    common_swapped, difference_swapped = pair_modes(x[::-1])
    np.testing.assert_array_equal(common, common_swapped)
    np.testing.assert_array_equal(difference, -difference_swapped)


@pytest.mark.parametrize("num", [1, 3])
def test_pair_modes_need_a_pair(num):
    with pytest.raises(ValueError, match="two replicas"):
        pair_modes(jnp.ones((num, 4, 4, 1)))


# --- bands


@pytest.mark.parametrize(("height", "width", "num"), [(32, 32, 6), (8, 8, 1), (16, 32, 4), (1, 8, 3)])
def test_bands_partition_the_coefficients(height, width, num):
    bands = radial_bands(height, width, num)
    assert len(bands) == num + 1
    assert bands.index.shape == (height, width)
    assert bands.count.sum() == height * width
    assert np.all(bands.count > 0)
    np.testing.assert_array_equal(np.unique(bands.index), np.arange(num + 1))
    np.testing.assert_allclose(bands.averaging.sum((0, 1)), 1)
    np.testing.assert_array_equal((bands.averaging > 0).sum(-1), 1)


def test_dc_is_alone_and_bands_follow_the_radius():
    bands = radial_bands(16, 16)
    assert bands.index[0, 0] == 0
    assert bands.count[0] == 1
    assert bands.radius[0] == 0
    assert np.all(np.diff(bands.radius) > 0)
    radius = np.hypot(*np.mgrid[:16, :16] / 16)
    width = radius.max() / 6
    assert np.all(np.abs(radius - bands.radius[bands.index])[bands.index > 0] <= width / 2 + 1e-12)
    assert bands.index[15, 15] == 6


def test_bands_of_a_square_are_symmetric():
    index = radial_bands(12, 12).index
    np.testing.assert_array_equal(index, index.T)


def test_too_many_bands_raise():
    with pytest.raises(ValueError, match="would be empty"):
        radial_bands(4, 4, 40)
    with pytest.raises(ValueError, match="at least 1"):
        radial_bands(8, 8, 0)


def test_band_mean_of_energies_adds_up(x64):
    bands = radial_bands(8, 8, 4)
    c = jnp.asarray(draw(3, (2, 5, 8, 8, 3)))
    energy = band_mean(c**2, bands)
    assert energy.shape == (2, 5, 5)
    np.testing.assert_allclose((energy * bands.count).sum(-1) * 3, (c**2).sum((-3, -2, -1)), rtol=1e-13)
    by_hand = np.asarray(c[1, 2] ** 2)[bands.index == 2].mean()
    assert float(energy[1, 2, 2]) == pytest.approx(by_hand, rel=1e-13)


def test_with_index_keeps_the_rest():
    bands = radial_bands(4, 4, 2)
    turned = bands.with_index(bands.index[::-1])
    np.testing.assert_array_equal(turned.radius, bands.radius)
    np.testing.assert_array_equal(turned.averaging, bands.averaging[::-1])
    assert bands.index[0, 0] == 0  # the original is untouched


def test_the_dct_as_directions_is_its_bands():
    bands, x = radial_bands(8, 8, 6), draw(0, (5, 8, 8, 3)).astype(np.float32)
    same = Directions(np.eye(192, dtype=np.float32).reshape(8, 8, 3, 192), bands.index.reshape(-1).repeat(3))
    modes = dct2(jnp.asarray(x))
    squares = [jnp.square(groups.coefficients(modes)) for groups in (same, bands)]
    np.testing.assert_allclose(same.mean(squares[0]), bands.mean(squares[1]), rtol=1e-5)
    np.testing.assert_array_equal(same.count, 3 * bands.count)
    for groups, square in ((same, squares[0]), (bands, squares[1])):  # what is kept by coefficient makes up the bands
        each = np.asarray(groups.each(square)).reshape(5, -1) @ groups.averaging.reshape(-1, len(groups))
        np.testing.assert_allclose(each, groups.mean(square), rtol=1e-5)


def test_directions_keep_what_lies_along_them_and_nothing_else():
    rows = np.linalg.qr(draw(1, (32, 32)))[0].T
    along = Directions(rows[:5].T.reshape(4, 4, 2, 5).astype(np.float32), rank_groups(5))
    part, rest = (rows[chosen].T @ draw(2, (len(rows[chosen]),)) for chosen in (slice(0, 5), slice(5, None)))
    image = idct2(jnp.asarray(part.reshape(4, 4, 2), jnp.float32))
    both = along.coefficients(jnp.asarray((part + rest).reshape(4, 4, 2), jnp.float32))
    np.testing.assert_allclose(along.images(both), image, atol=1e-5)
    np.testing.assert_allclose(jnp.square(both).sum(), np.square(part).sum(), rtol=1e-5)
    assert len(along) == 3


def test_groups_of_ranks_double():
    np.testing.assert_array_equal(np.bincount(rank_groups(63)), [1, 2, 4, 8, 16, 32])
    np.testing.assert_array_equal(np.bincount(rank_groups(9)), [1, 2, 4, 2])
