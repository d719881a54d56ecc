"""What the tests of experiments share: a synthetic run (what a comparison stores, from closed recursions in place of a
network), an untrained network, the interactive page in a browser."""

import shutil

import counting_study
import numpy as np
import pytest
import xarray as xr
from PIL import Image
from playground_browser import opened, running_browser, screen

from dit_jax.checkpoint import save_model
from dit_jax.config import DiTConfig
from experiments.frame import drawing
from experiments.frame import page as frame_page
from experiments.frame.estimator import ESTIMATORS
from experiments.frame.measured import Measured
from experiments.frame.page import store_page
from experiments.frame.store import RunFolder
from experiments.frame.study import run_study
from experiments.frame.subject import untrained_model
from experiments.studies.compare.page import page as compare_page
from experiments.studies.compare.settings import CompareConfig

DPI = drawing.DPI
COUPLINGS = np.array([0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1])
FEW = np.array([0, 5, 9])  # couplings of the untrained network
VARIANCE = np.array([30.0, 8.0, 1.5, 0.5, 0.2, 0.09, 0.05])
RADIUS = np.array([0.0, 0.11, 0.33, 0.55, 0.77, 0.99, 1.21])
ELL = np.linspace(-9.5, 7.5, 50)
START = -6.0
SOURCES = ["network", "regression gain", "data covariance", "untrained", "wiener", "wiener theory"]
LOW, HIGH = 1, 6
SETTINGS = {
    "weights": "photos16-v",
    "couplings": [round(float(g), 4) for g in COUPLINGS],
    "pairs": 64,
    "steps": "50",
    "sampler": "ddim",
    "gate_kind": "joint",
    "guidance": 1.0,
    "classes": list(range(10)),
    "seed": 0,
}


def relative_energy(gain):
    """Q (C, K, B) of the difference mode under DDIM steps with the denoiser's gains (C, K, B)."""
    sigma = np.exp(-ELL / 2)
    y = np.full((gain.shape[0], gain.shape[2]), np.sqrt(1 + sigma[0] ** 2))
    energy = []
    for k in range(len(ELL)):
        energy.append((gain[:, k] * y) ** 2)
        if k + 1 < len(ELL):
            y = y * (gain[:, k] + (1 - gain[:, k]) * sigma[k + 1] / sigma[k])
    energy = np.stack(energy, 1)
    return energy / energy[:1, -1:]


def estimate(q):
    """Commitment level, decided fraction and latched level, (C, B) each."""
    inside = ELL >= START
    latched = np.minimum(1, np.maximum.accumulate(q[:, inside], axis=1))
    area = np.trapezoid(latched, ELL[inside], axis=1)
    decided = latched[:, -1]
    with np.errstate(invalid="ignore"):  # nothing is decided under zero gain
        return ELL[-1] - area / decided, decided, ELL[-1] - area


def filled(rows, shape):
    table = np.full((len(SOURCES), len(COUPLINGS), *shape), np.nan)
    for name, values in rows.items():
        table[SOURCES.index(name), FEW if name == "untrained" else slice(None)] = values
    return table


