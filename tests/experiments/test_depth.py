"""The depth study: its readings against exact cases and against each other, and a run end to end."""

import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_jax.checkpoint import load_model
from dit_jax.diffusion import network_denoiser
from experiments import cli
from experiments.frame import study
from experiments.frame.instrument import shuffled_bands, token_bands, trajectories
from experiments.frame.measured import Measured
from experiments.frame.store import RunFolder
from experiments.frame.study import run_study
from experiments.studies.depth import scaled
from experiments.studies.depth.analysis import _fill, analyse
from experiments.studies.depth.family import answer, localised, together
from experiments.studies.depth.page import gap_cell
from experiments.studies.depth.probe import patch_modes, probe_bands, probe_scores
from experiments.studies.depth.readings import localisation, made_in_last, probe_readings, readings
from experiments.studies.depth.settings import FOLDS, DepthConfig
from experiments.studies.depth.stream import stream_readings
from experiments.studies.depth.study import STUDY
from experiments.studies.depth.verdicts import known_gap, verdict_of
from ou_theory.clock import make_clock
from ou_theory.modes import radial_bands

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("blank_figures")]

FLAGS = ["--pairs", "4", "--block", "4", "--untrained-pairs", "4", "--steps", "10", "--couplings", "0", "1"]
FLAGS += ["--probe-pairs", "8", "--probe-levels", "4", "--quiet"]


