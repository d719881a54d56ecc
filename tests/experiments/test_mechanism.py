"""The mechanism study: the split's laws on a tiny random network, exact cases, the run from end to end."""

import json
from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_jax.attention import symmetric_gate
from dit_jax.checkpoint import save_model
from dit_jax.config import DiTConfig
from dit_jax.diffusion import network_denoiser
from experiments.frame import subject
from experiments.frame.bench import Bench as StudyBench
from experiments.frame.draws import pair_draws
from experiments.frame.eigenmodes import eigenmodes
from experiments.frame.instrument import one_pass
from experiments.frame.steps import spaced_steps
from experiments.frame.store import RunFolder
from experiments.frame.study import run_study
from experiments.frame.subject import untrained_model
from experiments.studies.mechanism.analysis import concentration, cutoff, over_levels, pooled
from experiments.studies.mechanism.measure import VARIABLES, MechanismInstrument, open_gates
from experiments.studies.mechanism.page import cutoff_text, low_pass_claim
from experiments.studies.mechanism.settings import MechanismConfig
from experiments.studies.mechanism.split import split_head
from experiments.studies.mechanism.study import STUDY
from ou_theory.attention import GATE_KINDS, gated_attention, rho, xi
from ou_theory.clock import make_clock

MODEL = DiTConfig(input_size=8, in_channels=3, hidden_size=16, depth=2, num_heads=2, num_classes=3, prediction="v")
LATENTS = replace(MODEL, in_channels=4, num_heads=1, learn_sigma=False, prediction="epsilon")
COUPLINGS = (0.0, 0.3, 1.0)
FAST = {"couplings": COUPLINGS, "pairs": 6, "steps": "8", "block": 2, "untrained_pairs": 2, "levels": 3}
GROUPS = ("network", "untrained", "random")
every = pytest.mark.parametrize("gate", GATE_KINDS)

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.usefixtures("blank_figures")]


