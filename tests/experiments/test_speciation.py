"""Clones of two classes: a process of known law against its exact phi, limits, controls, and the study end to end."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from PIL import Image
from scipy.integrate import quad
from scipy.stats import norm
from sharing import assert_shared

from dit_jax.checkpoint import save_model
from dit_jax.classifier import Classifier, initial_layers, load_classifier, save_classifier
from dit_jax.config import DiTConfig
from dit_jax.covariance import data_covariance, save_covariance
from dit_jax.diffusion import DenoiserOutput, network_denoiser
from dit_jax.images import image_set
from experiments.cli import main
from experiments.frame.study import run_study
from experiments.frame.subject import untrained_model
from experiments.studies.speciation.analysis import censored, crossing, estimates, schedule_step
from experiments.studies.speciation.measure import branch_steps, measurements
from experiments.studies.speciation.page import PUBLISHED, PUBLISHED_LEVELS, at_speciation_time
from experiments.studies.speciation.settings import SpeciationConfig
from experiments.studies.speciation.study import STUDY
from experiments.studies.speciation.theory import LAWS, laws, leading, speciation_level, theory_group
from ou_theory.clock import make_clock
from ou_theory.cluster_laws import clusters
from ou_theory.keys import random_key

pytestmark = pytest.mark.usefixtures("blank_figures")

TINY = DiTConfig(input_size=8, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_classes=2, prediction="v")
NAMES = ("car", "horse")
CLOCK = make_clock("200")
PAIRS = 400


class Side:
    """Stands for a classifier: the class of an image is the side of 0 of its first number."""

    def log_odds(self, images):
        first = images[..., 0, 0, 0]
        return jnp.stack([first, -first], -1)

    def classes(self, images):
        return self.log_odds(images).argmax(-1)


def clones_of(centre, variance, branches):
    """Classes of ends and clones, as a group of a run, of the exact denoiser of one mode with two clusters."""
    law = clusters([variance], [[centre]])

    def denoise(x, step, labels):
        noise = jnp.asarray(CLOCK.sigma, jnp.float32)[step] ** 2
        y = x * jnp.asarray(CLOCK.alpha_bar**-0.5, jnp.float32)[step]
        return DenoiserOutput(law.posterior_mean(y, noise))

    found = jax.jit(lambda pairs: measurements(denoise, Side(), CLOCK, branches, pairs, 0 * pairs, (1, 1, 1), seed=0))(
        jnp.arange(PAIRS)
    )
    dims = {"end": ("pair", "replica"), "sure": ("pair", "replica"), "clone": ("pair", "branch", "replica")}
    coords = {"branch": branches, "branch_ell": ("branch", CLOCK.log_snr[branches])}
    return xr.Dataset({name: (dims[name], np.asarray(v)) for name, v in found.items()}, coords)


@pytest.fixture(scope="module")
def far():
    """Two clusters far apart, cloned at a few levels around their speciation."""
    ell = CLOCK.log_snr
    branches = np.array([np.abs(ell - wanted).argmin() for wanted in (-9, -4.4, -3.2, -2, 3)])
    return clones_of(4.0, 1.0, branches)


def theory(centre, variance):
    attrs = {"leading_centre": centre, "leading_within": variance}
    return xr.Dataset({"variance": ("component", [variance]), "centre": ("component", [centre])}, attrs=attrs)


def test_clones_of_a_known_law_follow_its_exact_phi(far):
    found = estimates(far, 0)
    exact = laws(theory(4.0, 1.0), np.exp(-far.branch_ell.values))[1]
    error = np.sqrt(exact * (1 - exact) / (2 * PAIRS)) + 0.01  # one in a hundred for 200 steps
    assert np.all(np.abs(found["phi"][1][:, 0] - exact) < 3.5 * error)


def test_phi_is_one_half_at_first_and_one_at_last_and_others_stay_at_one_half(far):
    found = estimates(far, 0)
    phi, others = found["phi"][1], found["others"][1]
    assert phi[0, 1] < 0.5 < phi[0, 2]
    assert phi[-1, 0] == 1
    assert np.all((others[:, 1] - 0.05 < 0.5) & (others[:, 2] + 0.05 > 0.5))
    assert np.all(np.diff(phi[:, 0]) > -0.05)
    low, high = found["level"][1][1:]
    assert low < -np.log(15) < high + 0.3  # kappa = 1, up to the overlap of the clusters


SIGMA2 = np.concatenate([[1e-9], np.geomspace(1e-2, 1e2, 7), [1e9]])  # one shape, so that one program serves all


def test_laws_of_side_and_class_agree_where_clusters_are_far_and_have_their_limits():
    classes, side = laws(theory(30.0, 1e-2), SIGMA2)
    np.testing.assert_allclose(classes, side, atol=1e-6)
    assert classes[0] == pytest.approx(1)
    overlapping_classes, overlapping_side = laws(theory(0.3, 1.0), SIGMA2)
    assert overlapping_classes[-1] == pytest.approx(0.5, abs=1e-6)
    assert overlapping_side[-1] == pytest.approx(0.5, abs=1e-4)
    assert overlapping_side[0] == pytest.approx(1, abs=2e-3)
    assert overlapping_classes[0] < 0.6  # a clean image does not tell clusters that overlap
    for each in (classes, side, overlapping_classes, overlapping_side):
        assert np.all(np.diff(each) < 1e-12)


def test_side_of_one_gaussian_is_the_arcsine_law():
    found = laws(theory(0.0, 2.0), SIGMA2)[1]
    np.testing.assert_allclose(found[1:], 0.5 + np.arcsin(2.0 / (2.0 + SIGMA2[1:])) / np.pi, atol=1e-6)


def test_side_of_two_clusters_is_the_integral_over_states():
    m, s2, noise = 1.3, 0.6, SIGMA2[4]

    def right(y):
        own = 1 / (1 + np.exp(-2 * m * y / (s2 + noise)))
        spread = np.sqrt(s2 * noise / (s2 + noise))
        each = [norm.cdf((c * m + s2 / (s2 + noise) * (y - c * m)) / spread) for c in (1, -1)]
        return own * each[0] + (1 - own) * each[1]

    def integrand(y):
        density = sum(norm.pdf(y, c * m, np.sqrt(s2 + noise)) for c in (1, -1)) / 2
        return density * (right(y) ** 2 + (1 - right(y)) ** 2)

    assert laws(theory(m, s2), SIGMA2)[1, 4] == pytest.approx(quad(integrand, -12, 12)[0], abs=1e-7)


def test_leading_eigenvalue_is_that_of_the_whole_matrix():
    rng = np.random.default_rng(0)
    variance, centre = np.sort(rng.exponential(size=20))[::-1], rng.normal(size=20) / 3
    value, vector = leading(variance, centre)
    values, vectors = np.linalg.eigh(np.diag(variance) + np.outer(centre, centre))
    assert value == pytest.approx(values[-1], rel=1e-10)
    assert abs(vector @ vectors[:, -1]) == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("centre", [[0.0, 0.0, 0.0], [0.0, 0.3, 0.4]])
def test_leading_eigenvalue_of_classes_that_do_not_differ_along_it_is_the_largest_variance(centre):
    value, vector = leading(np.array([3.0, 1.0, 0.5]), np.array(centre))
    assert value == 3
    np.testing.assert_array_equal(vector, [1, 0, 0])


def test_theory_of_images_is_that_of_their_pixels():
    rng = np.random.default_rng(1)
    labels = np.arange(60, dtype=np.int32) % 2
    pixels = rng.integers(0, 200, (60, 8, 8, 3)) * np.array([1, 0.6, 0.8]) + 50 * labels[:, None, None, None]
    images = image_set(pixels.astype(np.uint8), labels, NAMES, "here")
    found = theory_group(data_covariance(images))
    x = ((images.pixels / 127.5 - 1 - images.mean) / images.std).reshape(60, 8, 8, 3)
    x = np.concatenate([x, x[:, :, ::-1]])  # training mirrors the images
    whole = np.cov(x.reshape(120, -1).T, bias=True)
    assert found.leading == pytest.approx(np.linalg.eigvalsh(whole)[-1], rel=1e-2)
    assert found.leading == pytest.approx(found.leading_centre**2 + found.leading_within, rel=1e-9)
    each = [np.linalg.eigvalsh(np.cov(x[..., c].reshape(120, -1).T, bias=True))[-1] for c in range(3)]
    assert found.one_channel == pytest.approx(max(each), rel=2e-2)


def test_crossing_is_the_last_one_and_infinite_where_a_curve_lacks_one_side():
    levels = np.array([-4.0, -3.0, -2.0, 0.0])
    assert crossing(np.array([0.5, 0.8, 0.7, 0.85]), levels) == pytest.approx(-1.0)
    assert crossing(np.array([0.8, 0.8, 0.9, 1.0]), levels) == -np.inf
    assert crossing(np.array([0.5, 0.9, 0.9, 0.7]), levels) == np.inf
    assert np.isnan(crossing(np.array([0.5, np.nan, 0.9, 0.9]), levels))


def test_draws_that_end_below_count_as_late_in_the_interval_of_a_level():
    """Where they were left out, the upper end would be that of the others."""
    draws = np.concatenate([np.linspace(-3, -1, 880), np.full(120, np.inf)])
    point, low, high = censored(np.concatenate([[-2.0], draws]))
    assert point == -2
    assert low in draws[:30]
    assert high == np.inf
    np.testing.assert_array_equal(censored(-np.concatenate([[-2.0], draws])), [2, -np.inf, -low])
    few = censored(np.concatenate([[-2.0], draws[:880], draws[990:]]))
    assert few[2] in draws[:880]  # a hundredth is outside
    assert np.isnan(censored(np.array([-2.0, -2.1, np.nan]))[1:]).all()


def measured_levels(**levels):
    """What the claim reads of an analysis."""
    data = {f"{name}_level": ("bound", value) for name, value in levels.items()}
    found = xr.Dataset(data | {"law_phi": 0.0, "law_level": ("law", [1.0, np.inf])}, {"law": list(LAWS)})
    attrs = {"leading_level": -6.6, "pixel_shift": 2.7}
    return found.assign_coords(branch_ell=("branch", [-5.5, 0.5])).assign_attrs(attrs)


@pytest.mark.parametrize(
    ("level", "verdict", "said"),
    [
        ([-2.0, -3.0, np.inf], "does not hold", "−2.00 [−3.00, after 0.50]"),
        ([np.inf, -6.5, np.inf], "undecided", "after 0.50 [−6.50, after 0.50]"),
        ([-6.5, -np.inf, -6.3], "undecided", "−6.50 [before −5.50, −6.30]"),
        ([-6.5, -6.7, -6.3], "holds", "−6.50 [−6.70, −6.30]"),
        ([-6.5, np.nan, np.nan], "undecided", "−6.50 nats"),
    ],
)
def test_a_level_of_which_one_end_is_known_can_refute_the_claim(level, verdict, said):
    never = [-np.inf] * 3
    claim = at_speciation_time(measured_levels(network=level, labelled=level, untrained=never))
    assert claim.verdict == verdict
    assert said in claim.statement
    assert claim.controls[0].also_holds == (verdict == "holds")
    assert claim.controls[1].also_holds is False


def test_published_steps_and_their_levels_are_those_of_the_schedule():
    level = speciation_level(PUBLISHED["eigenvalue"])
    assert level == pytest.approx(-2.755, abs=1e-3)
    assert float(schedule_step(np.array(level))) == pytest.approx(PUBLISHED["predicted"], abs=1)
    assert PUBLISHED_LEVELS["predicted"] == pytest.approx(level, abs=0.012)  # half a step is 0.006
    assert PUBLISHED_LEVELS["measured"] == pytest.approx(-1.752, abs=5e-4)
    for name, at in PUBLISHED_LEVELS.items():
        assert float(schedule_step(np.array(at))) == pytest.approx(PUBLISHED[name], abs=1e-6)
    assert np.isnan(schedule_step(np.array(np.nan)))


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A folder with a network of two classes, the covariance of its data, and a classifier."""
    folder = tmp_path_factory.mktemp("pair")
    rng = np.random.default_rng(0)
    labels = np.arange(40, dtype=np.int32) % 2
    pixels = (rng.integers(0, 150, (40, 8, 8, 3)) + 100 * labels[:, None, None, None]).astype(np.uint8)
    images = image_set(pixels, labels, NAMES, "here")
    model = untrained_model(TINY, 5)
    save_model(model, folder / "model", extra={"data": images.preparation()})
    save_covariance(folder / "model", data_covariance(images))
    about = {"format": "syncgap-classifier", "class_names": list(NAMES), "size": 8}
    about["test"] = {"accuracy": 0.9, "interval": [0.8, 0.95], "images": 40}
    save_classifier(folder / "c.npz", Classifier(initial_layers(8, 2, random_key(1)), about))
    return folder, model