@pytest.fixture(scope="module")
def finished(weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "depth"
    assert cli.main(["depth", "--weights", weights, "--out", str(out), *FLAGS]) == 0
    return RunFolder.open(out)


@pytest.mark.slow
def test_the_last_readout_is_the_networks_own_output(finished, weights):
    """What the depth study finds after the last block is what the main experiment finds at the output."""
    clock, bands = make_clock("10"), radial_bands(8, 8, 6)
    model = load_model(weights)
    found = jax.jit(
        lambda model: trajectories(
            lambda gate: network_denoiser(model, clock, gate),
            clock,
            bands,
            jnp.asarray([0.0, 1.0]),
            jnp.arange(4),
            jnp.asarray([0, 1, 2, 0]),
            (8, 8, 3),
            seed=0,
            sampler="ddim",
        )
    )(model)
    stored = finished.load("network")
    last = stored.readout.isel(layer=-1).transpose("coupling", "pair", "step", "band")
    np.testing.assert_allclose(last, found["energy"][..., 1], rtol=2e-4)
    plane, shuffled = np.asarray(found["coefficient_energy"]), shuffled_bands(bands, 0)
    np.testing.assert_allclose(
        stored.readout_shuffled.isel(layer=-1, coupling=0).transpose("pair", "step", "band"),
        plane.reshape(*plane.shape[:2], -1) @ shuffled.averaging.reshape(-1, len(bands)),
        rtol=2e-4,
    )


@pytest.mark.slow
def test_the_folder_holds_three_readings_with_controls(finished):
    analysis = finished.load("analysis")
    for source in ("network", "untrained"):
        for reading in ("raw", "normalised", "readout", "probe", "scaled", "joined"):
            assert np.isfinite(analysis[f"{source}_{reading}_gap"].isel(bound=0)).all()
            assert analysis[f"{source}_{reading}_gap"].sizes["layer"] == 3
    stored = finished.load("network")
    assert stored.raw.sizes == {"pair": 4, "coupling": 2, "layer": 3, "step": 10, "token_band": 5, "parity": 2}
    claims = finished.read_json("claims.json")["claims"]
    assert [claim["id"] for claim in claims] == [3, 3, 3, 3]
    captions = finished.read_json("section.json")["captions"]
    assert (finished.path / "report.html").read_text().count("<figure") == len(captions)


@pytest.mark.slow
def test_a_finished_run_is_drawn_again_and_joined(finished):
    before = finished.read_json("section.json")
    assert cli.main(["report", str(finished.path)]) == 0
    assert RunFolder.open(finished.path).read_json("section.json") == before
    assert cli.main(["report", str(finished.path.parent)]) == 0
    joint = (finished.path.parent / "report.html").read_text()
    assert "localised in depth" in joint
    assert 'id="depth"' in joint
    assert 'id="depth-together"' not in joint  # one network is no family


@pytest.mark.slow
def test_several_networks_are_shown_side_by_side(finished, tmp_path, has_ink):
    for name in ("one", "two"):
        shutil.copytree(finished.path, tmp_path / name)
    run = RunFolder.open(tmp_path / "two", writable=True)
    run.manifest["model"]["prediction"] = "v"
    run.write_json("manifest.json", run.manifest)
    assert cli.main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.index('id="depth-together"') < page.index('id="one"') < page.index('id="two"')
    assert has_ink(tmp_path / "figures" / "family.png")
    section, _ = together([Measured.of(RunFolder.open(tmp_path / name), DepthConfig) for name in ("two", "one")])
    (table,) = section.tables
    assert [row[:4] for row in table.rows] == [["one", "tiny", "the noise", "2"], ["two", "tiny", "v", "2"]]


def test_energies_over_the_stream_forget_its_size():
    """A size by layer and step changes raw energies and their levels, and nothing over the stream's mean square."""
    rng, ell, count = np.random.default_rng(0), np.linspace(-6, 6, 12), np.array([1, 3, 5])
    raw = rng.uniform(0.5, 2, (6, 2, 4, 12, 3, 2)) * (1 + np.exp(-np.arange(3) - ell[:, None]))[..., None]
    size = np.exp(np.arange(4)[:, None] + 0.5 * ell)[:, :, None, None]
    weights = np.full((2, 6), 1 / 6)
    (one, plain), (two, grown) = (
        stream_readings(each, count, ell, np.array([0, 5, 11]), weights) for each in (raw, raw * size)
    )
    np.testing.assert_allclose(two["gap"], one["gap"], rtol=1e-9)
    np.testing.assert_allclose(
        grown["energy"] / grown["size"][..., None], plain["energy"] / plain["size"][..., None], rtol=1e-9
    )
    factor = np.exp(np.arange(4)[:, None] + 0.5 * ell[[0, 5, 11]])
    np.testing.assert_allclose(grown["size"] / plain["size"], np.broadcast_to(factor, (3, 4, 3)), rtol=1e-9)
    before = readings(raw[..., 1], ell, weights)["gap"]
    assert np.abs(readings((raw * size)[..., 1], ell, weights)["gap"] - before).max() > 0.1


def network(prediction, readout, scaled=False):
    return prediction, {"readout": readout, "scaled": scaled}


@pytest.mark.parametrize(
    ("networks", "said"),
    [
        ([network("epsilon", True), network("v", False), network("x0", False)], "is not made there"),
        ([network("epsilon", True, True), network("v", False, True)], "does not depend on how"),
        ([network("epsilon", False), network("v", False)], "None of these networks"),
        ([network("epsilon", True), network("v", True, None)], "do not decide"),
        ([network("epsilon", True, True), network("epsilon", True), network("v", False)], "disagree between networks"),
        ([("epsilon", {"readout": True})], "lets through of the noise"),
    ],
)
def test_the_sentence_over_networks_follows_from_them(networks, said):
    text = answer(dict(enumerate(networks)))
    assert said in text
    assert (
        sum(name in text for name in ("not made there", "depend", "None of", "decide", "disagree", "lets through of"))
        == 1
    )


def test_networks_are_counted_by_what_they_predict():
    text = answer({"a": network("epsilon", True), "b": network("epsilon", False), "c": network("v", False, True)})
    assert "in 1 of 2 that predict the noise and 0 of 1 that predict v; up to one scalar" in text
    assert "in 0 of 2 that predict the noise and 1 of 1 that predict v. " in text


def analysis_of(gap, share, edges=((0, 0), (0, 0))):
    """Of a network with ten layers and bands DC, low, high; edges of low and high at layers 8 and 10."""
    edge = np.zeros((1, 11, 3))
    edge[0, 8, 1:], edge[0, 10, 1:] = edges
    return xr.Dataset(
        {
            "network_readout_gap": (("coupling", "layer", "bound"), np.tile(np.asarray(gap, float), (1, 11, 1))),
            "network_readout_share_claimed": (("bound",), np.asarray(share, float)),
            "network_readout_edge": (("coupling", "layer", "band"), edge),
        },
        coords={"layer": np.arange(11)},
    )


def test_a_network_without_a_gap_or_with_a_wide_interval_is_neither():
    assert localised(analysis_of([4, 3, 5], [0.9, 0.7, 1.1])) == {"readout": True}
    assert localised(analysis_of([4, 3, 5], [0.2, 0.1, 0.5])) == {"readout": False}
    assert localised(analysis_of([4, 3, 5], [0.5, 0.4, 0.6])) == {"readout": None}
    assert localised(analysis_of([0.1, -1, 1], [0.9, 0.7, 1.1])) == {"readout": None}
    assert localised(analysis_of([0, 0, 0], [np.nan] * 3)) == {"readout": None}


LATE, EARLY = [0.9, 0.7, 1.1], [0.2, 0.1, 0.4]


@pytest.mark.parametrize(
    ("share", "low", "high", "verdict"),
    [
        (LATE, 0.2, 0.3, "holds"),
        (LATE, 0.9, 0.9, "undecided"),  # neither level is known, nor the gap
        (LATE, 0.9, 0.3, "undecided"),  # the low band is earlier, so that the share is smaller than it looks
        (LATE, 0.2, 0.9, "holds"),  # the high band is earlier, the share larger
        (EARLY, 0.9, 0.3, "does not hold"),
        (EARLY, 0.2, 0.9, "undecided"),
        (EARLY, 0.9, 0.9, "undecided"),
    ],
)
def test_a_level_before_the_window_is_a_bound(share, low, high, verdict):
    found, doubt = verdict_of(analysis_of([4, 3, 5], share, ((low, high), (0, 0))), "readout")
    assert found == verdict
    assert ("before the estimator's window" in doubt) == (verdict == "undecided")


def test_tables_say_what_is_a_bound_and_what_is_not_known():
    cells = {
        edges: gap_cell(analysis_of([4, 3, 5], LATE, (edges, (0, 0))), "network", "readout", 8)
        for edges in ((0.1, 0.2), (0.9, 0.2), (0.1, 0.9), (0.9, 0.9))
    }
    known = known_gap(analysis_of([4, 3, 5], LATE, ((0.9, 0.9), (0.9, 0.2))), "network", "readout")
    assert list(np.flatnonzero(np.isnan(known).all(-1))) == [8]  # a bound is drawn
    assert list(cells.values()) == ["4.00 [3.00, 5.00]", "> 4.00 [3.00, 5.00]", "< 4.00 [3.00, 5.00]", "not known"]


def products_of(read, state, outcome):
    """(1, P, 1, 2, 2, 6) of vectors (P, n): one layer, the same at two levels and in two bands."""
    factors = ((read, read), (read, state), (read, outcome), (state, state), (state, outcome), (outcome, outcome))
    products = np.stack([(a * b).mean(-1) for a, b in factors], -1)[None, :, None, None, None]
    return np.tile(products, (1, 1, 1, 2, 2, 1))


@settings(deadline=None, max_examples=30)
@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(0.05, 20), st.integers(0, 99))
def test_a_readout_is_parted_into_outcome_and_noise(signal, noise, variance, seed):
    """Exactly, whatever the sample. Its scale says nothing of what it explains, and the state beside it never hurts."""
    rng = np.random.default_rng(seed)
    outcome, error, other = rng.standard_normal((3, 5, 40)) * np.sqrt([[[1.0]], [[variance]], [[0.3]]])
    read = signal * outcome + noise * error
    _, passed = scaled.scaled_readings(products_of(read, outcome + error, outcome), np.arange(2.0), UNIFORM)
    np.testing.assert_allclose([passed["signal"].flat[0], passed["noise"].flat[0]], [signal, noise], atol=1e-8)
    energy = np.square(noise * error).mean() / np.square(outcome).mean()
    assert passed["passed"].flat[0] == pytest.approx(energy, rel=1e-6, abs=1e-12)
    read = read + other
    r2 = {}
    for factor in (1.0, -7.3):
        found, _ = scaled.scaled_readings(products_of(factor * read, outcome + error, outcome), np.arange(2.0), UNIFORM)
        r2[factor] = {name: values["r2"].flat[0] for name, values in found.items()}
    assert r2[1.0] == pytest.approx(r2[-7.3], abs=1e-9)
    assert r2[1.0]["joined"] >= max(r2[1.0]["state"], r2[1.0]["scaled"]) - 1e-9