@pytest.fixture(scope="module", autouse=True)
def made_once():
    """One untrained network and one instrument for all runs: making them takes longer than a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "untrained_model", lru_cache(untrained_model))
        instruments = {}
        patch.setattr(
            "experiments.studies.mechanism.measure.MechanismInstrument",
            lambda bench: instruments.setdefault(bench.config, MechanismInstrument(bench)),
        )
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    model = open_gates(subject.untrained_model(MODEL, 0))
    nnx.update(model, jax.tree.map(lambda x: 1.2 * x, nnx.state(model)))
    save_model(model, folder)
    return str(folder)


def run(weights, out, **more):
    return run_study(STUDY, MechanismConfig(weights=weights, **FAST), out, progress=False, **more)


@pytest.fixture(scope="module")
def finished(weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert run(weights, out, command="syncgap mechanism") == out / "report.html"
    return RunFolder.open(out)


@pytest.fixture(scope="module")
def network(finished):
    return finished.load("network").astype(np.float64)


@pytest.fixture(scope="module")
def analysis(finished):
    return finished.load("analysis")


class Bench:
    """The instrument under the blend gate, on states of choice: of latents, one head, no learned variance, epsilon."""

    def __init__(self, folder):
        save_model(open_gates(untrained_model(LATENTS, 1)), folder / "model")
        config = MechanismConfig(weights=str(folder / "model"), **{**FAST, "gate_kind": "blend"})
        self.study = StudyBench("mechanism", config, folder / "run")
        self.instrument = MechanismInstrument(self.study)
        self.model = self.study.network
        self.labels = np.array([0, 1], np.int32)
        self.states = self.instrument.states(self.model, np.arange(2), self.labels)

    def measure(self, states):
        found = self.instrument.one_pass(self.model, jnp.asarray(COUPLINGS), states, self.labels)
        return {name: np.asarray(value, np.float64) for name, value in found.items()}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def blended(bench):
    return bench.measure(bench.states)


def random_head(seed=0, tokens=5, dim=4):
    return tuple(jnp.asarray(z) for z in np.random.default_rng(seed).standard_normal((3, 2, tokens, dim)))


# --- one head


@every
@pytest.mark.parametrize("g", [0.0, 0.37, 1.0])
def test_parts_of_a_head_are_those_of_its_output(gate, g, x64):
    q, k, v = random_head()
    split = split_head(q, k, v, jnp.asarray(g), gate)
    out = gated_attention(q, k, v, symmetric_gate(g), gate)
    np.testing.assert_allclose(split.exact[3], out[0] - out[1], atol=1e-12)
    np.testing.assert_allclose(split.exact[:3].sum(0), split.exact[3], atol=1e-12)
    alone = gated_attention(q, k, v, jnp.eye(2), gate)
    np.testing.assert_allclose(split.alone[3], alone[0] - alone[1], atol=1e-12)


@every
def test_equal_keys_and_queries_leave_routing_alone(gate, x64):
    """The pattern is uniform then: routing is rho times the mean difference of values, and first order is exact."""
    v = random_head()[2]
    zero, g = jnp.zeros_like(v), jnp.asarray(0.4)
    split = split_head(zero, zero, v, g, gate)
    np.testing.assert_allclose(split.exact[0], np.broadcast_to(rho(g, gate) * (v[0] - v[1]).mean(0), v[0].shape))
    for part in (split.exact[1:3], split.cross, split.error):
        np.testing.assert_allclose(part, 0, atol=1e-12)


def test_the_self_only_reading_is_what_is_left_without_the_cross_part(x64):
    """Under blend: the pattern part minus the cross part is xi times the change of the self pattern."""
    q, k, v = random_head()
    g = jnp.asarray(0.37)
    split = split_head(q, k, v, g, "blend")
    own = [jax.nn.softmax(q[a] @ k[a].T / np.sqrt(q.shape[-1]), -1) for a in (0, 1)]
    for cross in split.cross:
        reading = split.exact[1] + split.exact[2] - cross
        np.testing.assert_allclose(reading, xi(g) * (own[0] - own[1]) @ v.mean(0), atol=1e-12)
    np.testing.assert_allclose(split_head(q, k, v, jnp.asarray(0.0), "joint").cross, 0)


def test_mass_between_own_and_other_keys_counts_in_one_reading_of_joint(x64):
    q, k, v = random_head()
    shift = jnp.asarray(0.0), jnp.asarray(5.0)  # adds the same to all values: a normalised pattern does not see it
    weights, pattern = (
        np.stack([split_head(q, k, v + by, jnp.asarray(0.5), "joint").cross[i] for by in shift]) for i in (0, 1)
    )
    assert np.abs(weights[1] - weights[0]).max() > 0.1
    np.testing.assert_allclose(pattern[1], pattern[0], atol=1e-12)


@every
def test_first_order_error_falls_with_the_square_of_the_difference(gate, x64):
    q, k, v = random_head()
    errors = []
    for scale in (0.1, 0.05):
        near = [x.mean(0) + scale * (x - x.mean(0)) for x in (q, k, v)]
        split = split_head(*near, g=jnp.asarray(0.4), kind=gate)
        errors.append(np.linalg.norm(split.error[3]) / np.linalg.norm(split.exact[3]))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)


# --- the network


def test_parts_sum_to_the_networks_own_head_outputs(network, blended):
    for closure, energy in (
        (network.closure.values, network.split_energy.sel(part="total").mean("token_band").values),
        (blended["closure"], blended["split_energy"][..., 3, :].mean(-1)),
    ):
        assert np.sqrt((closure / energy).max()) < 1e-5


def test_products_of_the_parts_sum_to_the_total(network, analysis):
    energy = network.split_energy.sel(part="total").values
    np.testing.assert_allclose(network.split_product.values[..., :3, :].sum(-2), energy, rtol=1e-4)
    for name in ("share", "share_all", "share_layer"):
        shares = analysis[f"network_{name}"].sel(bound="estimate", part=["routing", "key", "query"])
        np.testing.assert_allclose(shares.sum("part"), 1, atol=1e-4)


def test_no_key_part_at_full_coupling(network, blended):
    for energy in (network.split_energy.values, blended["split_energy"]):
        key, total = energy[:, -1, :, :, 1], energy[:, -1, :, :, 3]
        assert (key < 1e-10 * total).all()
        assert (energy[:, 0, :, :, 1] > 1e-6 * energy[:, 0, :, :, 3]).all()


def test_without_coupling_nothing_is_changed(network, analysis):
    at = network.sel(coupling=0)
    np.testing.assert_allclose(at.alone_energy, at.split_energy, rtol=1e-4)
    np.testing.assert_allclose(at.cross_energy, 0)
    np.testing.assert_allclose(at.head_growth, at.head_growth_alone, rtol=1e-3, atol=1e-6)
    for name in ("gain", "stream_gain", "head_gain", "part_gain"):
        np.testing.assert_allclose(analysis[f"network_{name}"].isel(coupling=0, bound=0), 1, atol=1e-5)


def test_the_budget_of_the_stream_closes(network):
    energy, product = network.stream_energy, network.stream_product
    after = energy.sel(place=["pre", "attention", "mlp"]).sum("place") + 2 * product.sum("product")
    np.testing.assert_allclose(after, energy.sel(place="post"), rtol=1e-4)
    np.testing.assert_allclose(energy.sel(place="pre")[:, :, :, 1:], energy.sel(place="post")[:, :, :, :-1], rtol=1e-6)
    final = network.origin.sum(["layer", "sublayer"]) + network.origin_embedding
    np.testing.assert_allclose(final, energy.sel(place="post").isel(layer=-1), rtol=1e-4)


def test_what_heads_and_parts_add_is_what_attention_adds(network):
    """By the slices of the output projection and the gate, against the stream itself."""
    energy, product = network.stream_energy, network.stream_product
    scale = float(energy.sel(place="pre").max())
    pull = product.sel(product="pre attention")
    np.testing.assert_allclose(network.head_pull.sum("head"), pull, atol=1e-6 * scale)
    growth = 2 * pull + energy.sel(place="attention")
    np.testing.assert_allclose(network.head_growth.sum("head"), growth, atol=1e-6 * scale)
    parts = network.part_growth.sel(part=["routing", "key", "query"]).sum("part")
    np.testing.assert_allclose(parts, growth, atol=1e-6 * scale)
    assert float(np.abs(growth).max()) > 1e-2 * scale


def test_sublayers_add_up_to_the_gain_of_the_stream(analysis):
    logs = analysis.network_contraction.sel(bound="estimate").sum("sublayer")
    gain = analysis.network_stream_gain.sel(bound="estimate").isel(stage=-1)
    np.testing.assert_allclose(logs, np.log(gain), atol=1e-5)
    origin = analysis.network_origin_share.sel(bound="estimate")
    np.testing.assert_allclose(origin.sum("origin"), 1, atol=1e-5)
    np.testing.assert_allclose(
        analysis.network_bypass.sel(bound="estimate"), 1 - origin.sel(origin="attention"), atol=1e-5
    )


def test_the_denoised_difference_is_that_of_the_main_instrument(bench, blended):
    """Another way to the same number: `experiments.frame.instrument.one_pass` on the same states."""
    clock, steps = bench.study.clock, bench.instrument.steps
    every = jnp.zeros((len(clock), *bench.states.shape[1:])).at[steps].set(bench.states)
    modes = eigenmodes(bench.study.bands, bench.states.shape[-1], None)  # the bands
    known = jax.jit(
        lambda model, states: one_pass(
            lambda gate: network_denoiser(model, clock, gate, kind="blend"),
            clock,
            modes,
            jnp.asarray(COUPLINGS),
            states,
            bench.labels,
        )["energy"]
    )(bench.model, every)
    np.testing.assert_allclose(blended["denoised"], np.swapaxes(known, 0, 1)[:, :, steps], rtol=1e-4)


def test_identical_replicas_have_no_difference(bench, blended):
    """But for rounding, which epsilon-prediction amplifies at the noisy end."""
    same = jnp.broadcast_to(bench.states[:, :1], bench.states.shape)
    for name, value in bench.measure(same).items():
        np.testing.assert_allclose(value, 0, atol=1e-8 * np.abs(blended[name]).max() + 1e-11, err_msg=name)


def test_first_order_holds_for_small_differences_of_the_states(bench):
    """At half the difference the relative error is a quarter: energies 16 to 1."""
    mean = bench.states.mean(1, keepdims=True)
    ratios = []
    for scale in (0.1, 0.05):
        found = bench.measure(mean + scale * (bench.states - mean))
        error, total = (found[name][..., 3, :].sum((0, -1)) for name in ("first_order_error", "split_energy"))
        ratios.append(error / total)
    np.testing.assert_allclose(ratios[0] / ratios[1], 16, rtol=0.25)


def test_another_block_is_no_other_compilation(bench, blended):
    bench.instrument.measure(open_gates(bench.model), 2 + np.arange(2), bench.labels[::-1])
    assert bench.instrument.one_pass.func._cache_size() == 1
    assert bench.instrument.states.func._cache_size() == 1


def test_open_gates_let_attention_act_and_leave_the_model_alone(bench):
    model, opened = bench.model, open_gates(bench.model)

    @jax.jit
    def written(model):
        x = jax.random.normal(jax.random.key(0), (1, 8, 8, 4))
        tap = model(x, jnp.array([500]), jnp.array([0]), tap=lambda layer, a: a["resid_mid"] - a["resid_pre"])[1]
        return jnp.square(tap).mean()

    before = float(written(model))
    assert float(written(opened)) > 2 * before
    assert float(written(model)) == before


# --- estimates


def test_cutoff_of_known_curves():
    radius = np.array([0.0, 0.1, 0.3, 0.5, 0.7])
    ramp = np.array([0.0, 0.2, 0.4, 0.8, 1.0])  # half way, 0.6, half way between 0.3 and 0.5
    flat = np.full(5, 0.5)
    grown = np.array([1.0, 1.1, 1.2, 1.0, 1.0])
    found = cutoff(np.stack([ramp, flat, grown]), radius)
    np.testing.assert_allclose(found, [0.4, 0.7, np.nan])
    assert "does not pass" in cutoff_text(np.array([0.7, 0.7, 0.7]), 0.7)
    assert "not synchronised" in cutoff_text(np.array([np.nan] * 3), 0.7)
    assert "0.40" in cutoff_text(np.array([0.4, 0.3, 0.5]), 0.7)


def test_pooling():
    rng = np.random.default_rng(0)
    total = rng.random((2, 3, 4, 5)) + 1
    parts = rng.random((2, 3, 4, 5, 2))
    parts = parts / parts.sum(-1, keepdims=True) * total[..., None]
    np.testing.assert_allclose(pooled(parts, total[..., None]).sum(-1), 1)
    # layers of any size weigh the same
    scaled = np.array([1.0, 1e6, 1e-6, 5, 7])
    np.testing.assert_allclose(
        pooled(parts * scaled[:, None], (total * scaled)[..., None]), pooled(parts, total[..., None])
    )
    np.testing.assert_allclose(over_levels(np.array([[[0.01, 1.0], [1.0, 1.0]]])), [[np.sqrt(0.1), 1]])


def test_concentration_does_not_pick_its_own_noise():
    weights = pair_draws(0, 40)
    one = np.zeros((40, 20))
    one[:, 3] = -1
    np.testing.assert_allclose(concentration(one, weights), 1)
    noise = -1 + np.random.default_rng(1).standard_normal((40, 20))  # all heads alike: 2 of 20 carry a tenth
    assert concentration(noise, weights)[0] == pytest.approx(0.1, abs=0.03)


def test_steps_are_those_of_the_window():
    clock = make_clock("50")
    steps = spaced_steps(clock, 8)
    assert (clock.log_snr[steps] >= -6).all()
    assert (np.diff(steps) > 0).all()
    assert steps[-1] == 49
    assert clock.log_snr[steps[0] - 1] < -6
    with pytest.raises(ValueError, match="steps"):
        spaced_steps(make_clock("1", np.full(10, 0.999)), 3)


def test_the_claim_fails_where_the_interval_says_so(analysis):
    verdicts = {}
    for value in (0.5, 0.05, -0.5):
        slopes = {f"{source}_slope": analysis[f"{source}_slope"].copy() for source in GROUPS}
        slopes["network_slope"][-1] = [value, value - 0.1, value + 0.1]
        slopes["random_slope"][-1] = [value, value - 0.1, value + 0.1]
        claim = low_pass_claim(analysis.assign(slopes))
        verdicts[value] = claim.verdict
        assert claim.id == 0
        assert claim.controls[1].also_holds is (value == 0.5)
    assert verdicts == {0.5: "holds", 0.05: "undecided", -0.5: "does not hold"}


# --- the run


def test_the_folder_holds_what_was_measured(finished):
    for group in GROUPS:
        dataset = finished.load(group)
        assert set(dataset.data_vars) == set(VARIABLES)
        for name, values in dataset.data_vars.items():
            assert values.dims == ("pair", *VARIABLES[name][0])
            assert np.isfinite(values).all(), name
    assert finished.load("network").sizes["pair"] == 6
    assert finished.manifest["status"] == "complete"
    assert finished.manifest["kind"] == "mechanism"


def test_report_and_figures_are_there(finished, has_ink):
    text = (finished.path / "report.html").read_text()
    assert "Coupling synchronises this network&#39;s low bands more than its high ones" in text
    section = finished.read_json("section.json")
    for name in section["captions"]:
        assert has_ink(finished.path / "figures" / f"{name}.png")
    (claim,) = json.loads((finished.path / "claims.json").read_text())["claims"]
    assert [control["name"] for control in claim["controls"]] == ["untrained network", "untrained, adaLN gates open"]


def test_estimates_lie_in_their_intervals(analysis):
    for name in ("network_gain", "network_share", "network_bypass", "network_head_sync"):
        point, low, high = np.moveaxis(analysis[name].values, -1, 0)
        assert np.mean((low <= point + 1e-6) & (point <= high + 1e-6)) > 0.95, name


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"couplings": (0.2, 1.0)}, "couplings"),
        ({"couplings": (0.0,)}, "couplings"),
        ({"couplings": (0.0, 1.0, 0.5)}, "couplings"),
        ({"couplings": (0.0, float("inf"))}, "couplings"),
        ({"levels": 0}, "levels"),
        ({"pairs": 1}, "pairs"),
        ({"steps": "none"}, "steps"),
        ({"classes": (7,)}, "classes"),
    ],
)
def test_bad_settings_are_named(weights, tmp_path, changed, named):
    with pytest.raises(ValueError, match=named):
        run_study(STUDY, MechanismConfig(weights=weights, **{**FAST, **changed}), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
