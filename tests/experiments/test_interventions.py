"""Interventions: arms, the estimates made from them, and the study from end to end on a tiny random network."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from dit_jax.checkpoint import save_model
from dit_jax.config import DiTConfig
from dit_jax.diffusion import network_denoiser
from experiments.frame.bench import Bench
from experiments.frame.draws import pair_draws
from experiments.frame.instrument import trajectories
from experiments.frame.store import RunFolder
from experiments.frame.study import run_study
from experiments.frame.subject import untrained_model
from experiments.studies.interventions import measure as module
from experiments.studies.interventions.analysis import arm_readings, estimates
from experiments.studies.interventions.arms import (
    edit_arms,
    gate_arms,
    layer_sets,
    log_snr_weights,
    schedules,
    spread,
    windows,
)  # fmt: skip
from experiments.studies.interventions.measure import InterventionsInstrument
from experiments.studies.interventions.page import localisation, localised
from experiments.studies.interventions.settings import InterventionsConfig, last_layers
from experiments.studies.interventions.study import STUDY
from ou_theory.clock import make_clock

MODEL = DiTConfig(input_size=8, in_channels=3, hidden_size=16, depth=3, num_heads=2, num_classes=3, prediction="v")
CLOCK = make_clock(8)
ELL = make_clock(50).log_snr

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("blank_figures")]


def settings(weights, **changes) -> InterventionsConfig:
    fast = {"pairs": 4, "untrained_pairs": 2, "steps": "8", "block": 2, "schedule_strength": 0.3}
    return InterventionsConfig(weights=weights, **{**fast, **changes})


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network whose attention acts: gates of adaLN with a bias."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    model = untrained_model(MODEL, 5)
    model.blocks.adaln.bias[...] = jnp.ones_like(model.blocks.adaln.bias[...])  # pyright: ignore
    save_model(model, folder, extra={"data": {"class_names": ["ant", "bee", "cow"]}})
    return str(folder)


@pytest.fixture(scope="module")
def finished(weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    page = run_study(STUDY, settings(weights), out, command="syncgap interventions <b>", progress=False)
    assert page == out / "report.html"
    return out


@pytest.fixture(scope="module")
def stored(finished):
    run = RunFolder.open(finished)
    return {name: run.load(name) for name in ("network", "edits", "untrained", "analysis")}


# --- arms


@pytest.mark.parametrize(("depth", "fifth"), [(1, 1), (5, 1), (6, 2), (12, 3), (28, 6)])
def test_the_last_fifth_is_rounded_up(depth, fifth):
    assert last_layers(depth) == fifth
    sets = layer_sets(depth, 12)
    for end in ("first", "middle", "last"):
        assert sets[f"{end} {fifth}"][1].sum() == fifth
    assert sets[f"last {fifth}"][1][-1]
    assert sets[f"first {fifth}"][1][0]
    assert ("last 5" in sets) == (depth == 28)  # the paper's


def test_layer_sets_complement_each_other_and_single_layers_are_spread():
    sets = layer_sets(12, 6)
    assert set(sets) == {
        *("layer 0", "layer 2", "layer 4", "layer 7", "layer 9", "layer 11", "middle 3"),
        *(f"{end} {k}" for end in ("first", "last") for k in (3, 6, 9)),
    }
    for k in (3, 6, 9):
        np.testing.assert_array_equal(sets[f"first {k}"][1], ~sets[f"last {12 - k}"][1])
    singles = [layers for kind, layers in layer_sets(12, 12).values() if kind == "layer"]
    np.testing.assert_array_equal(np.sum(singles, 0), np.ones(12))
    assert list(spread(28, 12)[[0, -1]]) == [0, 27]
    assert spread(28, 12).size == 12
    assert list(spread(3, 12)) == [0, 1, 2]


@pytest.mark.parametrize("steps", [8, 50, 250])
def test_windows_partition_the_steps(steps):
    ell = make_clock(steps).log_snr
    found = windows(ell)
    np.testing.assert_array_equal(np.sum(list(found.values()), 0), np.ones(steps))
    assert found["early"][0]
    assert found["late"][-1]
    third = (ell[-1] + 6) / 3  # the estimator's window opens at -6 nats
    for i, name in enumerate(("early", "middle", "late")):
        levels = ell[found[name]]
        assert i == 0 or levels.min() >= -6 + i * third
        assert i == 2 or levels.max() < -6 + (i + 1) * third


@pytest.mark.parametrize("steps", [8, 50])
def test_schedules_have_the_same_total_inside_the_window(steps):
    ell = make_clock(steps).log_snr
    found = schedules(ell, 0.2)
    before = ell < -6
    first = int(before.sum())
    for name, g in found.items():
        assert np.trapezoid(g[first:], ell[first:]) == pytest.approx(0.2 * (ell[-1] - ell[first])), name
        assert not g[before].any(), name
        assert (g >= 0).all(), name
    assert found["constant"][first:] == pytest.approx(0.2)
    np.testing.assert_array_equal((found["first half"] > 0) & (found["second half"] > 0), np.zeros(steps, bool))
    assert np.all(np.diff(found["rising"][first:]) > 0)
    assert np.all(np.diff(found["falling"][first:]) < 0)


def test_a_convex_gate_must_leave_heads_something_of_their_own(weights, tmp_path):
    with pytest.raises(ValueError, match="convex gate must leave"):
        run_study(STUDY, settings(weights, gate_kind="convex"), tmp_path / "run")
    with pytest.raises(ValueError, match=r"couplings of 2\.2"):
        run_study(STUDY, settings(weights, gate_kind="convex", strength=0.5, schedule_strength=0.6), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_window_of_one_step_is_refused(weights, tmp_path):
    with pytest.raises(ValueError, match="fewer than two steps"):
        log_snr_weights(np.array([-9.0, -7.0, 1.0]))
    with pytest.raises(ValueError, match="only 1 of 2 have"):
        run_study(STUDY, settings(weights, steps="2"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_gates_of_the_arms():
    config = InterventionsConfig(strength=0.7)
    arms = gate_arms(CLOCK, MODEL, config)
    assert list(arms)[:2] == ["none", "all"]
    assert not arms["none"].gate.any()
    np.testing.assert_array_equal(arms["all"].gate, np.full((8, 3), 0.7))
    for kind in ("layer", "window"):  # one by one they make up everything
        np.testing.assert_allclose(sum(arm.gate for arm in arms.values() if arm.kind == kind), arms["all"].gate)
    edits = edit_arms(CLOCK, MODEL, config)
    np.testing.assert_array_equal([edits[f"head {h}"].closed for h in (0, 1)], [[False, True], [True, False]])
    assert edits["no head"].closed.all()
    np.testing.assert_array_equal(edits["keys, values"].shared, [0, 0.7, 0.7])
    assert not edits["keys, values"].gate.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strength": 0.0}, "strength must be finite and > 0"),
        ({"strength": float("nan")}, "strength must be finite and > 0"),
        ({"schedule_strength": -1.0}, "schedule_strength must be finite and > 0"),
        ({"singles": 0}, "singles must be at least 1"),
        ({"pairs": 1}, "pairs must be at least 2"),
    ],
)
def test_bad_settings_are_told(change, message):
    with pytest.raises(ValueError, match=message):
        InterventionsConfig(**change)


# --- the measurement


def test_no_coupling_and_all_of_it_are_the_main_experiment_s(weights, stored, tmp_path):
    """Arms "none" and "all" against `trajectories` at g = 0 and g = 1, same pairs and noise."""
    study = Bench("interventions", settings(weights), tmp_path / "o")
    found = jax.jit(
        lambda model: trajectories(
            lambda gate: network_denoiser(model, CLOCK, gate),
            CLOCK,
            study.bands,
            jnp.array([0.0, 1.0]),
            jnp.arange(4),
            jnp.arange(4) % 3,
            (8, 8, 3),
            seed=0,
            sampler="ddim",
        )["energy"][..., 1]
    )(study.network)
    measured = stored["network"].energy
    np.testing.assert_allclose(measured.sel(arm="none"), found[0], rtol=1e-4)
    np.testing.assert_allclose(measured.sel(arm="all"), found[1], rtol=1e-4)
    assert np.abs(found[1] / found[0] - 1).max() > 0.01  # coupling does something here


def test_closing_all_heads_is_no_coupling(stored):
    none = stored["network"].energy.sel(arm="none")
    np.testing.assert_allclose(stored["edits"].energy.sel(arm="no head"), none, rtol=1e-4)
    assert stored["analysis"].attrs["closure"] < 1e-4
    for name in stored["edits"].arm.values[1:]:  # and every other one does something
        assert np.abs(stored["edits"].energy.sel(arm=name) / none - 1).max() > 1e-3, name


def test_late_arms_leave_early_steps_as_they_are(stored):
    energy = stored["network"].energy
    late = np.flatnonzero(windows(CLOCK.log_snr)["late"])[0]
    none, arm = energy.sel(arm="none"), energy.sel(arm="late steps")
    np.testing.assert_allclose(arm[:, :late], none[:, :late], rtol=1e-5)
    assert np.abs(arm[:, late:] / none[:, late:] - 1).max() > 1e-3


def test_other_strengths_compile_nothing_again(weights, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "band_mean", lambda *a, real=module.band_mean: calls.append(1) or real(*a))
    config = settings(weights)
    study = Bench("interventions", config, tmp_path / "o")
    instrument, pairs = InterventionsInstrument(study), np.arange(2)
    each = []
    for g in (0.2, 0.9):
        changed = settings(weights, strength=g)
        arms = {name: gate_arms(CLOCK, MODEL, changed)[name] for name in ("none", "all")}
        each.append(instrument.energies(study.network, arms, False, pairs, pairs)["energy"])
    once = len(calls)
    assert once >= 1
    assert once <= 2  # a scan may trace its body twice
    np.testing.assert_array_equal(each[0][:, 0], each[1][:, 0])
    assert np.abs(each[0][:, 1] - each[1][:, 1]).max() > 0


# --- the estimates


def linear_energy(levels, decided=1.0, pairs=4, jitter=None):
    """Energies (P, 1, K, B) of a band that is decided to a fraction at one level."""
    q = np.where(ELL[:, None] >= np.asarray(levels)[None], 1.0, 1e-6) * np.asarray(decided)
    scale = np.ones(pairs) if jitter is None else jitter
    return np.broadcast_to(q, (pairs, *q.shape))[:, None] * scale[:, None, None, None]


def along(energy):
    """Inner products with the end of differences that only change their size."""
    return np.sqrt(energy * energy[..., -1:, :])


def test_shares_of_known_gaps():
    """Gaps 4, 1 and 2.5 nats: the third arm brings half of what the second takes. No pair differs: no spread."""
    levels = np.array([-3.0, -3.0, 1.0])
    arms = [levels, [-3.0, -1.0, 0.0], [-3.0, -2.0, 0.5]]
    energy = np.concatenate([linear_energy(arm) for arm in arms], 1)
    with jax.enable_x64(True):
        found = arm_readings(energy, along(energy), ELL, pair_draws(0, 4, 20))
    step = np.diff(ELL).max()
    np.testing.assert_allclose(found["gap"][0], [4, 1, 2.5], atol=step)
    assert found["share"][0, 2] == pytest.approx(0.5, abs=step / 3 * 2)
    np.testing.assert_array_equal(found["share"][:, 1], 1.0)
    np.testing.assert_array_equal(found["share"][:, 0], 0.0)
    for values in found.values():
        np.testing.assert_allclose(values[1:], np.broadcast_to(values[0], values[1:].shape), atol=1e-9)


def test_decided_fraction_and_what_is_left():
    """What is erased after it was decided is not left."""
    energy = np.concatenate([linear_energy([-3.0, -3.0, 1.0], f) for f in (1.0, 0.25, 0.5)], 1)
    energy[:, 2, -1] /= 5
    with jax.enable_x64(True):
        found = arm_readings(energy, along(energy), ELL, pair_draws(0, 4, 20))
    np.testing.assert_allclose(found["decided"][0], [[1] * 3, [0.25] * 3, [0.5] * 3])
    np.testing.assert_allclose(found["left"][0, 2], 0.1)
    np.testing.assert_allclose(found["gap_energy"], found["gap"])


def test_a_band_that_differs_more_than_uncoupled_keeps_its_level():
    """A ramp to twice the reference is a ramp: it decides twice as much at the same level."""
    ramp = np.broadcast_to(np.clip((ELL + 6) / (ELL[-1] + 6), 0, 1)[:, None], (50, 3))
    energy = np.stack([ramp, np.concatenate([ramp[:, :2], 2 * ramp[:, 2:]], 1)])[None].repeat(3, 0)
    with jax.enable_x64(True):
        found = arm_readings(energy, along(energy), ELL, pair_draws(0, 3, 5))
    np.testing.assert_allclose(found["gap"][0], 0, atol=1e-9)
    np.testing.assert_allclose(found["decided"][0], [[1] * 3, [1, 1, 2]])


def test_error_moves_the_level_of_all_energy_alone():
    energy = np.concatenate([linear_energy([-3.0, -3.0, 1.0])] * 2, 1).copy()
    inner = along(energy)
    energy[:, :, ELL < 1, 2] += 0.5
    with jax.enable_x64(True):
        found = arm_readings(energy, inner, ELL, pair_draws(0, 4, 5))
    step = np.diff(ELL).max()
    np.testing.assert_allclose(found["gap"][0], 4, atol=step)
    assert np.all(found["gap_energy"][0] < 2)
    np.testing.assert_allclose(found["floor"][0, 1], [0, 0, 0.5], atol=1e-5)


def test_identical_replicas_have_no_levels_and_no_verdict():
    with jax.enable_x64(True), np.errstate(invalid="ignore"):
        found = arm_readings(np.zeros((3, 2, 50, 3)), np.zeros((3, 2, 50, 3)), ELL, pair_draws(0, 3, 10))
    assert np.isnan(found["gap"]).all()
    assert localised([np.nan] * 3, [np.nan] * 3, [np.nan] * 3) == "undecided"


@pytest.mark.parametrize(
    ("effect", "last", "difference", "verdict"),
    [
        ((3, 2, 4), (0.8, 0.6, 1.0), (0.7, 0.5, 0.9), "holds"),
        ((3, -0.1, 4), (0.8, 0.6, 1.0), (0.7, 0.5, 0.9), "undecided"),
        ((3, 2, 4), (0.8, 0.4, 1.0), (0.7, 0.5, 0.9), "undecided"),
        ((3, 2, 4), (0.8, 0.6, 1.0), (0.1, -0.1, 0.2), "undecided"),
        ((3, 2, 4), (0.3, 0.1, 0.5), (0.2, 0.1, 0.3), "does not hold"),
        ((3, 2, 4), (0.8, 0.6, 1.0), (-0.2, -0.3, -0.1), "does not hold"),
        ((3, 2, 4), (np.nan,) * 3, (0.7, 0.5, 0.9), "undecided"),
    ],
)
def test_the_rule_of_the_claim(effect, last, difference, verdict):
    assert localised(effect, last, difference) == verdict


NEEDED = ["none", "all", "first 1", "middle 1", "last 1", "constant"]  # arms that the claim and its controls read


def synthetic(stored, shares):
    """Some arms of the stored groups with energies of our choice: the gap falls from 4 nats by a share of 3 in every
    arm."""
    rng = np.random.default_rng(0)
    jitter = 1 + 0.02 * rng.random(6)
    sources = {}
    for group in ("network", "edits", "untrained"):
        dataset = stored[group]
        dataset = dataset.sel(arm=[name for name in dataset.arm.values if name in (*NEEDED, "no head")])
        levels = np.linspace(-3, 1, 7)
        energy = []
        for name in dataset.arm.values:
            moved = levels.copy()
            moved[1:] = np.linspace(-3, 1, 6) + 3 * shares(str(name)) * np.linspace(1, 0, 6)
            energy.append(linear_energy(moved, pairs=6, jitter=jitter))
        dims, values = ("pair", "arm", "step", "band"), np.concatenate(energy, 1)
        sources[group] = xr.Dataset(
            {"energy": (dims, values), "projection": (dims, along(values))},
            coords={name: dataset[name] for name in ("arm", "kind", "layer", "band", "radius", "count")}
            | {"step": np.arange(50), "ell": ("step", ELL)}
            | {"gate": (("arm", "step", "layer"), np.zeros((dataset.sizes["arm"], 50, 3)))},
        )
    return sources


@pytest.mark.parametrize(
    ("shares", "verdict", "first"),
    [
        ({"last 1": 0.8, "first 1": 0.1}, "holds", False),
        ({"last 1": 0.1, "first 1": 0.8}, "does not hold", True),
        ({"last 1": 0.8, "first 1": 0.95}, "does not hold", True),
    ],
)
def test_the_claim_and_its_controls_can_go_both_ways(stored, shares, verdict, first):
    analysis = estimates(synthetic(stored, lambda name: {"none": 0, "all": 1, **shares}.get(name, 0.3)), 3, 0)
    claim = localisation(analysis)
    assert claim.verdict == verdict
    controls = {control.name: control for control in claim.controls}
    assert controls["first 1 layers"].also_holds is first
    assert controls["untrained network"].also_holds is (verdict == "holds")  # given the same energies here
    assert controls["equal share"].value == pytest.approx(1 / 3)


def test_without_an_effect_there_is_no_share(stored):
    claim = localisation(estimates(synthetic(stored, lambda name: 0.0), 3, 0))
    assert claim.verdict == "undecided"
    assert claim.value is None
    assert claim.interval is None
    assert "no effect to be localised" in claim.statement
    assert not any(control.also_holds for control in claim.controls)


# --- the study


def test_the_folder_holds_everything(finished, stored, has_ink):
    assert stored["network"].energy.dims == ("pair", "arm", "step", "band")
    for group in ("network", "edits", "untrained"):
        assert np.isfinite(stored[group].energy).all()
    analysis = stored["analysis"]
    names = [*stored["network"].arm.values, *stored["edits"].arm.values]
    assert list(analysis.arm.values) == names
    assert list(stored["untrained"].arm.values) == ["none", "all", "first 1", "last 1", "middle 1"]
    np.testing.assert_array_equal(analysis.share.sel(arm="none"), 0)
    np.testing.assert_array_equal(analysis.share.sel(arm="all"), 1)
    np.testing.assert_array_equal(analysis.gap_against_constant.sel(arm="constant"), 0)
    np.testing.assert_allclose(analysis.left.sel(arm="none"), 1, rtol=1e-12)
    assert np.all(analysis.decided.sel(arm="none", bound="estimate") > 1 - 1e-6)
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert manifest["kind"] == "interventions"
    section = json.loads((finished / "section.json").read_text())
    assert {claim["id"] for claim in section["claims"]} == {3}
    for name in section["captions"]:
        assert has_ink(finished / "figures" / f"{name}.png")
    page = (finished / "report.html").read_text()
    assert "interventions &lt;b&gt;" in page
    assert "Localised in the last layers" in page