UNIFORM = np.full((2, 5), 0.2)


def test_a_network_that_reads_out_nothing_knows_what_the_state_knows():
    """Null readouts are multiples of the state, whatever is predicted: by one scalar they explain what it explains."""
    rng = np.random.default_rng(0)
    outcome, error = rng.standard_normal((2, 5, 40))
    state = outcome + error
    for factor in (1.0, 0.03):  # of a network that predicts the noise; of one that predicts v, where it is noisy
        found, passed = scaled.scaled_readings(products_of(factor * state, state, outcome), np.arange(2.0), UNIFORM)
        values = [found[name]["r2"].flat[0] for name in ("scaled", "joined", "state")]
        np.testing.assert_allclose(values, values[2], rtol=1e-9)
        assert values[2] == pytest.approx(0.5, abs=0.1)
        assert passed["noise"].flat[0] == pytest.approx(factor)


@pytest.mark.slow
def test_the_last_readout_at_the_clean_end_is_the_outcome(finished):
    """Products of what was run: the sampler ends at its last denoised image. Coefficients in random bands have the same
    total."""
    stored, analysis = finished.load("probe_network"), finished.load("analysis")
    last = stored.products.isel(layer=-1, level=-1)
    for product in ("read read", "read outcome"):
        np.testing.assert_allclose(last.sel(product=product), last.sel(product="outcome outcome"), rtol=1e-3)
    counts = radial_bands(8, 8, 6).count
    whole = (stored.products * counts[:, None]).sum("band")
    shuffled = (stored.products_shuffled * counts[:, None]).sum("band")
    np.testing.assert_allclose(whole, shuffled, rtol=1e-3, atol=1e-3 * np.abs(whole).max().item())
    assert np.abs(stored.products / stored.products_shuffled - 1).max() > 0.1
    np.testing.assert_allclose(analysis.network_scaled_r2.isel(layer=-1, level=-1, bound=0), 1, atol=1e-3)


