"""Whose gap is it: the theory of a network's own data, what is said of several networks, and the study end to end."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import xarray as xr
from flax import nnx

from dit_jax.checkpoint import save_model, shipped_model
from dit_jax.config import ControlConfig, DiTConfig
from dit_jax.controls import make_network
from dit_jax.covariance import DataCovariance, load_covariance, save_covariance
from experiments import cli
from experiments.frame.eigenmodes import eigenmodes
from experiments.frame.estimator import commitment_of
from experiments.frame.exact import exact_statistics
from experiments.frame.gains import measured_statistics, regression_gains
from experiments.frame.gaussian import ddim_factors, wiener_gains
from experiments.frame.instrument import coupled_wiener, trajectories
from experiments.frame.store import RunFolder
from experiments.frame.subject import untrained_model
from experiments.frame.trainings import over_networks, trained_again
from experiments.studies.spectrum.family import line, more_than_data, order_beyond_data, trainings
from experiments.studies.spectrum.settings import SHIPPED, SpectrumConfig
from ou_theory.clock import make_clock
from ou_theory.modes import radial_bands

pytestmark = pytest.mark.usefixtures("blank_figures")

CLOCK, BANDS = make_clock("50"), radial_bands(8, 8, 6)
CONFIG = DiTConfig(input_size=8, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_classes=2, prediction="v")
VARIANCE = np.array([20, 4, 1.6, 0.5, 0.2, 0.1, 0.05])


def diagonal(variances: np.ndarray) -> DataCovariance:
    """Data whose coefficients (H, W) are independent, three alike colours."""
    share = np.repeat((BANDS.index.reshape(-1, 1) == np.arange(7)).astype(float), 3, 0)
    coefficient = variances[..., None, None] * np.eye(3)
    about = {"data": {"transformation": {"name": "reversed"}}, "images": 10}
    return DataCovariance(np.repeat(variances.reshape(-1), 3), share, coefficient, about)


# --- the theory of the data


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_theory_is_what_the_instrument_finds_of_an_exact_denoiser(sampler):
    """Of unequal variances within a band, and coupled, too: 300 pairs of trajectories of the Wiener filter."""
    rng, couplings = np.random.default_rng(0), np.array([0, 0.3])
    variances = VARIANCE[BANDS.index] * rng.uniform(0.2, 3, (8, 8))
    found = jax.jit(
        lambda pairs: trajectories(
            coupled_wiener(jax.numpy.asarray(variances, jax.numpy.float32), CLOCK),
            CLOCK,
            BANDS,
            jax.numpy.asarray(couplings),
            pairs,
            jax.numpy.zeros(300, int),
            (8, 8, 3),
            seed=0,
            sampler=sampler,
        )
    )(jax.numpy.arange(300))
    data, stochastic = diagonal(variances), sampler == "ancestral"
    rho = (1 - couplings) / (1 + couplings)
    energy, inner = exact_statistics(rho, data.variance, data.share, CLOCK, float(stochastic))
    with jax.enable_x64(True):
        theory = commitment_of(energy, CLOCK.log_snr, inner=inner, stochastic=stochastic)
        measured = commitment_of(
            np.asarray(found["energy"], np.float64)[..., 1].mean(1),
            CLOCK.log_snr,
            inner=np.asarray(found["projection"], np.float64).mean(1),
            stochastic=stochastic,
        )
    assert np.all(np.abs(measured.tau - theory.tau) < np.where(np.arange(7) == 0, 0.3, 0.15))  # DC is one coefficient
    np.testing.assert_allclose(measured.decided, theory.decided, rtol=0.15)
    np.testing.assert_allclose(measured.gap, theory.gap, atol=0.1)
    assert np.abs(theory.tau[1] - theory.tau[0]).min() > 0.2  # coupling moves the levels of unequal variances


def test_one_variance_per_band_commits_where_its_signal_is_noise():
    energy, inner = exact_statistics(np.ones(1), VARIANCE, np.eye(7), CLOCK)
    with jax.enable_x64(True):
        tau = commitment_of(energy, CLOCK.log_snr, inner=inner).tau[0]
    np.testing.assert_allclose(tau[1:5], -np.log(VARIANCE[1:5]), atol=0.3)  # the end is at 7.5
    np.testing.assert_allclose(inner**2, energy * energy[:, -1:], rtol=1e-9)  # it only changes its size


def test_six_groups_of_a_band_suffice_and_whole_bands_do_not():
    """The recursion under regression gains (theory, eq. 7.11), of the exact denoiser of photos16-v's coefficients, with
    known levels: how far the spread of variance in a group moves them."""
    data, bands = load_covariance(shipped_model("photos16-v")), radial_bands(16, 16, 6)
    assert data is not None
    variance = np.linalg.eigvalsh(data.coefficient).reshape(-1)
    share = (np.repeat(bands.index.reshape(-1), 3)[:, None] == np.arange(7)).astype(float)
    rho = np.array([1, 1 / 3])
    factors = np.concatenate([np.ones((1, variance.size)), ddim_factors(variance, CLOCK)[:-1]])
    state = (np.cumprod(factors, 0) * np.sqrt(variance + CLOCK.sigma[0] ** 2)) ** 2
    gain = rho[:, None, None] * wiener_gains(variance, CLOCK)
    error = {}
    with jax.enable_x64(True):
        energy, inner = exact_statistics(rho, variance, share, CLOCK)
        exact = commitment_of(energy, CLOCK.log_snr, inner=inner)
        for name, known in (("groups", data), ("bands", None)):
            modes = eigenmodes(bands, 3, known)
            means = (v @ modes.averaging.astype(float) for v in (gain**2 * state, gain * state, state))
            energy, inner = measured_statistics(regression_gains(*means), modes.share(), CLOCK, 0.0)
            error[name] = commitment_of(energy, CLOCK.log_snr, inner=inner).tau - exact.tau
    assert np.abs(error["groups"]).max() < 0.1
    assert 0.2 < error["bands"].min() < error["bands"].max() < 1.5
    assert 0.3 < error["bands"][0].min() < error["bands"][0].max() < 1.15


def test_shipped_data_have_the_gaps_that_their_names_say():
    gaps = {}
    for name in SHIPPED:
        data = load_covariance(shipped_model(name))
        assert data is not None
        energy, inner = exact_statistics(np.ones(1), data.variance, data.share, CLOCK)
        gaps[name] = float(commitment_of(energy, CLOCK.log_snr, inner=inner).gap[0])
    assert gaps["photos8-natural"] > 3
    assert abs(gaps["photos8-whitened"]) < 0.1
    assert gaps["photos8-reversed"] < -3


# --- several networks


def network(theory, gap, order=1.0, half=0.1, transformation="natural"):
    """The analysis of a made-up network."""
    rng = np.random.default_rng(0)
    return xr.Dataset(
        {
            "gap": (("coupling", "bound"), [[gap, gap - half, gap + half]]),
            "gap_claimed": (("bound",), [gap, gap - 1.2 * half, gap + 1.2 * half]),
            "order": (("coupling", "bound"), [[order] * 3]),
            "order_claimed": (("bound",), [order] * 3),
            "gap_draws": ("draw", gap + half / 2 * rng.standard_normal(200)),
            "theory_gap": theory,
        },
        attrs={"transformation": transformation},
    )


def test_the_line_is_that_of_least_squares():
    theory = np.array([4.0, 0.0, -4.0, 2.0])
    exact = line(theory, 0.8 * theory + 0.3, (0.8 * theory + 0.3)[None].repeat(50, 0))
    np.testing.assert_allclose(exact.slope, 0.8)
    np.testing.assert_allclose(exact.intercept, 0.3)
    np.testing.assert_allclose(exact.slope_over_networks, 0.8, atol=1e-6)
    noisy = line(theory, 0.8 * theory + [0.5, -0.5, 0.5, -0.5], np.zeros((50, 4)))
    assert np.ptp(noisy.intercept_over_networks) > 1
    assert line(np.ones(3), np.ones(3), np.ones((50, 3))) is None
    assert np.isnan(line(theory[:2], theory[:2], theory[None, :2].repeat(50, 0)).slope_over_networks).all()


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [([0.1], "does not hold"), ([2.0], "holds"), ([0.5], "undecided"), ([0.1, 0.2, 3.0], "undecided")],
)
def test_the_gap_beyond_the_data_can_go_every_way(gaps, verdict):
    found = {f"flat {i}": network(0.02, gap) for i, gap in enumerate(gaps)}
    claim = more_than_data({**found, "natural": network(4.0, 3.5)})
    assert claim.verdict == verdict
    assert claim.value == pytest.approx(np.mean(gaps))
    assert claim.interval[0] < claim.value < claim.interval[1]


@pytest.mark.parametrize(("order", "verdict"), [(-1.0, "does not hold"), (1.0, "holds")])
def test_the_order_beyond_the_data_can_go_both_ways(order, verdict):
    found = {"natural": network(4.0, 3.5), "turned": network(-4.0, -3.0, order)}
    assert order_beyond_data(found).verdict == verdict


def test_claims_without_their_networks_are_not_tested():
    found = {"natural": network(4.0, 3.5)}
    assert {more_than_data(found).verdict, order_beyond_data(found).verdict} == {"not tested"}


def test_the_interval_over_networks_is_students():
    assert np.isnan(over_networks(np.array([1.0, 2.0]))).all()
    np.testing.assert_allclose(over_networks(np.array([1.0, 2.0, 3.0])), [2 - 2.4841, 2 + 2.4841], atol=1e-3)


# --- the study


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A transformer and an MLP on data of opposite spectra, both untrained."""
    root = tmp_path_factory.mktemp("weights")
    save_model(untrained_model(CONFIG, 0), root / "natural" / "model")
    control = ControlConfig(architecture="mlp", hidden_size=16, depth=1, num_classes=2)
    save_model(make_network(control, nnx.Rngs(0)), root / "turned" / "model")
    for name, variances in (("natural", VARIANCE), ("turned", VARIANCE[::-1])):
        save_covariance(root / name / "model", diagonal(variances[BANDS.index]))
    return [str(root / name / "model") for name in ("natural", "turned")]