def settings(folder, **options):
    given = {"pairs": 4, "block": 2, "labelled_pairs": 2, "untrained_pairs": 2, "steps": "6", "branches": (0, 2, 4)}
    return SpeciationConfig(weights=str(folder / "model"), classifier=str(folder / "c.npz"), **(given | options))


@pytest.mark.slow
@pytest.mark.long
def test_study_runs_and_its_page_says_what_was_measured(network, tmp_path):
    folder, _ = network
    page = run_study(STUDY, settings(folder), tmp_path / "run", progress=False)
    text = page.read_text()
    for said in ("Speciation", "car and horse", "clones of other trajectories", "Biroli"):
        assert said in text
    tree = xr.open_datatree(tmp_path / "run" / "data.zarr", engine="zarr", consolidated=False)
    assert tree["network"].clone.dims == ("pair", "branch", "replica")
    assert set(np.unique(tree["network"].clone)) <= {0, 1}
    assert list(tree["analysis"].law.values) == list(LAWS)
    other = load_classifier(folder / "c.npz")._replace(layers=initial_layers(8, 2, random_key(2)))
    save_classifier(tmp_path / "other.npz", other)
    kept = (folder / "c.npz").read_bytes()
    try:
        (folder / "c.npz").write_bytes((tmp_path / "other.npz").read_bytes())
        with pytest.raises(ValueError, match="another classifier"):
            run_study(STUDY, settings(folder), tmp_path / "run", resume=True, progress=False)
    finally:
        (folder / "c.npz").write_bytes(kept)