@pytest.mark.slow
def test_a_run_without_products_is_reported_by_the_other_readings(finished, tmp_path):
    shutil.copytree(finished.path, tmp_path / "old")
    old = Measured.of(RunFolder.open(tmp_path / "old"), DepthConfig)
    load = old.load
    old.load = lambda group: load(group).drop_vars(["products", "products_shuffled"], errors="ignore")
    found = analyse(old)
    assert "network_scaled_gap" not in found
    xr.testing.assert_identical(
        found.network_readout_gap, analyse(Measured.of(finished, DepthConfig)).network_readout_gap
    )
    section = STUDY.page(old, found).section
    assert [claim.statement != "" for claim in section.claims] == [True] * 3


GUIDED = ["--guidance", "2", "--guided-coupling", "conditional", "--sampler", "ancestral", "--dtype", "float32"]


@pytest.mark.long
def test_guidance_sampler_and_two_devices_are_those_of_the_frame(weights, tmp_path, monkeypatch):
    """Guided runs on one device, and on two with sharded parameters, in a process of their own: the number of host
    devices is fixed at its start. The last readout is the guided network's own output."""
    command = ["depth", "--weights", weights, *FLAGS, *GUIDED, "--probe-pairs", "0"]
    monkeypatch.setattr(study, "report", lambda of, run, **_: run.path)  # nothing reads their figures
    assert cli.main([*command, "--out", str(tmp_path / "one")]) == 0
    split = [*command, "--parameters", "sharded", "--out", str(tmp_path / "two")]
    script = f"""
from experiments import cli
from experiments.frame import study
study.report = lambda of, run, **_: run.path
assert cli.main({split}) == 0
"""
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    one, two = (RunFolder.open(tmp_path / name).load("network") for name in ("one", "two"))
    for name in one.data_vars:
        scale = np.abs(one[name].values).max()
        np.testing.assert_allclose(two[name].values, one[name].values, atol=1e-5 * scale, err_msg=name)

    clock, bands, model = make_clock("10"), radial_bands(8, 8, 6), load_model(weights)
    found = jax.jit(
        lambda model: trajectories(
            lambda gate: network_denoiser(model, clock, gate, guidance=2.0, guided_coupling="conditional"),
            clock,
            bands,
            jnp.asarray([0.0, 1.0]),
            jnp.arange(4),
            jnp.asarray([0, 1, 2, 0]),
            (8, 8, 3),
            seed=0,
            sampler="ancestral",
        )["energy"][..., 1]
    )(model)
    last = one.readout.isel(layer=-1).transpose("coupling", "pair", "step", "band")
    before = one.readout.isel(layer=-2).transpose("coupling", "pair", "step", "band")
    np.testing.assert_allclose(last, found, rtol=2e-3, atol=1e-5)
    assert np.abs(before / found - 1).max() > 0.01  # the block before it says something else


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"couplings": (0.1, 1.0)}, "start at 0"),
        ({"couplings": (0.0, 1.0, 0.5)}, "increase"),
        ({"probe_pairs": 3}, "probe_pairs"),
        ({"probe_levels": 2}, "probe_levels"),
        ({"pairs": 1}, "pairs"),
        ({"block": 0}, "block"),
    ],
)
def test_settings_out_of_their_domain_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DepthConfig(**changes)