def synthetic_analysis(seed=0) -> xr.Dataset:
    rng = np.random.default_rng(seed)
    wiener = VARIANCE / (VARIANCE + np.exp(-ELL)[:, None])
    ideal = ((1 - COUPLINGS) / (1 + COUPLINGS))[:, None, None] + 0 * wiener
    share = np.linspace(0.08, 0.97, 7)  # what the coupling leaves of each band: attention carries the low ones
    gain = 1 - (1 - share) * (1 - ideal) * (0.85 + 0.15 * np.tanh(ELL / 3)[:, None])
    q = {
        "network": relative_energy(gain * wiener * 0.98) + 0.03 * np.exp(-(ELL + 9.5) / 2)[:, None],
        "regression gain": relative_energy(gain * wiener),
        "data covariance": relative_energy(ideal * wiener),
        "untrained": relative_energy((0.9 + 0 * wiener[None]) * np.ones((3, 1, 1))),
        "wiener": relative_energy(ideal * wiener) * (1 + 1e-3 * rng.standard_normal((10, 1, 7))),
        "wiener theory": relative_energy(ideal * wiener),
    }
    tau, decided, latched = (dict(zip(q, part, strict=True)) for part in zip(*map(estimate, q.values()), strict=True))
    variables = {
        "tau": (tau, ("band",), 0.12),
        "tau_steps": ({n: np.interp(v, ELL, np.arange(50)) for n, v in tau.items()}, ("band",), None),
        "decided": (decided, ("band",), 0.03),
        "gap": ({n: v[:, HIGH] - v[:, LOW] for n, v in tau.items()}, (), 0.2),
        "latched_gap": ({n: v[:, HIGH] - v[:, LOW] for n, v in latched.items()}, (), None),
        "relative_energy": (q, ("step", "band"), None),
    }
    variables["gap_steps"] = (
        {n: np.diff(np.interp(v[:, [LOW, HIGH]], ELL, np.arange(50)), axis=1)[:, 0] for n, v in tau.items()},
        (),
        0.8,
    )
    sizes = {"step": len(ELL), "band": 7}
    data = {}
    for name, (rows, dims, spread) in variables.items():
        table = filled(rows, [sizes[d] for d in dims])
        data[name] = (("source", "coupling", *dims), table)
        if spread is not None:
            half = spread * (0.5 + rng.random(table.shape))
            interval = np.stack([table - half, table + half], -1)
            interval[[SOURCES.index(name) for name in ("data covariance", "wiener theory")]] = np.nan
            data[f"{name}_interval"] = (("source", "coupling", *dims, "bound"), interval)
    data["gain"] = (("source", "coupling", "step", "band"), filled({"network": gain}, (50, 7)))
    data["residual"] = (data["gain"][0], filled({"network": 0.1 * gain}, (50, 7)))
    theories = ["regression gain", "data covariance"]
    for name, dims in {"tau": ("band",), "gap": ()}.items():
        rows = data[name][1]
        excess = np.stack([rows[0] - rows[SOURCES.index(theory)] for theory in theories])
        data[f"{name}_excess"] = (("theory", "coupling", *dims), excess)
        bounds = excess[..., None] + np.array([-0.15, 0.25])
        data[f"{name}_excess_interval"] = (("theory", "coupling", *dims, "bound"), bounds)
    floor, level = np.full((len(SOURCES), 10, 7), np.nan), np.full((len(SOURCES), 7), np.nan)
    floor[0], floor[3, FEW] = [0.001, 0.002, 0.004, 0.008, 0.02, 0.06, 0.13], 0.4
    level[0] = -np.log(VARIANCE) + 0.05
    data["floor"] = (("source", "coupling", "band"), floor)
    data["projection_level"] = (("source", "band"), level)
    network = data["gap"][1][0]
    data["gap_by"] = (("estimator", "coupling"), network + np.array([0, 0.02, -0.3, -0.5])[:, None])
    data["gap_by_interval"] = ((*data["gap_by"][0], "bound"), data["gap_by"][1][..., None] + np.array([-0.2, 0.2]))
    data["end_energy"] = (("coupling", "band"), q["network"][:, -1])
    data["end_energy_interval"] = (("coupling", "band", "bound"), q["network"][:, -1, :, None] * np.array([0.9, 1.1]))
    data["image_energy"] = (("coupling", "band"), np.linspace(0.97, 1.04, 70).reshape(10, 7))
    dataset = xr.Dataset(
        data,
        coords={
            "source": SOURCES,
            "theory": theories,
            "coupling": COUPLINGS,
            "bound": ["low", "high"],
            "estimator": list(ESTIMATORS),
            "band": np.arange(7),
            "step": np.arange(50),
            "radius": ("band", RADIUS),
            "count": ("band", [1, 6, 20, 34, 48, 80, 67]),
            "ell": ("step", ELL),
            "timestep": ("step", np.arange(50)[::-1] * 20),
        },
        attrs={"low_band": LOW, "high_band": HIGH, "ell_start": START, "steps": 50, "pairs": 64, "gain_pairs": 32}
        | {"untrained_pairs": 16, "draws": 1000, "floor_limit": 0.1, "model": "photos16-v", "prediction": "v"}
        | {"sampler": "ddim", "gate_kind": "joint", "guidance": 1.0, "seed": 0, "claim_level": 1 - 0.05 / 3},
    )
    claimed = [name for name in SOURCES[:5] if name != "data covariance"]
    rows = {"remains": [[0.48, 0.3, 0.66]] + [[1.0, 0.9, 1.1]] * 3, "order": [[1.0, 0.8, 1.0]] * 2 + [[0.87, 0.6, 1.0]]}
    rows["order"] += [[1.0, 1.0, 1.0]]
    gaps = dataset.gap.sel(source=claimed).isel(coupling=0).values
    rows["uncoupled"] = gaps[:, None] + np.array([0.0, -0.3, 0.4])
    for name, values in rows.items():
        dataset[name] = ("claimed", np.array(values)[:, 0])
        dataset[f"{name}_interval"] = (("claimed", "bound"), np.array(values)[:, 1:])
    dataset["in_order"], dataset["strongest"] = ("claimed", np.ones(4)), ("claimed", np.full(4, COUPLINGS[-1]))
    dataset["shuffled_order"] = ("shuffle", np.linspace(-0.8, 0.7, 99))
    dataset["order_p"] = 0.01
    dataset = dataset.assign_coords(claimed=claimed)
    dataset["weak"] = dataset.decided < 0.002
    dataset["weak"][0, -1, :2] = True
    return dataset


