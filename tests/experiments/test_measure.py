"""The instrument on systems whose answer is known: exact denoisers of Gaussian modes."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from dit_jax.attention import GATE_KINDS
from dit_jax.covariance import DataCovariance
from dit_jax.diffusion import DenoiserOutput
from experiments.frame.eigenmodes import eigenmodes
from experiments.frame.estimator import commitment_of, order
from experiments.frame.gains import measured_statistics, regression_gains
from experiments.frame.gates import COMMON, OWN, RHO, told
from experiments.frame.instrument import coupled_wiener, one_pass, shuffled_bands, trajectories
from experiments.frame.settings import GateKind
from experiments.studies.compare.claimed import shuffled_orders
from experiments.studies.compare.theory import band_statistics, energy_gains
from ou_theory import attention
from ou_theory.attention import coupling_at, rho
from ou_theory.clock import make_clock
from ou_theory.gain_model import wiener_gain
from ou_theory.modes import radial_bands

SIZE, CHANNELS, PAIRS = 8, 2, 48
CLOCK = make_clock(20)
BANDS = radial_bands(SIZE, SIZE, 3)
VARIANCE = np.array([20.0, 4.0, 0.5, 0.05])
COUPLINGS = np.array([0.0, 0.1, 0.6, 1.0], np.float32)


@pytest.fixture(scope="module")
def subject():
    return coupled_wiener(jnp.asarray(VARIANCE, jnp.float32)[BANDS.index], CLOCK)


def measured(subject, sampler):
    labels = jnp.zeros(PAIRS, jnp.int32)
    shape = (SIZE, SIZE, CHANNELS)

    @jax.jit
    def run(couplings, pairs):
        return trajectories(subject, CLOCK, BANDS, couplings, pairs, labels, shape, seed=0, sampler=sampler)

    return run(jnp.asarray(COUPLINGS), jnp.arange(PAIRS))


@pytest.fixture(scope="module")
def ddim(subject):
    return measured(subject, "ddim")


def relative(energy):
    energy = np.asarray(energy, np.float64).mean(1)
    return energy / energy[0, -1]


def theory(eta):
    energy = np.asarray(band_statistics(COUPLINGS, VARIANCE, CLOCK, eta)[0])
    return energy / energy[0, -1]


def test_ddim_on_gaussian_modes_has_no_sampling_noise(ddim):
    np.testing.assert_allclose(relative(ddim["energy"][..., 1]), theory(0.0), atol=2e-5)


@pytest.mark.parametrize("kind", ["convex", "additive", "tanh"])
def test_the_ideal_model_of_every_kind_has_its_gains(kind):
    """Of the difference, as the theory has it, with gains below 0 among them; the common mode goes through no theory,
    but at equal gains of the difference it is that of the other kinds if the kind is normalised, and larger if not."""
    shape, labels, pairs = (SIZE, SIZE, CHANNELS), jnp.zeros(8, jnp.int32), jnp.arange(8)
    options = {"seed": 0, "sampler": "ddim"}

    def energies(kind, couplings):
        subject = coupled_wiener(jnp.asarray(VARIANCE, jnp.float32)[BANDS.index], CLOCK, kind)
        run = jax.jit(lambda g: trajectories(subject, CLOCK, BANDS, g, pairs, labels, shape, **options)["energy"])
        return np.asarray(run(jnp.asarray(couplings)), np.float64).mean(1)

    gains = np.array([1.0, 0.7, 0.2])
    found, joint = (energies(k, np.asarray(coupling_at(gains, k), np.float32)) for k in (kind, "joint"))
    np.testing.assert_allclose(found[..., 1], joint[..., 1], rtol=2e-3, atol=1e-9)
    if kind == "convex":
        np.testing.assert_allclose(found[..., 0], joint[..., 0], rtol=1e-4)
    else:
        assert (found[1:, -1, :, 0] > 1.2 * joint[1:, -1, :, 0]).all()
    couplings = np.array([0, 0.3, 0.9], np.float32)
    measured = energies(kind, couplings)[..., 1]
    exact = np.asarray(band_statistics(couplings, VARIANCE, CLOCK, 0.0, kind)[0])
    np.testing.assert_allclose(measured / measured[0, -1], exact / exact[0, -1], atol=5e-5)


def test_the_packages_and_the_pages_know_the_same_kinds():
    assert GATE_KINDS == attention.GATE_KINDS == get_args(GateKind)
    for texts in (RHO, COMMON, OWN):
        assert tuple(texts) == GATE_KINDS
    assert len({told(kind) for kind in GATE_KINDS}) == len(GATE_KINDS)


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_what_pages_say_of_a_kind_is_the_theory(kind):
    """The formulas as printed, evaluated."""
    for g in (0.0, 0.3, 0.8):
        own, cross = attention.block_weights(np.array([[1, g], [g, 1]]), kind)[0]
        for texts, expected in ((RHO, own - cross), (COMMON, own + cross), (OWN, own)):
            formula = texts[kind].replace("−", "-").replace("2g", "2 * g").replace("tanh g", "np.tanh(g)")
            assert eval(formula, {"g": g, "np": np}) == pytest.approx(float(expected), abs=1e-6)


def test_coefficients_make_up_the_bands(ddim):
    for name, of in (("energy", ddim["energy"][0, ..., 1]), ("projection", ddim["projection"][0])):
        plane = np.asarray(ddim[f"coefficient_{name}"])
        made = plane.reshape(*plane.shape[:2], -1) @ BANDS.averaging.reshape(-1, len(BANDS))
        np.testing.assert_allclose(made, of, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_theory_has_the_instrument_s_inner_products(subject, sampler):
    """Beyond g = 1, too, where the ideal gain is below 0 and the last step turns the difference round."""
    couplings, labels = np.array([0.0, 0.6, 4.0], np.float32), jnp.zeros(400, jnp.int32)
    shape, options = (SIZE, SIZE, CHANNELS), {"seed": 0, "sampler": sampler}
    run = jax.jit(lambda pairs: trajectories(subject, CLOCK, BANDS, couplings, pairs, labels, shape, **options))
    found = np.asarray(run(jnp.arange(400))["projection"], np.float64).mean(1)
    energy, inner = (np.asarray(v) for v in band_statistics(couplings, VARIANCE, CLOCK, float(sampler == "ancestral")))
    samples = 400 * CHANNELS * np.asarray(BANDS.count)
    error = np.sqrt(2 * energy * energy[:, -1:] / samples)
    assert np.all(np.abs(found - inner) < 5 * error + 1e-6 * energy[:, -1:])
    assert inner[2].min() < 0 < inner[2].max()


def test_shuffled_coefficients_have_no_order_and_the_true_ones_have(ddim):
    dims = ("pair", "step", "row", "column")
    names = ("coefficient_energy", "coefficient_projection")
    network = xr.Dataset({name: (dims, np.asarray(ddim[name])) for name in names})
    with jax.enable_x64(True):
        orders = shuffled_orders(network, BANDS, CLOCK.log_snr, 0, stochastic=False)
        inner = np.asarray(ddim["projection"], np.float64).mean(1)
        tau = commitment_of(np.asarray(ddim["energy"], np.float64)[..., 1].mean(1), CLOCK.log_snr, inner=inner).tau[0]
    assert order(tau) == 1
    assert abs(orders.mean()) < 0.3
    assert np.mean(orders == 1) < 0.3  # of three bands, one order in six is the true one


@pytest.fixture(scope="module")
def ancestral(subject):
    return measured(subject, "ancestral")


def test_ancestral_agrees_within_sampling_error(ancestral):
    """Each band averages n = pairs x coefficients x channels squares of normals: relative error sqrt(2 / n), twice."""
    found = relative(ancestral["energy"][..., 1])
    expected = theory(1.0)
    error = 2 * np.sqrt(2 / (PAIRS * CHANNELS * np.asarray(BANDS.count)))
    assert np.all(np.abs(found - expected) < 4 * error * expected + 1e-6)


def test_the_common_mode_does_not_feel_the_coupling(ddim):
    common = np.asarray(ddim["energy"][..., 0])
    np.testing.assert_allclose(common, np.broadcast_to(common[:1], common.shape), rtol=2e-4, atol=1e-6)


def in_one_pass(subject, modes, states):
    """Means over pairs of what `one_pass` finds."""
    labels = jnp.zeros(states.shape[2], jnp.int32)
    found = jax.jit(lambda g, states: one_pass(subject, CLOCK, modes, g, states, labels))(
        jnp.asarray(COUPLINGS), states
    )
    energy, product, state = (np.asarray(found[name], np.float64) for name in ("energy", "product", "state"))
    return energy.mean(1), product.mean(1), state.mean(0)


def test_one_pass_gains_are_rho_and_wiener(subject, ddim):
    """By regression and by energies alike: a linear denoiser without error leaves no residual."""
    energy, product, state = in_one_pass(subject, eigenmodes(BANDS, CHANNELS, None), ddim["states"])
    np.testing.assert_allclose(energy[0], np.asarray(ddim["energy"][0, ..., 1], np.float64).mean(0), rtol=1e-4)
    np.testing.assert_allclose(state, np.asarray(ddim["state_energy"], np.float64).mean(0), rtol=1e-4)
    expected = np.asarray(rho(COUPLINGS))[:, None, None] * wiener_gain(VARIANCE, CLOCK.sigma[:, None] ** 2)
    along, residual, _ = regression_gains(energy, product, state)
    by_energy = energy_gains(energy, state).gain
    np.testing.assert_allclose(along, expected, rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(by_energy, expected, rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(residual, 0, atol=1e-5)


@pytest.fixture(scope="module")
def unlike():
    """Data of two channels that are mixed from two of very unlike variance: what is found of their exact denoiser."""
    turn = np.array([[0.8, -0.6], [0.6, 0.8]])  # the channels of the data are these mixtures of independent ones
    variances = VARIANCE[BANDS.index][..., None] * np.array([1.8, 0.2])
    coefficient = np.einsum("cd,hwd,ed->hwce", turn, variances, turn)
    covariance = DataCovariance(variances.reshape(-1), np.empty(0), coefficient, {})

    @jax.jit
    def run(pairs):
        """Trajectories of the independent channels, whose sampler is the same; then their mixtures."""
        filtered = coupled_wiener(jnp.asarray(variances, jnp.float32), CLOCK)
        labels, shape = jnp.zeros(PAIRS, jnp.int32), (SIZE, SIZE, CHANNELS)
        return trajectories(
            filtered, CLOCK, BANDS, jnp.asarray(COUPLINGS), pairs, labels, shape, seed=0, sampler="ddim"
        )

    def mixed(gate):
        denoise = coupled_wiener(jnp.asarray(variances, jnp.float32), CLOCK)(gate)

        def turned(x, step, labels):
            return DenoiserOutput(denoise(x @ jnp.asarray(turn), step, labels).denoised @ jnp.asarray(turn.T))

        return turned

    found = run(jnp.arange(PAIRS))
    return found, mixed, covariance, found["states"] @ jnp.asarray(turn.T, jnp.float32)


def test_groups_of_modes_tell_colours_of_one_band_apart(unlike):
    """Levels of the recursion are those of the trajectories under groups by variance, and are late under whole bands,
    whose residual is the same mixture of modes at every step and not new."""
    found, mixed, covariance, states = unlike
    stored = (np.asarray(found["energy"], np.float64)[..., 1].mean(1), np.asarray(found["projection"], np.float64))
    late = {}
    with jax.enable_x64(True):
        network = commitment_of(stored[0], CLOCK.log_snr, inner=stored[1].mean(1))
    for name, known in (("groups", covariance), ("bands", None)):
        modes = eigenmodes(BANDS, CHANNELS, known)
        gains = regression_gains(*in_one_pass(mixed, modes, states))
        with jax.enable_x64(True):
            energy, inner = measured_statistics(gains, modes.share(), CLOCK, 0.0)
            found_of = commitment_of(energy, CLOCK.log_snr, inner=inner)
        relative_energy = energy[0] / energy[0, -1]
        expected = stored[0][0] / stored[0][0, -1]
        np.testing.assert_allclose(relative_energy, expected, rtol=1e-3, atol=1e-5)  # uncoupled energies: an identity
        late[name] = (found_of.tau - network.tau)[:3]  # at the last coupling nothing is left
    np.testing.assert_allclose(late["groups"], 0, atol=0.03)
    assert late["bands"].min() > 0.2


def test_error_enters_the_gain_by_energies_and_not_that_by_regression():
    """A denoiser with an error whose energy is as large as the signal's, apart from it in the residual."""
    rng, gain = np.random.default_rng(0), np.array([0.1, 0.6])
    state = rng.standard_normal((100_000, 2))
    error = gain * rng.standard_normal(state.shape)
    denoised = gain * state + error
    energy, inner, of_state = (np.mean(v, 0)[None] for v in (denoised**2, denoised * state, state**2))
    along, residual, _ = regression_gains(energy[None], inner[None], of_state)
    np.testing.assert_allclose(along[0, 0], gain, rtol=0.02)
    np.testing.assert_allclose(np.asarray(residual)[0, 0], gain**2, rtol=0.03)
    by_energy = energy_gains(energy[None], of_state).gain
    np.testing.assert_allclose(by_energy[0, 0], np.sqrt(2) * gain, rtol=0.02)