def test_classes_that_the_model_lacks_are_refused(weights, tmp_path):
    with pytest.raises(ValueError, match=r"0\.\.2"):
        run_study(STUDY, DepthConfig(weights=weights, classes=(3,)), tmp_path / "out")


def test_patch_modes_are_orthonormal_and_part_means_from_details():
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 2)).astype(np.float32)
    modes = np.asarray(patch_modes(x, 2))
    assert modes.shape == (3, 4, 4, 8)
    np.testing.assert_allclose((modes**2).sum((1, 2, 3)), (x**2).sum((1, 2, 3)), rtol=1e-5)
    smooth = np.repeat(np.repeat(x[:, :4, :4], 2, 1), 2, 2)  # constant inside patches
    np.testing.assert_allclose(np.asarray(patch_modes(smooth, 2))[..., 2:], 0, atol=1e-5)


@pytest.mark.parametrize("grid", [2, 3, 4, 8, 16])
def test_token_bands_cover_every_grid(grid):
    bands = token_bands(grid)
    assert bands.count.min() > 0
    assert bands.count.sum() == grid**2


def test_a_single_token_has_no_bands():
    with pytest.raises(ValueError, match="one token"):
        token_bands(1)


def test_probe_finds_what_is_linearly_there_and_nothing_else():
    """Outcome = stream times a matrix plus noise of known share, in one band only."""
    rng = np.random.default_rng(0)
    pairs, tokens, width = 64, 16, 6
    stream = rng.standard_normal((pairs, tokens, width))
    outcome = rng.standard_normal((pairs, tokens, 12)) * np.sqrt(0.25)
    bands = probe_bands(outcome, 3, token_bands(4))
    where, features = bands["inside patches"]
    matrix = np.linalg.qr(rng.standard_normal((9, 6)))[0].T * np.sqrt(0.75 * 9 / 6)  # 0.75 of the variance
    outcome[:, where[:, None], features] += stream @ matrix
    error, total = probe_scores(stream, outcome, bands)
    r2 = 1 - error.sum(0) / total.sum(0)
    assert abs(r2[-1] - 0.75) < 0.02
    assert np.all(np.abs(r2[:-1]) < 0.15)
    other, _ = probe_scores(stream, np.roll(outcome, FOLDS, 0), bands)
    assert np.all(other.sum(0) > 0.9 * total.sum(0))


