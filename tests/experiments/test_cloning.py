"""Three measurements of one quantity: exact cases against closed forms, the claim's rule, and the study end to end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from dit_jax.checkpoint import save_model
from dit_jax.config import DiTConfig
from dit_jax.diffusion import DenoiserOutput, network_denoiser, sample
from dit_jax.objective import posterior_tables
from dit_jax.replicas import INITIAL, pair_noise
from experiments.frame.store import RunFolder
from experiments.frame.study import run_study
from experiments.frame.subject import untrained_model
from experiments.studies.cloning.analysis import estimates_of, mean_square
from experiments.studies.cloning.figures import TOLERANCE
from experiments.studies.cloning.measure import VARIABLES, clone_ends, inner_branches, measurements
from experiments.studies.cloning.page import deviation, odd_one, root, verdict
from experiments.studies.cloning.settings import CONTRASTS, CloningConfig
from experiments.studies.cloning.study import STUDY
from experiments.studies.cloning.theory import (
    gaussian_denoiser,
    gaussian_filters,
    matched_variance,
    step_maps,
    step_theory,
)  # fmt: skip
from ou_theory.clock import make_clock
from ou_theory.modes import radial_bands
from ou_theory.recursion import recursion_energy

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("blank_figures")]

TINY = DiTConfig(input_size=8, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_classes=3, prediction="v")
SMALL = {"pairs": 6, "block": 3, "untrained_pairs": 3, "steps": "12", "branches": 3}
PAIRS, SHAPE = 192, (8, 8, 3)
CLOCK, BANDS = make_clock("30"), radial_bands(8, 8, 6)
BRANCHES = inner_branches(CLOCK, 6)
POSTERIOR = np.exp(posterior_tables(CLOCK)[2])  # variance of the step noise
COUNT = np.arange(len(CLOCK))


def covariances():
    """Of three channels, one matrix per band: unlike variances, mixed by rotations."""
    rng = np.random.default_rng(0)
    turns = np.linalg.qr(rng.standard_normal((len(BANDS), 3, 3)))[0]
    variance = np.geomspace(20, 0.1, len(BANDS))[:, None] * np.array([2.4, 0.5, 0.1])
    return np.einsum("bci,bi,bdi->bcd", turns, variance, turns)


@pytest.fixture(scope="module")
def instrument():
    """Measured on the exact denoiser and on one whose predictions are scaled: gain -> dataset. More step noise than the
    posterior's, as a network with a learned variance asks for."""
    noise = POSTERIOR * 1.2
    filters = jnp.asarray(gaussian_filters(CLOCK, noise, covariances()), jnp.float32)

    @jax.jit
    def run(filters, pairs):
        denoise = gaussian_denoiser(CLOCK, BANDS, filters, jnp.asarray(noise, jnp.float32))
        labels = jnp.zeros_like(pairs)
        return measurements(denoise, CLOCK, BANDS, BRANCHES, pairs, labels, SHAPE, seed=3)

    def measured(gain):
        found = jax.device_get(run(gain * filters, jnp.arange(PAIRS)))
        data = {name: (("pair", *dims), found[name]) for name, (dims, _) in VARIABLES.items()}
        coords = {"branch": BRANCHES, "branch_ell": ("branch", CLOCK.log_snr[BRANCHES]), "band": np.arange(len(BANDS))}
        coords |= {"step": COUNT, "ell": ("step", CLOCK.log_snr), "radius": ("band", BANDS.radius)}
        return xr.Dataset(data, coords=coords)

    return measured


@pytest.fixture(scope="module")
def exact(instrument):
    return instrument(1.0)


@pytest.fixture(scope="module")
def model():
    return untrained_model(TINY, 5)


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    save_model(model, folder, extra={"data": None})
    return str(folder)