def test_projection_on_the_outcome_is_the_root_of_q(ddim):
    """Under DDIM a Gaussian mode only changes its scale, so its alignment with the end is sqrt(Q)."""
    end = np.asarray(ddim["energy"][0, :, -1, :, 1], np.float64).mean(0)
    aligned = np.asarray(ddim["projection"][0], np.float64).mean(0) / end
    np.testing.assert_allclose(aligned, np.sqrt(theory(0.0)[0]), atol=2e-5)


def test_projection_on_the_outcome_is_q_under_a_stochastic_sampler(ancestral):
    """The denoised is then a martingale: the end differs from it by what is added later, which does not correlate."""
    end = np.asarray(ancestral["energy"][0, :, -1, :, 1], np.float64).mean(0)
    aligned = np.asarray(ancestral["projection"][0], np.float64).mean(0) / end
    q = theory(1.0)[0]
    error = 2 * np.sqrt(2 / (PAIRS * CHANNELS * np.asarray(BANDS.count)))
    assert np.all(np.abs(aligned - q)[:, 1:] < 4 * error[1:] * np.sqrt(q[:, 1:]))
    assert np.abs(aligned - np.sqrt(q))[:, 1:].max() > 0.15  # the deterministic relation does not hold


def test_shuffled_bands_keep_sizes_and_lose_order(ddim):
    shuffled = shuffled_bands(BANDS, 0)
    np.testing.assert_array_equal(np.bincount(np.ravel(shuffled.index)), BANDS.count)
    assert np.any(shuffled.index != BANDS.index)
    ends = np.asarray(ddim["coefficient_energy"][:, -1]).mean(0).reshape(-1) @ shuffled.averaging.reshape(
        -1, len(BANDS)
    )
    assert ends.max() / ends.min() < 30 < VARIANCE.max() / VARIANCE.min()
