"""The response study: rates and directions of exact denoisers against closed forms, derivatives against finite
differences, and a run end to end."""

from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.checkpoint import load_model
from dit_jax.diffusion import network_denoiser
from experiments.frame.draws import pair_draws, resampled_mean, with_interval
from experiments.frame.gaussian import ddim_factors
from experiments.frame.measured import Measured
from experiments.frame.steps import window
from experiments.frame.store import RunFolder
from experiments.frame.study import run_study
from experiments.frame.verdict import at_most
from experiments.studies.response.analysis import band_variance, gaussian_stretches
from experiments.studies.response.measure import ResponseInstrument, orthonormal, wiener
from experiments.studies.response.page import never_grows, section
from experiments.studies.response.settings import ResponseConfig
from experiments.studies.response.study import STUDY
from experiments.studies.solvable.data import NAMES, SIZE, law, to_images, to_modes
from experiments.studies.solvable.measure import exact_denoiser
from ou_theory.clock import make_clock
from ou_theory.cluster_laws import mmse
from ou_theory.modes import dct2, idct2, radial_bands

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("blank_figures")]

SETTINGS = {"pairs": 4, "block": 2, "untrained_pairs": 2, "steps": "10", "levels": 3, "vectors": 2}
CLOCK, BANDS, SHAPE = make_clock("10"), radial_bands(8, 8, 6), (8, 8, 3)
VARIANCE = np.array([30, 6, 2, 0.5, 0.2, 0.1, 0.05])