@pytest.fixture(scope="module")
def finished(weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "cloning"
    run_study(STUDY, CloningConfig(weights=weights, **SMALL), out, command="syncgap cloning", progress=False)
    return RunFolder.open(out)


def test_closed_forms_are_the_recursions_and_converge_to_wiener_gains():
    variance = np.geomspace(0.02, 30, 7)
    gain, factor, states = step_maps(CLOCK, POSTERIOR, variance)
    with jax.enable_x64(True):
        start = jnp.full(variance.shape, 1 / CLOCK.alpha_bar[0])
        known = recursion_energy(jnp.asarray(gain), jnp.asarray(CLOCK.sigma), start, eta=1.0)
    np.testing.assert_allclose(gain**2 * states[:-1], known, rtol=1e-9)
    np.testing.assert_allclose(factor[::-1].cumprod(0)[::-1], gain, rtol=1e-9)  # to the end a step keeps its gain
    np.testing.assert_allclose(matched_variance(CLOCK, POSTERIOR, states[-1]), variance, rtol=1e-4)
    assert np.all(states[-1] < variance)  # the ends are too narrow

    fine, variance = make_clock("1000"), np.geomspace(0.1, 30, 7)
    theory = step_theory(fine, np.exp(posterior_tables(fine)[2]), np.eye(3) * variance[:, None, None])
    wiener = variance / (variance + fine.sigma[:, None] ** 2)
    for name in ("q", "clones", "mmse", "spread", "aligned", "linear"):
        np.testing.assert_allclose(theory[name], wiener, atol=0.02)
    np.testing.assert_allclose(theory["q"], theory["clones"], rtol=1e-9)


def test_noise_that_makes_up_for_the_steps_makes_the_three_curves_one():
    """With the variance of the true reverse step nothing is lost at any number of steps, and nothing is taken off."""
    variance = 1.7
    sigma = CLOCK.sigma[:-1] ** 2
    after = CLOCK.sigma[1:] ** 2
    factor = (variance + after) / (variance + sigma)
    added = variance + after - factor**2 * (variance + sigma)  # keeps S + sigma^2
    noise = np.append(added, 1.0) * CLOCK.alpha_bar_next
    theory = step_theory(CLOCK, noise, variance * np.eye(3)[None])
    wiener = variance / (variance + CLOCK.sigma[:, None] ** 2)
    for name in ("q", "clones", "mmse"):
        np.testing.assert_allclose(theory[name], wiener, atol=1e-3)  # the start has unit variance, not all of it
    np.testing.assert_allclose(theory["kept"], 1, atol=1e-3)


def test_measurements_of_the_exact_denoiser_are_the_closed_forms(exact):
    """Within 5 standard errors, by linear propagation over pairs, of the law that the filters were made for."""
    theory = step_theory(CLOCK, POSTERIOR * 1.2, covariances())
    np.testing.assert_allclose(exact.noise.values[:, :-1], np.tile(POSTERIOR[:-1] * 1.2, (PAIRS, 1)), rtol=1e-4)
    variance = np.trace(exact.covariance.values, axis1=-2, axis2=-1)[:, None] / 3
    pooled = (variance + exact.clone_square.values) / 2
    parts = {
        "q": (exact.energy.values, variance),
        "mmse": (variance - exact.error.values, variance),
        "spread": (exact.spread.values, variance),
        "aligned": (exact.aligned.values, variance),
        "clones": (exact.clone_product.values, pooled),
    }
    for name, (above, below) in parts.items():
        found = above.mean(0) / below.mean(0)
        error = ((above - found * below) / below.mean(0)).std(0) / np.sqrt(PAIRS)
        known = theory[name][BRANCHES] if name == "clones" else theory[name]
        assert np.all(np.abs(found - known) < 5 * error + 2e-3), name
        wrong = theory["linear"][BRANCHES] if name == "clones" else theory["linear"]
        if name in ("q", "clones"):  # the continuum, without the steps' cost, is told apart
            assert np.any(np.abs(found - wrong) > 5 * error + 2e-3)
    ends = exact.covariance.values.mean(0)
    assert np.all(np.abs(ends - covariances()) < 0.4 * covariances().max((1, 2), keepdims=True))


def test_the_exact_denoiser_holds_and_a_scaled_one_does_not(instrument, exact):
    analysis = estimates_of(CLOCK, {"exact": exact, "scaled": instrument(0.7)}, 0)
    assert verdict(root(analysis.exact_square.values)) == "holds"
    assert verdict(root(analysis.scaled_square.values)) == "does not hold"
    assert np.sqrt(analysis.exact_square_steps[1]) > TOLERANCE  # it is the steps that are taken off
    assert verdict(root(analysis.exact_square_raw.values)) == "does not hold"
    assert "the predictions" in deviation(analysis, "scaled")  # and what that means
    # bounds: a linear filter of one variance is no better than one by channel, which a Gaussian law cannot beat
    one, by_channel = analysis.exact_excess_mean.values
    assert np.all(one[:, 0] > by_channel[:, 0])
    assert np.all(by_channel[:, 1] < 0.02)
    # the parts are all of the difference
    total = -analysis.exact_signed.sel(contrast="q - mmse").values[0]
    assert analysis.exact_parts_mean.values[:, 0].sum() == pytest.approx(total, abs=1e-9)


def test_clones_with_the_same_noise_end_identically(model):
    clock, pairs, labels = make_clock("10"), jnp.arange(2), jnp.asarray([0, 2])

    def noise(step, seed=0):
        return pair_noise(seed, pairs, step, SHAPE)

    @jax.jit
    def trajectory(model):
        denoise = network_denoiser(model, clock)
        start, options = noise(INITIAL), {"noise": noise, "observe": lambda step, x, _: x}
        return sample(denoise, start, clock, labels, sampler="ancestral", **options)

    @jax.jit
    def clones(model, states, branch, seed):
        denoise = network_denoiser(model, clock)
        return clone_ends(denoise, clock, states[branch], branch, labels, lambda step: noise(step, seed))

    ends, states = trajectory(model)
    start, middle, other, last = (clones(model, states, k, seed) for k, seed in ((0, 0), (6, 0), (6, 1), (9, 1)))
    for same in (start, middle, last):  # nothing random follows the last state
        np.testing.assert_allclose(same, ends, atol=1e-4)
    assert np.abs(other - ends).max() > 0.01


def test_a_denoiser_without_variance_has_the_posteriors_noise():
    clock = make_clock("10")

    @jax.jit
    def run(pairs):
        def denoise(x, step, labels):
            return DenoiserOutput(0.5 * x)

        return measurements(denoise, clock, BANDS, np.array([3, 5]), pairs, pairs, SHAPE, seed=0)

    found = run(jnp.arange(2))
    np.testing.assert_allclose(found["noise"][0, :-1], np.exp(posterior_tables(clock)[2])[:-1], rtol=1e-5)
    np.testing.assert_allclose(np.trace(found["covariance"], axis1=2, axis2=3) / 3, found["energy"][:, -1], rtol=1e-4)


def test_mean_square_is_free_of_noise_and_its_interval_covers():
    rng = np.random.default_rng(0)
    truth = np.linspace(-0.1, 0.14, 30)
    points, covered = [], 0
    for _ in range(200):
        data = truth + rng.standard_normal((32, 30))
        weights = rng.multinomial(32, np.full(32, 1 / 32), 300) / 32
        found = mean_square(np.concatenate([data.mean(0)[None], weights @ data]), 32)
        points.append(found[0])
        covered += found[1] <= np.square(truth).mean() <= found[2]
    assert np.mean(points) == pytest.approx(np.square(truth).mean(), abs=3 * np.std(points) / np.sqrt(200))
    assert covered > 170  # of 190 expected; the bootstrap of 32 is a little short


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([(0, 0.03), (0.01, 0.04), (0, 0.049)], "holds"),
        ([(0, 0.03), (0.01, 0.06), (0, 0.04)], "undecided"),
        ([(0, 0.03), (0.051, 0.2), (0.06, 0.1)], "does not hold"),
    ],
)
def test_the_claim_follows_the_intervals(ends, expected):
    assert verdict(np.array([(np.mean(pair), *pair) for pair in ends])) == expected


