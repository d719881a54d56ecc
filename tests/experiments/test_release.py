"""Release: schedules, levels of known curves, the recursions' laws, and the study from end to end on a tiny network."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.checkpoint import save_model
from dit_jax.config import DiTConfig
from experiments.frame.bench import Bench
from experiments.frame.gains import Gains, ideal_gain
from experiments.frame.store import RunFolder
from experiments.frame.study import run_study
from experiments.frame.subject import untrained_model
from experiments.studies.release.analysis import (
    EXACT_THEORY,
    GAIN,
    LEAST_TAKEN,
    by_band,
    last_rise,
    levels_of,
    readings,
)  # fmt: skip
from experiments.studies.release.measure import ReleaseInstrument, release_steps, schedule
from experiments.studies.release.settings import ORDERS, ReleaseConfig
from experiments.studies.release.study import STUDY
from experiments.studies.release.theory import exact_ends, ideal_level, measured_ends
from ou_theory.clock import make_clock
from ou_theory.gain_model import wiener_gain

MODEL = DiTConfig(input_size=8, in_channels=3, hidden_size=16, depth=2, num_heads=2, num_classes=3, prediction="v")
CLOCK = make_clock(50)
VARIANCE = np.array([20.0, 5.0, 1.0, 0.3])

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("blank_figures")]


def settings(weights, **changes) -> ReleaseConfig:
    fast = {"pairs": 4, "untrained_pairs": 2, "steps": "8", "block": 2, "releases": 3, "couplings": (1.0, 0.4)}
    return ReleaseConfig(weights=weights, **{**fast, **changes})


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network whose attention acts: gates of adaLN with a bias."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    model = untrained_model(MODEL, 5)
    model.blocks.adaln.bias[...] = jnp.ones_like(model.blocks.adaln.bias[...])  # pyright: ignore
    save_model(model, folder, extra={"data": None})
    return str(folder)


@pytest.fixture(scope="module")
def finished(weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    run_study(STUDY, settings(weights), out, command="syncgap release <b>", progress=False)
    return out


@pytest.fixture(scope="module")
def stored(finished):
    run = RunFolder.open(finished)
    return {name: run.load(name) for name in ("network", "untrained", "exact", "analysis")}


# --- schedules


def test_the_two_orders_share_every_step_and_the_ends_are_never_and_always():
    releases = release_steps(CLOCK, 5)
    found = schedule(50, (0.3, 2.0), releases)
    assert found.shape == (2, 2, len(releases), 50)
    np.testing.assert_array_equal(found.sum(1), np.broadcast_to(np.array([0.3, 2.0])[:, None, None], (2, 7, 50)))
    np.testing.assert_array_equal(found[:, 0, 0], 0)
    np.testing.assert_array_equal(found[:, 1, -1], 0)
    np.testing.assert_array_equal(found[0, 0, -1], 0.3)
    for i, s in enumerate(releases):
        assert np.count_nonzero(found[0, 0, i]) == s
        assert not found[0, 0, i, s:].any()


def test_as_many_releases_as_steps_are_all_of_the_window():
    inside = np.flatnonzero(CLOCK.log_snr >= -6)
    np.testing.assert_array_equal(release_steps(CLOCK, 2000), np.concatenate([[0], inside, [50]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"couplings": ()}, "couplings must be finite and > 0"),
        ({"couplings": (0.0, 1.0)}, "couplings must be finite and > 0"),
        ({"couplings": (float("inf"),)}, "couplings must be finite and > 0"),
        ({"couplings": (1.5,), "gate_kind": "convex"}, "convex gate"),
        ({"releases": 1}, "releases must be at least 2"),
        ({"threshold": 1.0}, "threshold must lie between 0 and 1"),
    ],
)
def test_bad_settings_are_told(change, message):
    with pytest.raises(ValueError, match=message):
        ReleaseConfig(**change)


@pytest.mark.long
def test_a_sampler_without_two_steps_in_the_window_is_refused(weights, tmp_path):
    with pytest.raises(ValueError, match="must have a log-SNR of -6 or more"):
        run_study(STUDY, settings(weights, steps="1"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- levels


def test_the_last_rise_is_interpolated_and_may_be_missing():
    levels = np.array([0.0, 1.0, 3.0, 4.0])
    curves = np.array([[0, 0.25, 0.75, 1], [0, 0.8, 0.2, 1], [0.6, 0.7, 0.8, 1], [0, 0.1, 0.2, 0.3], [np.nan] * 4]).T
    np.testing.assert_allclose(last_rise(curves, levels, 0.5), [2.0, 3.375, np.nan, np.nan, np.nan])


def test_readings_of_steps_that_are_known():
    """Band 0 is alike from level 1 on, band 1 from level 3 on; always coupled, a fifth and a half are left."""
    levels, s = np.arange(6.0), np.arange(6)
    always = np.array([0.2, 0.5])
    early = np.where(s[:, None] > np.array([1, 3]), always, 1.0)  # halfway between 1 and 2, and between 3 and 4
    left = np.stack([early, always / early])[None, None]
    found = readings(left, levels, 0.5)
    np.testing.assert_allclose(found["level"][0, 0], [[1.5, 3.5]] * 2)
    np.testing.assert_allclose(found["taken"][0, 0], 1 - always)
    np.testing.assert_allclose(found["product"], 0, atol=1e-12)
    assert np.isnan(readings(left * 0 + 1, levels, 0.5)["level"]).all()  # coupling does nothing


def test_means_over_bands():
    energy, index = np.array([[1.0, 3.0], [5.0, 9.0]]), np.array([[0, 1], [1, 1]])
    np.testing.assert_allclose(by_band(energy, index, 2), [1, 17 / 3])


def test_the_end_lies_one_step_beyond():
    found = levels_of(CLOCK)
    np.testing.assert_array_equal(found[:-1], CLOCK.log_snr)
    assert found[-1] - found[-2] == pytest.approx(found[-2] - found[-3])


# --- theory


def exact_left(couplings, releases, clock=CLOCK, eta=0.0):
    gates = schedule(len(clock), couplings, releases)
    ends = exact_ends(gates.reshape(-1, len(clock)), VARIANCE, np.eye(4), clock, eta, "joint")
    ends = ends.reshape(*gates.shape[:3], 4)
    return ends / ends[:1, :1, :1]


def test_what_the_two_orders_leave_multiplies_under_ddim_alone():
    releases = release_steps(CLOCK, 6)
    left = exact_left((0.1, 0.5), releases)
    np.testing.assert_allclose(left[:, 0] * left[:, 1], np.broadcast_to(left[:, 0, -1:], left[:, 0].shape), rtol=1e-12)
    noisy = exact_left((0.1, 0.5), releases, eta=1.0)
    assert np.abs(noisy[:, 0] * noisy[:, 1] / noisy[:, 0, -1:] - 1).max() > 0.01


def test_without_coupling_nothing_is_taken():
    np.testing.assert_array_equal(exact_left((0.0,), release_steps(CLOCK, 6)), 1)


def test_longer_coupling_takes_more_at_every_release():
    left = exact_left((0.1, 0.5, 1.0), release_steps(CLOCK, 8))
    assert np.all(np.diff(left[:, 0], axis=1) < 0)
    assert np.all(np.diff(left[:, 1], axis=1) >= 0)
    assert np.all(np.diff(left[:, 0, 1:], axis=0) < 0)  # and so does stronger coupling


@pytest.mark.parametrize("g", [0.3, 1.0])
@pytest.mark.long
def test_with_many_steps_levels_are_those_of_the_continuum(g):
    clock = make_clock(1000)
    releases = np.arange(len(clock) + 1)
    # the difference that is there to be taken ends at 0 in the continuum, so D itself is what passes one half
    found = readings(exact_left((g,), releases, clock)[None], levels_of(clock), 0.5)["alike_level"][0, 0, 0]
    expected = ideal_level(ideal_gain(np.array([g])))[0] - np.log(VARIANCE)
    np.testing.assert_allclose(found, expected, atol=0.06)
    np.testing.assert_allclose(found - found[0], np.log(VARIANCE[0] / VARIANCE), atol=0.06)


def test_the_level_of_a_mode_that_is_not_left_at_all_is_that_of_its_snr():
    assert ideal_level(np.array([0.0]))[0] == pytest.approx(0)
    assert np.all(np.diff(ideal_level(np.array([0.0, 0.3, 0.8]))) > 0)


def test_the_recursion_under_wiener_gains_is_the_exact_one():
    couplings, releases = (0.5, 1.0), release_steps(CLOCK, 4)
    wiener = np.asarray(wiener_gain(jnp.asarray(VARIANCE), jnp.asarray(CLOCK.sigma)[:, None] ** 2), np.float64)
    gain = ideal_gain(np.array([0.0, *couplings]))[:, None, None] * wiener
    start = np.full((1, 4), 1 / CLOCK.alpha_bar[0])
    gates = schedule(50, couplings, releases).reshape(-1, 50)
    active = np.argmin(np.abs(gates[..., None] - np.array([0.0, *couplings])), -1)
    with jax.enable_x64(True):
        found = measured_ends(Gains(gain, 0 * gain, start), active, np.eye(4), CLOCK, 0.0)
    np.testing.assert_allclose(found, exact_ends(gates, VARIANCE, np.eye(4), CLOCK, 0.0, "joint"), rtol=1e-6)


# --- the measurement


@pytest.mark.long
def test_no_phase_is_the_uncoupled_run_and_the_whole_is_the_coupled_one_bit_for_bit(weights, tmp_path):
    bench = Bench("release", settings(weights, couplings=(0.7,)), tmp_path / "o")
    instrument, pairs = ReleaseInstrument(bench), np.arange(2)
    found = instrument.network(bench.network, pairs, pairs)["energy"]
    never, always = (
        instrument.network(bench.network, pairs, pairs, np.full_like(instrument.gates, g))["energy"] for g in (0.0, 0.7)
    )
    for order, (first, last) in enumerate(((never, always), (always, never))):
        np.testing.assert_array_equal(found[:, 0, order, 0], first[:, 0, order, 0])
        np.testing.assert_array_equal(found[:, 0, order, -1], last[:, 0, order, -1])
    assert np.abs(always / never - 1).max() > 0.01  # coupling does something here
    assert np.abs(found[:, 0, :, 1:-1] / never[:, 0, :, 1:-1] - 1).max() > 0.01
    np.testing.assert_array_equal(never, np.broadcast_to(never[:, :, :1, :1], never.shape))  # g = 0: D = 1 for all


@pytest.mark.long
@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_the_exact_denoiser_agrees_with_the_recursion_in_both_orders(weights, tmp_path, sampler):
    """Under DDIM the ratios are exact; under the ancestral sampler to the sampling error of the pairs."""
    config = settings(weights, couplings=(0.1, 0.5), sampler=sampler, steps="20")
    bench = Bench("release", config, tmp_path / "o")
    instrument, pairs = ReleaseInstrument(bench), np.arange(64)
    variance = np.array([20.0, 8.0, 3.0, 1.0, 0.5, 0.2, 0.1])
    energy = np.asarray(instrument.exact(variance, pairs, pairs % 3)["energy"], np.float64)
    measured = by_band(energy, bench.bands.index, 7)
    flat = instrument.gates.reshape(-1, 20)
    theory = exact_ends(flat, variance, np.eye(7), bench.clock, config.eta, "joint").reshape(measured.shape[1:])
    if sampler == "ddim":
        left, expected = (each / each[:1, :1, :1] for each in (measured.mean(0), theory))
        np.testing.assert_allclose(left, expected, rtol=1e-3, atol=1e-6)
    else:
        error = measured.std(0, ddof=1) / 8
        assert np.all(np.abs(measured.mean(0) - theory) < 5 * error)


# --- the study


@pytest.mark.long
def test_the_folder_holds_everything(finished, stored, has_ink):
    analysis, network = stored["analysis"], stored["network"]
    assert network.energy.dims == ("pair", "coupling", "order", "release", "row", "column")
    left = analysis.left.sel(bound="estimate")
    np.testing.assert_allclose(left.sel(order=ORDERS[0]).isel(release=0), 1, rtol=1e-5)
    np.testing.assert_allclose(left.sel(order=ORDERS[1]).isel(release=-1), 1, rtol=1e-5)
    # coupled always is the same run in both orders
    np.testing.assert_allclose(
        left.sel(order=ORDERS[0]).isel(release=-1), left.sel(order=ORDERS[1]).isel(release=0), rtol=1e-4, atol=1e-9
    )
    pair = analysis.left.sel(source=["exact", EXACT_THEORY], bound="estimate").values
    np.testing.assert_allclose(pair[0], pair[1], rtol=1e-3, atol=1e-6)
    assert np.isfinite(left.sel(source=GAIN)).all()
    applies, taken = analysis.applies.sel(source="network").values, analysis.taken.sel(source="network").values
    np.testing.assert_array_equal(applies, taken[..., 1] > LEAST_TAKEN)
    level = analysis.level.sel(source="network", bound="estimate").values
    assert np.isnan(level[np.broadcast_to(applies[:, None] == 0, level.shape)]).all()
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    section = json.loads((finished / "section.json").read_text())
    for name in section["captions"]:
        assert has_ink(finished / "figures" / f"{name}.png")
    assert "release &lt;b&gt;" in (finished / "report.html").read_text()


@pytest.mark.long
def test_uncoupled_replicas_of_the_gain_are_those_of_the_arms(stored):
    """The reference of the curves is the uncoupled run on whose states the gain is measured."""
    network = stored["network"]
    first = network.energy.isel(coupling=0, order=0, release=0).mean(("row", "column"))
    count = network["count"].values
    end = (network.uncoupled_energy.isel(step=-1) * count).sum("band") / count.sum()
    np.testing.assert_allclose(first, end, rtol=1e-4)


@pytest.mark.long
def test_the_ancestral_sampler_leaves_the_law_of_the_orders_untested(weights, tmp_path):
    config = settings(weights, sampler="ancestral", couplings=(1.0,), pairs=2)
    run_study(STUDY, config, tmp_path / "run", progress=False)
    claims = json.loads((tmp_path / "run" / "claims.json").read_text())["claims"]
    assert [claim["verdict"] for claim in claims][1] == "not tested"