@pytest.fixture(scope="module")
def finished(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run_study(STUDY, ResponseConfig(weights=weights, **SETTINGS), folder, progress=False)
    return RunFolder.open(folder)


def instrument(clock=CLOCK, vectors=2, shape=SHAPE, steps=(2, 5, 8)):
    return ResponseInstrument(clock, BANDS, np.array(steps), vectors, 0, shape)


def test_the_folder_holds_three_sources_and_is_drawn_again(finished):
    analysis = finished.load("analysis")
    assert list(analysis.source.values) == ["network", "untrained", "wiener"]
    for name in ("rate", "leaves", "asymmetry", "total", "largest", "content", "above_channels", "rate_error"):
        assert np.isfinite(analysis[name].isel(bound=0)).all(), name
    stored = finished.load("network")
    assert stored.rate.sizes == {"pair": 4, "place": 2, "level": stored.sizes["level"], "band": 7}
    np.testing.assert_allclose(stored.content.sum("band"), 1, rtol=1e-5)
    assert not np.array_equal(stored.rate[0], stored.rate[1])  # pairs do not share noise
    assert [claim["id"] for claim in finished.read_json("claims.json")["claims"]] == [0]
    captions = finished.read_json("section.json")["captions"]
    assert (finished.path / "report.html").read_text().count("<figure") == len(captions)
    again = asdict(section(Measured.of(finished, ResponseConfig), analysis))
    assert {**again, "claims": None} == {**finished.read_json("section.json"), "claims": None}


def test_rates_of_the_gaussian_control_are_the_formula(finished):
    stored, analysis = finished.load("wiener"), finished.load("analysis")
    variance = finished.load("network").moment.mean("pair").values.trace(axis1=-2, axis2=-1) / 3
    sigma2 = CLOCK.sigma[stored.level.values, None] ** 2
    expected = np.broadcast_to(-sigma2 / (variance + sigma2), stored.rate.shape)
    np.testing.assert_allclose(stored.rate, expected, atol=1e-5)
    outside = stored.response.values * (1 - np.eye(7))
    assert outside.max() < 1e-8
    np.testing.assert_allclose(analysis.asymmetry.sel(source="wiener"), 0, atol=1e-5)
    assert max(analysis.attrs.values()) < 1e-5
    assert analysis.largest.sel(source="wiener")[2] < 0


def test_directions_of_a_gaussian_law_are_those_of_its_matrix():
    """The maps of the steps are diagonal in DCT coefficients: carried and pulled directions against dense algebra."""
    one, labels = instrument(), jnp.zeros(2, int)
    denoise = wiener(jnp.asarray(VARIANCE, jnp.float32), BANDS, CLOCK, 2)
    states = jnp.zeros((len(CLOCK), 2, 2, *SHAPE))  # a linear denoiser's derivative is the same everywhere
    carried = jax.jit(lambda first: one.carried(denoise, states, labels, first))
    first = jax.random.normal(jax.random.key(0), (2, 2, 2, *SHAPE))
    last, stretch, content = carried(first)
    factor = np.repeat(ddim_factors(VARIANCE, CLOCK)[window(CLOCK)].prod(0)[BANDS.index], 3)
    start = np.linalg.qr(np.asarray(dct2(first), float)[:, 0, 0].reshape(2, -1).T)[0]
    q, r = np.linalg.qr(factor[:, None] * start)
    np.testing.assert_allclose(stretch[:, :, 0, 0].sum(0), np.log(np.abs(np.diag(r))), atol=1e-5)
    found = np.asarray(dct2(last))[:, 0, 0].reshape(2, -1)
    np.testing.assert_allclose(np.abs(np.diag(found @ q)), 1, atol=1e-5)
    shares = [(q[:, 0] ** 2)[np.repeat(BANDS.index == b, 3)].sum() for b in range(7)]
    np.testing.assert_allclose(content[-1, 0, 0, 0], shares, atol=1e-5)
    back = jax.jit(lambda last: one.pulled(denoise, states, labels, last))(last)
    back = np.asarray(dct2(back))[:, 0, 0].reshape(2, -1)
    np.testing.assert_allclose(np.abs(np.diag(back @ np.linalg.qr(factor[:, None] * found.T)[0])), 1, atol=1e-5)
    inside = idct2(dct2(first) * (BANDS.index == 4)[..., None])  # of one band: exponents are its factors
    _, stretch, _ = carried(inside)
    steps = np.log(ddim_factors(VARIANCE[4], CLOCK))[window(CLOCK)]
    np.testing.assert_allclose(stretch, np.broadcast_to(steps[:, None, None, None], stretch.shape), atol=1e-5)


def test_leading_gaussian_modes_come_by_stretch_and_multiplicity():
    spectrum = np.stack([VARIANCE / 10, VARIANCE * 2], -1)
    found = gaussian_stretches(spectrum, BANDS, CLOCK, 4)
    factors = np.log(ddim_factors(VARIANCE * 2, CLOCK)[window(CLOCK)].T)
    np.testing.assert_allclose(found, factors[[0, 1, 1, 1]])
    assert BANDS.count[1] >= 3


def test_directions_are_orthonormal_and_lengths_multiply_to_the_volume():
    x = jax.random.normal(jax.random.key(0), (3, 2, 2, 4, 4, 1))
    found, length = orthonormal(x)
    flat = np.moveaxis(np.asarray(found).reshape(3, 2, 2, -1), 0, 2)
    np.testing.assert_allclose(flat @ flat.swapaxes(-1, -2), np.broadcast_to(np.eye(3), (2, 2, 3, 3)), atol=1e-6)
    matrix = np.moveaxis(np.asarray(x, float).reshape(3, 2, 2, -1), 0, 2)
    np.testing.assert_allclose(np.prod(length, 0), np.sqrt(np.linalg.det(matrix @ matrix.swapaxes(-1, -2))), rtol=1e-5)
    assert np.all(np.einsum("rpi,rpi->rp", flat[:, :, 0], matrix[:, :, 0]) > 0)  # none is turned round


def test_derivatives_agree_with_nearby_trajectories(weights):
    """Two trajectories of a network h apart at the start of the window, by the textbook form of the step."""
    model, pairs, labels, one = load_model(weights), jnp.arange(2), jnp.asarray([0, 1]), instrument(vectors=1)

    @jax.jit
    def run(model):
        denoise = network_denoiser(model, CLOCK, attention="explicit")
        states, ends = one.flow(denoise, pairs, labels)
        first = one.noise(pairs)[2]
        last, before, _ = one.carried(denoise, states, labels, first)
        _, after, _ = one.carried(denoise, states, labels, one.pulled(denoise, states, labels, last))
        return states, ends, orthonormal(first)[0][0], before, after

    sigma = np.append(CLOCK.sigma, 0.0)

    @jax.jit
    def advance(model, step, scale, shrink, y):
        clean = network_denoiser(model, CLOCK)(scale * y, step, labels).denoised
        return clean + shrink * (y - clean)

    def follow(y):
        for k in window(CLOCK):
            y = advance(model, k, np.float32(CLOCK.alpha_bar[k] ** 0.5), np.float32(sigma[k + 1] / sigma[k]), y)
        return y

    states, ends, direction, before, after = run(model)
    start, h = states[window(CLOCK)[0]], 0.02
    np.testing.assert_allclose(follow(start), ends, rtol=1e-3, atol=1e-3)
    moved = (follow(start + h * direction) - follow(start - h * direction)) / (2 * h)
    expected = 0.5 * jnp.log(jnp.square(moved).sum((-3, -2, -1)))
    np.testing.assert_allclose(before.sum(0)[0], expected, atol=0.01)
    assert np.all(after.sum(0) > before.sum(0))  # each half round of power iteration stretches more


def test_mean_rates_of_a_posterior_mean_are_its_error():
    """Second-order Tweedie on two clusters: mean rate = mmse / sigma^2 - 1, at most that of a Gaussian law."""
    clock, one, pairs = make_clock("50"), law("clusters"), 400
    tool, labels = instrument(clock, shape=(SIZE, SIZE, 2)), jnp.full(pairs, NAMES.index("clusters"))
    clean = to_images(one.draw(jax.random.key(1), 2 * pairs)).reshape(2, pairs, SIZE, SIZE, 2)
    noise, *white = jax.random.normal(jax.random.key(2), (3, *clean.shape))
    respond = jax.jit(lambda step, y, white: tool.respond(exact_denoiser(clock), step, y, white, labels))

    def by_band(values):  # (..., modes)
        return np.asarray(values, float).reshape(64, 2).mean(-1) @ BANDS.averaging.reshape(64, -1)

    for step in (20, 28, 36):
        sigma2 = float(clock.sigma[step] ** 2)
        denoised, found = respond(jnp.asarray(step), clean + sigma2**0.5 * noise, jnp.stack(white))
        rate = np.asarray(found["rate"], float)
        spread = rate.std(0) / np.sqrt(pairs)
        known = by_band(mmse(one, jnp.asarray(sigma2))) / sigma2 - 1
        assert np.all(np.abs(rate.mean(0) - known) < 4 * spread + 1e-5)
        error = by_band(np.square(to_modes(denoised - clean)).mean((0, 1)))
        np.testing.assert_allclose(error / sigma2 - 1, known, atol=0.06)
        gaussian = by_band(-sigma2 / (one.total_variance() + sigma2))
        assert np.all(known <= gaussian + 1e-6)
        carrying = [1, 2]  # the bands with a sign: not Gaussian, and seen to be
        assert np.any((gaussian - rate.mean(0) - 5 * spread)[carrying] > 0)
        assert np.all(rate >= -1)
        assert not np.any(found["negative"])
        np.testing.assert_allclose(found["antisymmetric"], 0, atol=1e-6)  # a posterior's covariance is symmetric


def test_two_clusters_show_growth_where_their_posterior_is_wide_and_a_gaussian_law_never():
    """The rule of the claim goes against two clusters and for a Gaussian law; and no step stretches anything by more
    than the largest eigenvalue of its map, which for clusters is known."""
    clock, pairs = make_clock("50"), jnp.arange(32)
    tool, inside = instrument(clock, 2, (SIZE, SIZE, 2)), window(clock)[:-1]
    width, ratio = np.diff(clock.log_snr)[inside] / 2, clock.sigma[inside + 1] / clock.sigma[inside]

    @jax.jit
    def run(labels):
        denoise = exact_denoiser(clock)
        states, _ = tool.flow(denoise, pairs, labels)
        return states[inside], tool.directions(denoise, states, labels, tool.noise(pairs)[2])[0]

    def rates(name):
        states, stretch = run(jnp.full(32, NAMES.index(name)))
        found = (np.asarray(stretch, float)[:-1] / width[:, None, None, None]).max(1)  # (W, 2, P)
        largest = found.max(0).mean(0)
        return states, found, at_most(with_interval(largest.mean(), resampled_mean(largest, pair_draws(0, 32)))[1:])

    *_, verdict = rates("gaussian")
    assert verdict == "holds"
    states, found, verdict = rates("clusters")
    assert verdict == "does not hold"
    one, sigma2 = law("clusters"), clock.sigma[inside, None] ** 2
    variance, centre = np.asarray(one.variance, float), np.asarray(one.centres[0], float)
    share = sigma2 / (variance + sigma2)  # (W, modes)
    field = np.asarray(to_modes(states), float) @ (centre * share / sigma2)[:, None, :, None]  # (W, 2, P, 1)
    on = centre > 0  # modes with a part in the sign; the others are by themselves
    part = (centre * share)[:, on]
    axis = np.einsum("wi,wj->wij", part, part)[:, None, None] / np.cosh(field)[..., None] ** 2
    covariance = axis + (np.eye(on.sum()) * (variance * share)[:, None, on])[:, None, None]
    eigenvalue = np.linalg.eigvalsh(covariance)[..., -1] / sigma2[..., None]
    eigenvalue = np.maximum(eigenvalue, (variance * share / sigma2)[:, ~on].max(-1)[:, None, None])
    ratio, width = ratio[:, None, None], width[:, None, None]
    most = np.log(ratio + (1 - ratio) * eigenvalue) / width
    assert np.all(found <= most + 1e-4)
    never = most.max(0) < 0
    assert 0 < never.sum() < never.size
    assert np.all(found.max(0)[never] < 0)


def test_blocks_do_not_change_what_is_measured(finished):
    """The last pair of the Gaussian control by itself."""
    stored = finished.load("wiener").isel(pair=[3])
    variance = jnp.asarray(band_variance(finished.load("network")), jnp.float32)
    tool = instrument(steps=stored.level.values)
    run = jax.jit(lambda variance, pairs: tool.measure(wiener(variance, BANDS, CLOCK, 1), pairs, pairs))
    found = run(variance, jnp.array([3]))
    for name in stored.data_vars:
        np.testing.assert_allclose(found[name], stored[name], rtol=1e-3, atol=1e-5, err_msg=str(name))


def test_the_claim_goes_either_way(finished):
    analysis = finished.load("analysis").copy(deep=True)
    for largest, verdict in (([-0.2, -0.3, -0.1], "holds"), ([0.2, 0.1, 0.3], "does not hold")):
        analysis.largest.loc[{"source": "network"}] = largest
        claim = never_grows(analysis)
        assert (claim.verdict, claim.value, claim.interval) == (verdict, largest[0], largest[1:])
    controls = {control.name: control.also_holds for control in claim.controls}
    assert controls["Wiener denoiser"] is True
    assert at_most([-0.1, 0.3]) == at_most([np.nan] * 2) == "undecided"
    assert at_most([-0.2, 0.0]) == "holds"


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"levels": 2}, "levels"), ({"vectors": 0}, "vectors"), ({"pairs": 1}, "pairs"), ({"block": 0}, "block")],
)
def test_settings_out_of_their_domain_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ResponseConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"vectors": 193}, "at most 192"), ({"steps": "3"}, "more --steps"), ({"classes": (3,)}, "0..2")],
)
def test_settings_that_do_not_fit_the_weights_are_refused(weights, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run_study(STUDY, ResponseConfig(weights=weights, **changes), tmp_path / "out", progress=False)