FLAGS = ["--pairs", "4", "--block", "2", "--steps", "12", "--couplings", "0", "1", "--quiet"]


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "spectrum"
    assert cli.main(["spectrum", "--weights", *folders, "--out", str(out), *FLAGS]) == 0
    return out


@pytest.mark.long
def test_every_network_is_a_run_and_all_are_one_page(finished):
    runs = {name: RunFolder.open(finished / name) for name in ("natural", "turned")}
    assert runs["natural"].load("network").sizes["coupling"] == 2
    assert runs["turned"].load("network").sizes["coupling"] == 1  # nothing to couple
    gaps = {name: run.load("analysis").theory_gap.item() for name, run in runs.items()}
    assert gaps["natural"] > 3
    assert gaps["turned"] < -3
    page = (finished / "report.html").read_text()
    assert "Whose gap is it? 2 networks" in page
    assert "photographs whose spectrum is turned round, low for high" in page
    assert len(list((finished / "figures").glob("*.svg"))) == 2
    stored = json.loads((finished / "spectrum-together.json").read_text())
    assert [claim["id"] for claim in stored["claims"]] == [1, 4]


def test_trainings_are_compared_within_one_form_and_one_kind_of_data():
    """Networks of another depth or other data stand apart; the number format does not part them."""
    gaps = {"a": 3.0, "b": 3.5, "c": 4.0, "deep": 9.0, "turned": -4.0}
    forms = {name: {"depth": 12, "dtype": "float32"} for name in gaps}
    forms["b"], forms["deep"] = {"depth": 12, "dtype": "bfloat16"}, {"depth": 28, "dtype": "float32"}
    runs = [SimpleNamespace(subject_name=n, model=SimpleNamespace(to_dict=lambda f=f: f)) for n, f in forms.items()]
    found = {
        name: xr.Dataset(
            {"gap": (("coupling", "bound"), [[gap, gap - 0.392, gap + 0.392]])},
            coords={"coupling": [0.0]},
            attrs={"transformation": "reversed" if name == "turned" else "natural", "architecture": "dit"},
        )
        for name, gap in gaps.items()
    }
    (table,) = trained_again(trainings(runs, found))
    (row,) = table.rows
    assert row[0].endswith("a, b, c")
    reach = 0.5 / np.sqrt(3) * 4.3027  # Student's t of two degrees of freedom
    assert row[1:] == ["0", "3.50", f"[{3.5 - reach:.2f}, {3.5 + reach:.2f}]", "0.50", "0.20"]
    assert trained_again(trainings(runs[3:], found)) == []


@pytest.mark.long
def test_networks_are_added_and_finished_ones_left(finished, folders, capsys):
    before = (finished / "natural" / "manifest.json").read_text()
    assert cli.main(["spectrum", "--weights", *folders, "--out", str(finished), "--resume", *FLAGS]) == 0
    assert json.loads(before)["started"] == json.loads((finished / "natural" / "manifest.json").read_text())["started"]
    assert cli.main(["spectrum", "--weights", folders[0], "--out", str(finished), *FLAGS]) == 2
    assert "--resume" in capsys.readouterr().err


def test_a_network_of_unknown_data_is_refused(folders, tmp_path, capsys):
    save_model(untrained_model(CONFIG, 0), tmp_path / "bare")
    assert cli.main(["spectrum", "--weights", str(tmp_path / "bare"), "--out", str(tmp_path / "o"), *FLAGS]) == 2
    assert "syncgap covariance" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": ()}, "at least one network"),
        ({"weights": ("a", "a")}, "each once"),
        ({"guidance": 2.0}, "guidance"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SpectrumConfig(**change)
