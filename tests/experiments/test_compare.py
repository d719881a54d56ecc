"""The main job from end to end on a tiny random network: contents, resume, bad input."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import xarray as xr
from flax import nnx

from dit_jax.checkpoint import load_model, save_model
from dit_jax.config import DiTConfig
from dit_jax.diffusion import network_denoiser
from dit_jax.model import DiT
from dit_jax.replicas import run_pairs
from experiments import cli
from experiments.frame.bench import Bench
from experiments.frame.draws import pair_draws
from experiments.frame.parts import merge
from experiments.frame.store import RunFolder
from experiments.frame.study import run_study
from experiments.frame.subject import untrained_model
from experiments.frame.verdict import LEAST
from experiments.studies.compare.analysis import estimates, joined_draws
from experiments.studies.compare.measure import Instrument
from experiments.studies.compare.page import section
from experiments.studies.compare.settings import CompareConfig
from experiments.studies.compare.study import STUDY
from ou_theory.clock import make_clock
from ou_theory.modes import radial_bands

MODEL = DiTConfig(input_size=8, in_channels=3, hidden_size=16, depth=2, num_heads=2, num_classes=3, prediction="v")
DATA = {"mean": [0.0, 0.1, -0.1], "std": 0.5, "class_names": ["ant", "bee", "cow"]}
FAST = {"couplings": (0.0, 0.3, 1.0), "pairs": 6, "steps": "8", "block": 2, "gain_pairs": 4, "untrained_pairs": 2}
ATTRS = {"model": "tiny", "prediction": "v", "sampler": "ddim", "gate_kind": "joint", "guidance": 1.0, "seed": 0}
GROUPS = ("network", "untrained", "wiener", "pictures", "analysis")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("blank_figures")]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    save_model(untrained_model(MODEL, 5), folder, extra={"data": DATA})
    return str(folder)


@pytest.fixture(scope="module")
def finished(weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert cli.main(arguments(weights, out)) == 0
    return out


def arguments(weights, out, *more):
    flags = ["--couplings", "0", "0.3", "1", "--pairs", "6", "--steps", "8", "--block", "2"]
    flags += ["--gain-pairs", "4", "--untrained-pairs", "2", "--quiet"]
    return ["compare", "--weights", weights, "--out", str(out), *flags, *more]


def test_the_folder_holds_what_was_measured(finished):
    run = RunFolder.open(finished)
    network = run.load("network")
    sizes = {"coupling": 3, "pair": 6, "step": 8, "band": 7, "parity": 2, "row": 8, "column": 8, "mode": 7}
    assert dict(network.sizes) == sizes
    for name in ("energy", "projection", "state_energy"):
        assert np.isfinite(network[name]).all(), name
    of_some = ["one_pass_energy", *(f"mode_{name}" for name in ("energy", "product", "state"))]
    for name in (*of_some, "coefficient_energy", "coefficient_projection"):
        measured = np.isfinite(network[name]).all([dim for dim in network[name].dims if dim != "pair"]).values
        np.testing.assert_array_equal(measured, [True, True, True, True, False, False], err_msg=name)
    assert list(network.label.values) == [0, 1, 2, 0, 1, 2]
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert manifest["command"].startswith("syncgap compare")
    for group in GROUPS:
        assert run.load(group).sizes


def test_bands_of_the_dct_keep_the_names_that_they_have_had(finished):
    """Runs of any age open alike."""
    run = RunFolder.open(finished)
    coords = "count coupling ell label mode_band mode_count pair parity radius step timestep band column row mode"
    network = run.load("network")
    assert set(network.coords) == set(coords.split())
    variables = "energy projection state_energy coefficient_energy coefficient_projection one_pass_energy"
    assert set(network.data_vars) == {*variables.split(), "mode_energy", "mode_product", "mode_state"}
    assert network.coefficient_energy.dims == ("pair", "step", "row", "column")
    assert run.load("wiener").variance.dims == ("band",)
    analysis = run.load("analysis")
    assert "modes" not in analysis.attrs
    assert "band_name" not in analysis.coords
    assert "highest band less that of the lowest above DC" in analysis.gap.attrs["long_name"]
    assert (analysis.attrs["low_band"], analysis.attrs["high_band"]) == (1, 6)


def test_energies_are_those_of_the_samples(finished, weights):
    """At the last step the denoised image is the sample; Parseval ties band energies to its pixels."""
    clock, bands = make_clock("8"), radial_bands(8, 8, 6)
    model = load_model(weights)
    sample, _ = run_pairs(
        lambda gate: network_denoiser(model, clock, gate),
        clock,
        jax.numpy.asarray([0.0, 0.3, 1.0]),
        jax.numpy.arange(6),
        np.arange(6) % 3,
        (8, 8, 3),
        seed=0,
    )
    common, difference = (np.square((sample[0] + sign * sample[1]) / np.sqrt(2)).mean((2, 3, 4)) for sign in (1, -1))
    end = RunFolder.open(finished).load("network").energy.isel(step=-1)
    total = (end * end["count"]).sum("band") / bands.count.sum()
    np.testing.assert_allclose(total.sel(parity="common"), common, rtol=1e-4)
    np.testing.assert_allclose(total.sel(parity="difference"), difference, rtol=1e-4)
    weighted = RunFolder.open(finished).load("analysis").image_energy * end.sum("parity").mean("pair").isel(coupling=0)
    images = (weighted * end["count"]).sum("band") / bands.count.sum()  # of both replicas together
    np.testing.assert_allclose(images, np.square(sample).mean((2, 3, 4, 5)).sum(0), rtol=1e-4)


def test_report_and_figures_are_there_and_self_contained(finished):
    text = (finished / "report.html").read_text()
    assert "synchronization gap" in text.lower()
    assert list((finished / "figures").glob("*.png"))
    claims = json.loads((finished / "claims.json").read_text())["claims"]
    assert [claim["id"] for claim in claims] == [1, 2, 3, 4]
    assert claims[2]["verdict"] == "not tested"
    assert {control["name"] for control in claims[0]["controls"]} >= {"untrained network", "Wiener denoiser"}


def test_order_is_weighed_against_shuffles_and_collapse_at_a_coupling_that_is_known(finished):
    analysis = RunFolder.open(finished).load("analysis")
    orders, found = analysis.shuffled_order.values, analysis.order.sel(claimed="network").item()
    assert orders.size == 999
    assert len(np.unique(orders)) > 5
    assert analysis.order_p.item() == pytest.approx((1 + np.sum(orders >= found)) / 1000)
    weak = analysis.weak.sel(source="network").values[:, [1, -1]].any(1)
    assert analysis.strongest.sel(claimed="network").item() == analysis.coupling.values[~weak][-1]


def test_the_wiener_denoiser_agrees_with_its_recursion(finished):
    analysis = RunFolder.open(finished).load("analysis")
    for name in ("tau", "decided", "gap"):
        found, exact = (analysis[name].sel(source=s).values for s in ("wiener", "wiener theory"))
        np.testing.assert_allclose(found, exact, atol=1e-3)


@pytest.mark.long
def test_the_wiener_denoiser_runs_in_blocks_as_it_does_at_once(finished, weights, tmp_path):
    """And a block of it that is lost is made again, alone."""
    run = RunFolder.open(finished)
    assert run.manifest["blocks"]["wiener"] == [0, 2, 4]
    stored = run.load("wiener")
    network = run.load("network")
    at_once = Bench("compare", CompareConfig(weights=weights, **{**FAST, "block": 6}), tmp_path / "run")
    found = Instrument(at_once).wiener(stored.variance.values, (0.0, 0.3, 1.0), np.arange(6), network.label.values)
    for name, values in stored.data_vars.items():
        np.testing.assert_allclose(values, found[str(name)], rtol=1e-5, atol=1e-7)
    copied = tmp_path / "copied"
    shutil.copytree(finished, copied)
    shutil.rmtree(copied / "data.zarr" / "wiener" / "energy" / "c" / "0" / "1")
    others = [path for i in (0, 2) for path in (copied / "data.zarr" / "wiener").glob(f"projection/c/0/{i}/**/*")]
    times = [path.stat().st_mtime_ns for path in others]
    assert times
    assert cli.main([*arguments(weights, copied), "--resume"]) == 0
    xr.testing.assert_identical(RunFolder.open(copied).load("wiener"), stored)
    assert [path.stat().st_mtime_ns for path in others] == times


@pytest.mark.long
@pytest.mark.parametrize("lost", ["energy/c/0/1", "variance/c"])
def test_a_damaged_wiener_denoiser_is_mended(finished, weights, tmp_path, lost):
    """A block of its measurements, or the variance that it was made for."""
    copied = tmp_path / "copied"
    shutil.copytree(finished, copied)
    (chunk, *_) = (each for each in (copied / "data.zarr" / "wiener" / lost).rglob("*") if each.is_file())
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    assert cli.main([*arguments(weights, copied), "--resume"]) == 0
    xr.testing.assert_identical(RunFolder.open(copied).load("wiener"), RunFolder.open(finished).load("wiener"))


@pytest.mark.long
def test_parts_of_a_comparison_join_to_the_whole(weights, tmp_path):
    """Where one part begins, gains and control end inside of a block and of a part."""
    settings = {**FAST, "weights": weights, "gain_pairs": 3, "untrained_pairs": 5}
    options = {"progress": False, "figures": False}
    run_study(STUDY, CompareConfig(**settings), tmp_path / "whole", **options)
    spans = ((0, 4), (4, 2))
    for first, count in spans:
        part = CompareConfig(**{**settings, "pairs": count, "first_pair": first})
        run_study(STUDY, part, tmp_path / str(first), **options)
    merge(STUDY, [tmp_path / str(first) for first, _ in spans], tmp_path / "joined", **options)
    whole, joined = (RunFolder.open(tmp_path / name).manifest["digests"] for name in ("whole", "joined"))
    assert joined == whole


@pytest.mark.long
def test_runs_whose_wiener_denoiser_was_written_whole_are_kept(finished, weights, tmp_path):
    older = tmp_path / "older"
    shutil.copytree(finished, older)
    run = RunFolder.open(older, writable=True)
    wiener = run.load("wiener").reset_coords("variance").drop_encoding()
    shutil.rmtree(older / "data.zarr" / "wiener")
    run._update(blocks={name: done for name, done in run.manifest["blocks"].items() if name != "wiener"})
    run.put("wiener", wiener)
    before = run.load("analysis")
    assert cli.main(["report", str(older)]) == 0
    xr.testing.assert_identical(run.load("analysis"), before)
    assert cli.main([*arguments(weights, older), "--resume"]) == 0
    resumed = RunFolder.open(older)
    assert "wiener" not in resumed.manifest["blocks"]
    xr.testing.assert_identical(resumed.load("wiener"), wiener)
    assert cli.main([*arguments(weights, older), "--pairs", "8", "--resume"]) == 0  # of a denoiser of all pairs
    assert RunFolder.open(older).manifest["blocks"]["wiener"] == [0, 2, 4, 6]


def groups_of(finished) -> dict:
    run = RunFolder.open(finished)
    return {name: run.load(name) for name in ("network", "untrained", "wiener")}


def estimated(groups, data=None):
    with jax.enable_x64(True):
        return estimates(make_clock("8"), radial_bands(8, 8, 6), **groups, data=data, eta=0.0, seed=0)


def test_verdicts_rest_on_wider_intervals_than_tables_show(finished):
    """Three claims of 98.3 % each are right together with 95 %."""
    analysis = RunFolder.open(finished).load("analysis")
    shown = analysis.gap_interval.sel(source="network").isel(coupling=0).values
    claimed = analysis.uncoupled_interval.sel(claimed="network").values
    assert claimed[0] < shown[0] < shown[1] < claimed[1]
    stored = json.loads((finished / "claims.json").read_text())["claims"]
    np.testing.assert_allclose(stored[0]["interval"], claimed)
    assert [claim["level"] for claim in stored if claim["verdict"] != "not tested"] == [1 - 0.05 / 3] * 3


def test_the_recursion_has_the_uncoupled_energies_of_any_network(finished):
    """An identity between averages over the pairs that the gain is measured on."""
    network = RunFolder.open(finished).load("network").isel(pair=slice(4))
    recursion = RunFolder.open(finished).load("analysis").relative_energy.sel(source="regression gain", coupling=0)
    energy = network.energy.sel(parity="difference", coupling=0).astype(float).mean("pair").values
    np.testing.assert_allclose(recursion, energy / energy[-1], rtol=2e-3)


def test_a_known_covariance_is_the_theory(finished):
    """That of independent coefficients of the network's own variances is the theory of the Wiener control."""
    groups = groups_of(finished)
    variance = groups["wiener"].variance.values
    data = xr.Dataset({"variance": ("component", variance), "share": (("component", "band"), np.eye(7))})
    found = estimated(groups, data)
    assert list(found.theory.values) == ["regression gain", "energy gain", "data covariance"]
    for name in ("tau", "gap"):
        exact, known = (found[name].sel(source=source).values for source in ("data covariance", "wiener theory"))
        np.testing.assert_allclose(exact, known, rtol=1e-9)
        apart = (found[name].sel(source="network") - exact).values
        np.testing.assert_allclose(found[f"{name}_excess"].sel(theory="data covariance"), apart, rtol=1e-9)