@pytest.mark.long
def test_runs_of_other_seeds_and_classifiers_share_programs_and_measure_what_they_do_alone(network, tmp_path):
    folder, _ = network
    another = load_classifier(folder / "c.npz")._replace(layers=initial_layers(8, 2, random_key(2)))
    save_classifier(tmp_path / "other.npz", another)
    config = settings(folder, pairs=2)
    other = replace(config, seed=2**32 - 1, classes=(1, 0), classifier=str(tmp_path / "other.npz"))
    assert_shared(STUDY, config, other, tmp_path, ("network", "labelled", "untrained"))


def test_guidance_zero_is_the_null_label_alone(network):
    _, model = network
    clock = model.config.clock("6")
    x = jax.random.normal(random_key(0), (2, 3, 8, 8, 3))
    null = network_denoiser(model, clock)(x, 2, jnp.full(3, 2))
    for labels in (jnp.zeros(3, int), jnp.array([1, 0, 1])):
        found = network_denoiser(model, clock, guidance=0.0)(x, 2, labels)
        np.testing.assert_array_equal(found.denoised, null.denoised)
        np.testing.assert_array_equal(found.fraction, null.fraction)
    nearly = network_denoiser(model, clock, guidance=1e-7)(x, 2, jnp.zeros(3, int))
    np.testing.assert_allclose(nearly.denoised, null.denoised, atol=1e-4)
    labelled = network_denoiser(model, clock)(x, 2, jnp.zeros(3, int))
    assert np.abs(labelled.denoised - null.denoised).max() > 1e-3