def test_a_pair_is_scored_by_maps_that_never_saw_it():
    """One pair of loud noise would be fitted by a map that saw it; the exact linear relation of the others is found."""
    rng = np.random.default_rng(1)
    stream = rng.standard_normal((16, 4, 3))
    outcome = stream.copy()
    outcome[5] = 100 * rng.standard_normal((4, 3))
    error, total = probe_scores(stream, outcome, {"all": (np.arange(4), np.arange(3))})
    assert error[5, 0] > 0.9 * total[5, 0]
    clean, _ = probe_scores(stream, stream, {"all": (np.arange(4), np.arange(3))})
    assert np.all(clean < 1e-6 * np.square(stream).sum((1, 2))[:, None])


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 30), st.floats(0.1, 5.0))
def test_a_gap_that_grows_evenly_has_a_fifth_in_the_last_fifth(layers, final):
    share, half = localisation(final * np.arange(layers + 1) / layers)
    np.testing.assert_allclose([share, half], [0.2, 0.5], atol=1e-9)


def test_the_last_five_of_28_layers_are_told_where_there_are_28():
    assert made_in_last(np.arange(29.0), 5) == pytest.approx(5 / 28)
    assert made_in_last(np.append(np.zeros(24), [1, 2, 3, 4, 5]), 5) == 1
    assert made_in_last(np.append(np.zeros(28), 2.0), 1) == 1
    assert np.isnan(made_in_last(np.zeros(29), 5))
    for layers, told in ((12, False), (28, True)):
        gap = np.broadcast_to(np.arange(layers + 1.0), (3, 1, layers + 1))
        found = {"gap": gap, "level": np.zeros((3, 1, layers + 1, 2)), "edge": np.zeros((3, 1, layers + 1, 2))}
        data = {}
        _fill(data, "network", "readout", found, "band")
        assert ("network_readout_paper_share" in data) == told
    np.testing.assert_allclose(data["network_readout_paper_share"][1], 5 / 28)


def test_localisation_of_extreme_gaps():
    late = np.array([0.0] * 10 + [3.0])
    share, half = localisation(late)
    assert share == 1
    assert half == pytest.approx(0.95)
    share, half = localisation(np.full(11, 3.0))  # there from the embedding on
    assert (share, half) == (0, 0)
    share, _ = localisation(np.array([0.0, -2, -2, -2, -2, -2, -2, -2, -2, -1, 1]))  # of the other sign before
    assert share > 1


def test_readings_of_shifted_gaussian_curves_give_their_shift():
    """Relative energies X / (1 + X), one band's level moved by the layer: the gap grows by a nat a layer."""
    ell = np.linspace(-9, 9, 400)
    centre = np.array([0.0, 0.0, 1.0])[None] * np.arange(4)[:, None]  # (layer, band)
    q = 1 / (1 + np.exp(-(ell[:, None] - centre[:, None])))  # (layer, K, band)
    energy = np.broadcast_to(q, (5, 1, *q.shape))
    found = readings(energy, ell, np.full((3, 5), 0.2))
    np.testing.assert_allclose(found["gap"][0, 0], np.arange(4), atol=0.03)
    np.testing.assert_allclose(found["gap"][1:], found["gap"][:1].repeat(3, 0), atol=1e-12)
    error = np.broadcast_to(1 - q, (1, 5, *q.shape))
    probe = probe_readings(error, np.ones_like(error), ell, np.full((3, 5), 0.2))
    np.testing.assert_allclose(probe["gap"][0, 0], np.arange(4), atol=0.03)