def test_runs_of_older_versions_have_theories_that_say_what_they_are(finished):
    groups = groups_of(finished)
    names = [name for name in groups["network"].variables if str(name).startswith("mode")]
    found = estimated({**groups, "network": groups["network"].drop_vars(names)})
    assert list(found.theory.values) == ["energy gain", "sample variance"]
    text = " ".join(section({}, found.assign_attrs(ATTRS)).methods)
    assert "older version" in text
    assert "from the network's own uncoupled samples" in text
    assert np.isfinite(found.tau_excess.isel(coupling=0)).all()


def test_draws_of_all_pairs_hold_those_of_the_first():
    weights = joined_draws(0, 4, 10)
    np.testing.assert_allclose(weights[:, :4], pair_draws(0, 4) * 0.4)
    np.testing.assert_allclose(weights.sum(1), 1)
    assert weights[:, 4:].std() > 0
    np.testing.assert_allclose(joined_draws(0, 4, 4), pair_draws(0, 4))


@pytest.mark.long
def test_an_interrupted_run_resumes_to_the_same_bits(finished, weights, tmp_path, monkeypatch):
    out = tmp_path / "run"
    written = RunFolder.write

    def stop_at_third(self, group, dataset, first):
        if first == 4:
            raise KeyboardInterrupt
        written(self, group, dataset, first)

    monkeypatch.setattr(RunFolder, "write", stop_at_third)
    assert cli.main(arguments(weights, out)) == 130
    monkeypatch.setattr(RunFolder, "write", written)
    assert cli.main(arguments(weights, out)) == 2
    assert cli.main(arguments(weights, out, "--resume")) == 0
    whole, resumed = RunFolder.open(finished), RunFolder.open(out)
    for group in GROUPS:
        xr.testing.assert_identical(whole.load(group), resumed.load(group))