def test_settings_that_cannot_be_run_are_refused_with_the_remedy(network, tmp_path):
    folder, _ = network
    with pytest.raises(ValueError, match="syncgap classifier"):
        SpeciationConfig()
    with pytest.raises(ValueError, match="sampler"):
        settings(folder, sampler="ddim")
    with pytest.raises(ValueError, match="each once"):
        settings(folder, branches=(1, 1))
    with pytest.raises(ValueError, match="labelled_pairs"):
        settings(folder, labelled_pairs=1)
    with pytest.raises(ValueError, match="more --steps"):
        run_study(STUDY, settings(folder, branches=(2, 5)), tmp_path / "a", progress=False)
    ten = SpeciationConfig(weights="photos8-natural", classifier=str(folder / "c.npz"))
    with pytest.raises(ValueError, match="--labels FILE"):
        run_study(STUDY, ten, tmp_path / "b", progress=False)


def test_default_branches_are_spread_over_the_steps_but_the_last():
    found = branch_steps(SpeciationConfig(classifier="c"), make_clock("50"))
    assert found.size == 8
    assert found[0] == 0
    assert found[-1] < 49


def test_command_makes_a_classifier_and_says_how_often_it_is_right(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for folder, count in (("train", 16), ("test", 8)):
        for name, level in (("bright", 200), ("dark", 60)):
            (tmp_path / folder / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(level - 40, level + 40, (8, 8, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / folder / name / f"{i}.png")
    places = [str(tmp_path / name) for name in ("train", "test", "c.npz")]
    options = ["--size", "8", "--epochs", "2", "--batch-size", "8", "--classes", "dark", "bright", "--quiet"]
    assert main(["classifier", *places, *options]) == 0
    assert "of 16 test images" in capsys.readouterr().out
    assert load_classifier(tmp_path / "c.npz").class_names == ("dark", "bright")
    assert main(["classifier", *places, "--size", "12"]) == 2
    assert "another --size" in capsys.readouterr().err