def synthetic_pictures() -> xr.Dataset:
    rng = np.random.default_rng(3)
    seeds = rng.random((6, 2, 4, 4, 3))
    coupled = np.repeat(seeds[:, :1], 2, 1) + 0.06 * seeds
    image = np.stack([seeds, coupled])
    image = np.repeat(np.repeat(image, 4, -3), 4, -2)
    names = ["airplane", "car", "bird", "cat", "deer", "<b>dog</b>"]
    return xr.Dataset(
        {"image": (("coupling", "pair", "replica", "y", "x", "rgb"), np.uint8(255 * np.clip(image, 0, 1)))},
        coords={"coupling": COUPLINGS[[0, -1]], "label_name": ("pair", names)},
        attrs={"preview": "pixels"},
    )


@pytest.fixture(scope="session", autouse=True)
def coarse():
    """Pictures at a third of the resolution, which saves a tenth of a second each; but for `drawn_run`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "DPI", DPI // 3)
        yield


@pytest.fixture
def blank_figures(monkeypatch, request):
    """Figures of runs are empty: for tests of what is measured. Those that ask for `has_ink` get some, and what is made
    before the test, in fixtures of larger scope, is drawn, too."""
    if "has_ink" in request.fixturenames:
        return

    def draw(folder, figures):
        folder.mkdir(exist_ok=True)
        for name in figures:
            (folder / f"{name}.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"/>')
            Image.new("RGB", (1, 1)).save(folder / f"{name}.png")

    monkeypatch.setattr(frame_page, "draw_figures", draw)


@pytest.fixture
def fine(monkeypatch):
    """Pictures at the resolution that users get."""
    monkeypatch.setattr(drawing, "DPI", DPI)


@pytest.fixture(scope="session")
def has_ink():
    """Whether a picture shows something: how much its grey varies."""
    return lambda path: np.asarray(Image.open(path).convert("L")).std() > 5


@pytest.fixture(scope="session")
def analysis() -> xr.Dataset:
    return synthetic_analysis()


@pytest.fixture(scope="session")
def pictures() -> xr.Dataset:
    return synthetic_pictures()


@pytest.fixture(scope="session")
def stored_run(analysis, pictures, tmp_path_factory) -> RunFolder:
    """A finished run without figures and report; tests that change it copy its folder."""
    extra = {"weights_digest": "ab12" * 16, "bands": 6}
    extra["model"] = {"input_size": 16, "patch_size": 2, "in_channels": 3, "hidden_size": 96, "depth": 12}
    extra["model"] |= {"num_heads": 6, "num_classes": 10, "prediction": "v"}
    command = "syncgap compare --out 'runs/a <b>'"
    run = RunFolder.create(tmp_path_factory.mktemp("run") / "run", SETTINGS, command=command, extra=extra)
    run.put("analysis", analysis)
    run.put("pictures", pictures)
    run.note(sampling_s=171.2, analysis_s=12.5)
    run.finish()
    return run


@pytest.fixture(scope="session")
def drawn_run(stored_run, analysis) -> RunFolder:
    """The same run with its section and figures."""
    run = RunFolder.open(stored_run.path, writable=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "DPI", DPI)
        store_page(run, compare_page(Measured.of(run, CompareConfig), analysis))
    return run


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> str:
    """Folder `tiny` of an untrained network that predicts epsilon. Tests only read it."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    config = DiTConfig(input_size=8, in_channels=3, hidden_size=16, depth=2, num_heads=2, num_classes=3)
    save_model(untrained_model(config, 5), folder, extra={"data": None})
    return str(folder)


@pytest.fixture(scope="module")
def whole(weights, tmp_path_factory):
    """Folder of a finished run of the study that counts. Tests only read it."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run_study(counting_study.Counting().study, counting_study.settings(weights), out, progress=False)
    return out


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of it, for a test to change."""
    return shutil.copytree(whole, tmp_path / "run")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with running_browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture
def page(browser):
    """A fresh interactive page; nothing may have been complained of by the end."""
    screen(browser, 1280, 1600)
    browser.get_log("browser")
    opened(browser)
    yield browser
    assert browser.get_log("browser") == []