def test_other_settings_do_not_resume(finished, weights, capsys):
    assert cli.main([*arguments(weights, finished), "--seed", "1", "--resume"]) == 2
    assert "seed" in capsys.readouterr().err


def test_a_finished_folder_is_not_overwritten(finished, weights, capsys):
    before = (finished / "manifest.json").read_bytes()
    assert cli.main(arguments(weights, finished)) == 2
    assert "--resume" in capsys.readouterr().err
    assert (finished / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"couplings": (0.0, -0.1)}, "couplings"),
        ({"couplings": (0.0, float("nan"))}, "couplings"),
        ({"couplings": (0.5, 1.0)}, "couplings"),
        ({"pairs": 0}, "pairs"),
        ({"pairs": 1}, "pairs"),
        ({"gate_kind": "both"}, "gate_kind"),
        ({"modes": "fourier"}, "modes 'fourier' is not one of dct, pca, colour, class"),
        ({"gate_kind": "convex", "couplings": (0.0, 1.5)}, "convex gate .* at most 1; got 1.5"),
        ({"steps": "fifty"}, "steps"),
        ({"steps": "5000"}, "steps"),
        ({"classes": (7,)}, "classes"),
        ({"weights": "no-such-model"}, "no-such-model"),
        ({"guidance": float("inf")}, "guidance"),
    ],
)
def test_bad_settings_are_named(weights, tmp_path, changed, named):
    with pytest.raises(ValueError, match=named):
        run_study(STUDY, CompareConfig(**{"weights": weights, **FAST, **changed}), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_untrained_network_acts_in_every_layer():
    model = untrained_model(MODEL, 0)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    t, y = np.array([10, 900]), np.array([0, 1])
    out, taps = model(x, t, y, tap=lambda layer, a: {k: a[k] for k in ("resid_pre", "resid_post")})
    assert np.abs(out).max() > 0.1
    moved = np.abs(taps["resid_post"] - taps["resid_pre"]).max((1, 2, 3, 4))
    assert np.all(moved > 1e-3)
    assert np.abs(DiT(MODEL, nnx.Rngs(0))(x, t, y)).max() == 0


def test_a_sweep_is_one_compilation(weights, tmp_path):
    """Other pairs, other couplings and other weights of the same shapes do not compile anything again."""
    config = CompareConfig(weights=weights, block=2, steps="4")
    instrument = Instrument(Bench("compare", config, tmp_path / "run"))
    for first, grid in ((0, [0.0, 0.2]), (2, [0.0, 0.9])):
        for model in (load_model(weights), untrained_model(MODEL, first)):
            labels = np.array([0, 1], np.int32)
            instrument.network(model, grid, first + np.arange(2), labels, with_more=True)
    assert instrument._network_run.func._cache_size() == 1
    assert instrument._network_gain.func._cache_size() == 1


@pytest.mark.long
def test_what_the_environment_says_of_numerics_changes_nothing(finished, weights, tmp_path):
    """Double precision, strict promotion and stops at NaN once ended runs in tracebacks, after all the sampling."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        assert cli.main(arguments(weights, tmp_path / "run")) == 0
    found, known = (RunFolder.open(path) for path in (tmp_path / "run", finished))
    for group in ("network", "untrained", "wiener", "analysis"):
        xr.testing.assert_identical(found.load(group), known.load(group))


@pytest.mark.long
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_network_without_a_gap_has_nothing_that_could_collapse(tmp_path):
    """At its initial values a DiT puts out zero: nothing but rounding tells its bands apart."""
    save_model(DiT(dataclasses.replace(MODEL, prediction="v"), nnx.Rngs(0)), tmp_path / "zero", extra={"data": DATA})
    assert cli.main(arguments(str(tmp_path / "zero"), tmp_path / "run")) == 0
    exists, collapses, _, ordered = json.loads((tmp_path / "run" / "claims.json").read_text())["claims"]
    assert abs(exists["value"]) < LEAST
    assert exists["verdict"] == "does not hold"
    assert "no gap can be told from 0" in exists["statement"]
    assert not any("%" in control["statement"] for control in exists["controls"])
    assert (collapses["verdict"], collapses["value"], collapses["interval"]) == ("undecided", None, None)
    assert all(control["value"] is None for control in collapses["controls"] if control["name"].startswith("by "))
    assert (ordered["verdict"], ordered["value"]) == ("undecided", None)


def test_guidance_needs_a_null_label_that_was_trained(tmp_path, capsys):
    save_model(untrained_model(MODEL, 5), tmp_path / "m", extra={"data": DATA, "training": {"label_dropout": 0}})
    without = untrained_model(dataclasses.replace(MODEL, null_label=False), 5)
    save_model(without, tmp_path / "none", extra={"data": DATA})
    for name, message in (("m", "the null label, on which this network was not trained"), ("none", "does not have")):
        assert cli.main(arguments(str(tmp_path / name), tmp_path / "out", "--guidance", "2")) == 2
        assert cli.main(["sample", str(tmp_path / name), str(tmp_path / "pictures"), "--guidance", "2"]) == 2
        assert " ".join(capsys.readouterr().err.split()).count(message) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"m", "none"}


@pytest.fixture(scope="module")
def split(weights, tmp_path_factory):
    """Runs on two devices with either layout of the parameters, in a process of their own, for the number of host
    devices is fixed at its start. Nothing reads their figures, so that none are drawn."""
    out = tmp_path_factory.mktemp("split")
    layouts = ("replicated", "sharded")
    commands = [arguments(weights, out / name, "--block", "4", "--parameters", name) for name in layouts]
    script = f"""
import jax
from experiments import cli
from experiments.frame import study
assert jax.device_count() == 2
study.report = lambda of, run, **_: run.path
assert [cli.main(command) for command in {commands}] == [0, 0]
"""
    subprocess.run([sys.executable, "-c", script], env={**os.environ, "JAX_NUM_CPU_DEVICES": "2"}, check=True)
    return out


@pytest.mark.long
@pytest.mark.parametrize("parameters", ["replicated", "sharded"])
def test_two_devices_measure_what_one_does(finished, split, parameters):
    """Six pairs in blocks of four: the last block is not split evenly, and is not split at all."""
    for group in ("network", "untrained"):
        one, two = RunFolder.open(finished).load(group), RunFolder.open(split / parameters).load(group)
        for name in one.data_vars:
            scale = np.abs(np.nan_to_num(one[name].values)).max()
            np.testing.assert_allclose(two[name].values, one[name].values, atol=1e-5 * scale, err_msg=name)


def test_blocks_that_devices_cannot_share_are_refused(weights, tmp_path):
    command = arguments(weights, tmp_path / "run", "--block", "3")
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "experiments", *command], env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert not (tmp_path / "run").exists()
    assert "blocks of 3 pairs cannot be split over 2 devices: give --block 2" in done.stderr


@pytest.mark.long
def test_a_run_moves_from_one_device_to_eight(weights, finished, tmp_path):
    """What it had measured stays as it is; the rest, of all controls too, is measured on all devices."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "data.zarr" / "network" / "energy" / "c" / "0" / "2")  # the last block of two pairs
    command = arguments(weights, out, "--block", "8", "--resume")
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8"}
    subprocess.run([sys.executable, "-m", "experiments", *command], env=environment, check=True)
    before, after = RunFolder.open(finished), RunFolder.open(out)
    assert after.manifest["status"] == "complete"
    assert any("device" in line or "block" in line for line in after.manifest["resumed"][0]["changed"])
    for group in ("network", "untrained", "wiener"):
        one, eight = before.load(group), after.load(group)
        xr.testing.assert_identical(one.isel(pair=slice(0, 2)), eight.isel(pair=slice(0, 2)))
        for name in one.data_vars:
            scale = np.abs(np.nan_to_num(one[name].values)).max()
            np.testing.assert_allclose(eight[name].values, one[name].values, atol=1e-5 * scale, err_msg=name)