@pytest.mark.parametrize(("closest", "odd"), [(0, "mmse"), (1, "clones"), (2, "q")])
def test_the_odd_one_is_outside_the_closest_pair(closest, odd):
    squares = np.full((3, 3), 0.01)
    squares[closest] = -0.001
    analysis = xr.Dataset({"network_square": (("contrast", "bound"), squares)})
    assert odd_one(analysis, "network") == odd
    assert odd not in CONTRASTS[closest]


def test_the_folder_holds_the_curves_the_controls_and_a_page(finished):
    analysis = finished.load("analysis")
    assert finished.manifest["status"] == "complete"
    for source in ("network", "exact", "untrained"):
        np.testing.assert_allclose(analysis[f"{source}_q"].isel(step=-1, bound=0), 1, rtol=1e-5)
        assert np.isfinite(analysis[f"{source}_square"]).all()
    (claim,) = finished.read_json("claims.json")["claims"]
    assert claim["id"] == 0
    assert claim["verdict"] != "holds"  # nothing was trained
    assert [control["name"] for control in claim["controls"]] == ["exact Gaussian denoiser", "untrained network"]
    page = (finished.path / "report.html").read_text()
    assert "<title>Cloning: tiny" in page
    assert page.count("<figure") == len(finished.read_json("section.json")["captions"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branches": 2}, "branches"),
        ({"pairs": 1}, "pairs"),
        ({"block": 0}, "block"),
        ({"sampler": "ddim"}, "sampler 'ddim'"),
    ],
)
def test_settings_out_of_their_domain_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CloningConfig(**changes)


def test_too_few_steps_are_refused(weights, tmp_path):
    with pytest.raises(ValueError, match="only 1 of 2 have"):
        run_study(STUDY, CloningConfig(weights=weights, steps="2"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
