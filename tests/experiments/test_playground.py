"""The interactive page: its numbers against `ou_theory`, in a real browser, and that its controls do what they say."""

import base64
import io
import json
import os
import re
import shutil
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.special import ndtr

from experiments.tools import playground
from ou_theory import attention, gain_model, landau, mixture, process, speciation
from ou_theory.clock import make_clock, respace
from ou_theory.estimator import commitment, gap, relative_energy
from ou_theory.gain_model import wiener_gain
from ou_theory.recursion import recursion_energy

PREBUILT = Path(__file__).parents[2] / "docs" / "playground.html"
BROWSERS = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser", "chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
    *("--force-device-scale-factor=1", "--host-resolver-rules=MAP * ~NOTFOUND"),
]
DEFAULTS = {
    **{"g": 0.5, "m2": 6, "s2": 0.25, "progress": 0.5, "path": "sde", "seed": 11},
    **{"gate": 0.05, "bands": 6, "exponent": 3, "s1": 30, "steps": 50, "sampler": "ddim"},
}
CHARTS = ["potential", "coupling", "replicas", "modes", "squares", "bands", "gaps", "shares"]
SPLIT = CHARTS[:5]  # of the first half; the second half shows the bands
MODES = ("common", "difference")

pytestmark = pytest.mark.slow

# --- the file


def test_the_shipped_copy_is_what_the_sources_build():
    assert PREBUILT.read_text(encoding="utf-8") == playground.build(), (
        "docs/playground.html is not up to date: "
        "python -c \"from experiments.tools.playground import write_playground as w; w('docs/playground.html')\""
    )
    assert PREBUILT.stat().st_size < 200_000  # a page that loads at once: no library, font or picture is packed into it


class Reader(HTMLParser):
    """Elements with their attributes, and the text of scripts, as a browser splits them."""

    def __init__(self):
        super().__init__()
        self.elements, self.scripts, self.element = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.element = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.element = ""

    def handle_data(self, data):
        if self.element == "script":
            self.scripts[-1] += data


def test_everything_is_inside_and_nothing_ends_a_script_early():
    reader = Reader()
    reader.feed(playground.build())
    assert not [tag for tag, attrs in reader.elements if {"src", "href", "srcset", "data"} & attrs.keys()]
    assert not {"link", "iframe", "object", "base", "img"} & {tag for tag, _ in reader.elements}
    library, model, page = (text.strip() for text in reader.scripts)
    assert library.endswith((playground.SOURCES / "uPlot.iife.min.js").read_text().strip())
    assert "MIT License" in library
    assert "uPlot (v1.6.32)" in library
    assert model == (playground.SOURCES / "model.js").read_text().strip()
    assert page == (playground.SOURCES / "page.js").read_text().strip()
    styles = [(playground.SOURCES / name).read_text() for name in ("page.css", "uPlot.min.css")]
    assert not [style for style in styles if "url(" in style or "@import" in style]


def test_what_would_end_an_element_is_escaped_or_refused():
    text = playground.inline_script("a = '</script>'; b = '</SCRIPT >'; c = '<!--<script'; d = 1 < 2")
    assert not re.search(r"</script|<!--|<script", text, re.IGNORECASE)
    assert text == r"a = '\x3C/script>'; b = '\x3C/SCRIPT >'; c = '\x3C!--\x3Cscript'; d = 1 < 2"
    with pytest.raises(ValueError, match="</style"):
        playground.inline_style("a { content: '</STYLE>' }")


def test_the_page_is_written_aside_and_renamed(tmp_path, monkeypatch):
    path = playground.write_playground(tmp_path / "new" / "page.html")
    assert path.read_text(encoding="utf-8") == playground.build()
    assert [entry.name for entry in path.parent.iterdir()] == ["page.html"]
    with pytest.raises(ValueError, match="folder"):
        playground.write_playground(tmp_path)
    path.write_text("before")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        playground.write_playground(path)
    assert path.read_text() == "before"
    assert [entry.name for entry in path.parent.iterdir()] == ["page.html"]


# --- the browser


def missing(reason) -> NoReturn:
    """Skips, or fails where a browser is required."""
    if os.environ.get("SYNCGAP_REQUIRE_BROWSER") == "1":
        pytest.fail(f"SYNCGAP_REQUIRE_BROWSER is set, but {reason}", pytrace=False)
    pytest.skip(f"the page is tested in a browser, and {reason}")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    binary = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if binary is None:
        missing(f"none of {', '.join(BROWSERS)} is installed")
    if driver is None:
        missing("chromedriver, which belongs to the browser, is not installed")
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        missing("selenium is not installed: pip install 'syncgap[test]'")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options=options, service=Service(driver))
    try:
        running.execute_cdp_cmd("Network.enable", {})
        running.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["http://*", "https://*", "ws://*", "wss://*"]})
        yield running
    finally:
        running.quit()


def screen(browser, width, height, scheme="light"):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def settle(browser):
    """Waits until what changed is drawn."""
    wait = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 0)))"
    browser.execute_async_script(wait)


def opened(browser, hash_=""):
    browser.get("about:blank")  # else only the hash would change
    browser.get(PREBUILT.as_uri() + hash_)
    settle(browser)


@pytest.fixture
def page(browser):
    """A fresh page; nothing may have been complained of by the end."""
    screen(browser, 1280, 1600)
    browser.get_log("browser")
    opened(browser)
    yield browser
    assert browser.get_log("browser") == []


def call(page, expression, *arguments):
    """Value of a JavaScript expression, NaN and infinities as null."""
    return json.loads(page.execute_script(f"return JSON.stringify({expression})", *arguments))


def plain(value):
    """Nested lists as an array, null as NaN."""
    return np.array(value, np.float64)


def canvases(page):
    """What each chart shows, as an encoded image."""
    script = "return arguments[0].map(name => document.querySelector(`#chart-${name} canvas`).toDataURL())"
    return dict(zip(CHARTS, page.execute_script(script, CHARTS), strict=True))


# --- numbers


def close(found, wanted, scale=None):
    """Equal to 1e-6 of the largest value, or of `scale`, and missing at the same places."""
    found, wanted = plain(found), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    assert (np.isnan(found) == np.isnan(wanted)).all()
    if np.isnan(wanted).all():
        return
    scale = np.nanmax(np.abs(wanted)) if scale is None else scale
    assert np.nanmax(np.abs(found - wanted)) <= 1e-6 * scale


def random_settings(count, seed):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield {
            "g": float(rng.uniform(-0.95, 0.95)),
            "m2": float(rng.uniform(0.5, 30)),
            "s2": float(rng.uniform(0.05, 2)),
            "progress": float(rng.uniform(0, 1)),
            "gate": float(rng.uniform(0, 1) ** 2),
            "bands": int(rng.integers(2, 9)),
            "exponent": float(rng.uniform(0, 4)),
            "s1": float(rng.uniform(1, 100)),
            "steps": int(rng.choice([10, 19, 50, 117, 250])),
            "sampler": str(rng.choice(["ddim", "ancestral"])),
        }


def edges():
    yield {}
    for g in (-0.95, -0.01, 0, 1e-9, 0.95):
        for m2, s2 in ((0.5, 2), (0.5, 0.5), (0.51, 0.5), (30, 0.05)):
            yield {"g": g, "m2": m2, "s2": s2, "progress": 0.3}
    for progress in (0, 1):
        yield {"g": -0.5, "progress": progress}
    for steps in (10, 250):
        for sampler in ("ddim", "ancestral"):
            for gate in (0, 1e-6, 1 / 3, 1 - 1e-6, 1):  # at 1/3 the gain is 1/2, where a formula has a removable point
                yield {"steps": steps, "sampler": sampler, "gate": gate, "bands": 8, "exponent": 4, "s1": 100}
            yield {"steps": steps, "sampler": sampler, "exponent": 0, "bands": 2, "s1": 1}
    # just before and just after a mode splits, where its wells move fastest
    horizon = 1.35 * float(np.log1p(0.5 * 5.75))
    for mode_time in (np.log1p(0.5 * 5.75), np.log1p(1.5 * 5.75) / 3):
        for t in (mode_time * (1 - 1e-4), mode_time * (1 + 1e-4), mode_time * (1 - 1e-2)):
            yield {"progress": float(1 - t / horizon)}


SETTINGS = [{**DEFAULTS, **some} for some in (*edges(), *random_settings(45, 5))]


@jax.jit
def densities(rate, m2, s2, t, x):
    def one(rate, m, s2, t, x):
        law = mixture.Mixture(jnp.full(2, 0.5), jnp.stack([m, -m])[:, None], jnp.full((2, 1, 1), s2))
        return mixture.log_density(law, process.Process(rate[None, None], jnp.ones(())), t, x[:, None])

    return jax.vmap(one)(rate, jnp.sqrt(m2), s2, t, x)


@pytest.fixture(scope="module")
def evaluated(browser):
    screen(browser, 1280, 1600)
    opened(browser)
    found = call(browser, "arguments[0].map(s => ({...syncgap.evaluate(s), pair: null}))", SETTINGS)
    return list(zip(SETTINGS, found, strict=True))


def test_there_are_many_settings():
    assert len(SETTINGS) >= 60


def test_the_wells_are_those_of_the_theory(evaluated, x64):
    settings = [SimpleNamespace(**s) for s, _ in evaluated]
    g, m2, s2, progress = (np.array([getattr(s, name) for s in settings]) for name in ("g", "m2", "s2", "progress"))
    times = [np.asarray(speciation.mode_speciation_time(np.sqrt(m2), s2, 1 + sign * g)) for sign in (-1, 1)]
    gaps = np.asarray(speciation.speciation_gap(1, g, m2 - s2, m2 - s2))
    t = np.maximum(1.5, 1.35 * np.maximum(*times)) * (1 - progress)
    x = np.array([one["potential"]["x"] for _, one in evaluated])
    for mode, sign in enumerate((-1, 1)):
        rate = 1 + sign * g
        kappa = np.asarray(speciation.mode_kappa(np.sqrt(m2), s2, rate, t))
        branch = np.asarray(landau.branch(np.sqrt(m2), s2, rate, t))
        density = np.asarray(densities(rate, m2, s2, t, x))
        depth = np.asarray(densities(rate, m2, s2, t, branch[:, None]))[:, 0]
        for i, (_, one) in enumerate(evaluated):
            close(one["speciation"][MODES[mode]], times[mode][i], max(times[mode][i], 1e-3))
            close(one["potential"]["kappa"][mode], kappa[i])
            close(one["potential"]["branch"][mode], branch[i], np.sqrt(m2[i]))
            close(one["potential"][MODES[mode]], -density[i])
            close(one["potential"]["depth"][mode], -depth[i], 1)
        assert (branch > 0).any()
        assert (branch == 0).any()
    for i, (_, one) in enumerate(evaluated):
        close(one["speciation"]["gap"], gaps[i], max(times[0][i], times[1][i], 1e-3))
        close(one["potential"]["t"], t[i], 1)


def test_the_curves_against_the_coupling_are_those_of_the_theory(evaluated, x64):
    for settings, one in evaluated[::7]:
        curves, spread = one["coupling"], settings["m2"] - settings["s2"]
        g = plain(curves["g"])
        assert (g[0], g[-1], len(g)) == (-0.95, 0.95, 191)
        scale = max(float(process.transition_time(0.05, spread)), 1e-3)
        close(curves["common"], process.transition_time(1 - g, spread), scale)
        close(curves["difference"], process.transition_time(1 + g, spread), scale)
        close(curves["gap"], speciation.speciation_gap(1, g, spread, spread), scale)


@lru_cache
def estimator(steps):
    """Commitment (gate, K, 8) at variances (8,), gates (G,) and an eta, from `ou_theory` alone; compiled once."""
    clock = make_clock(steps)

    @jax.jit
    def estimate(variance, gates, eta):
        gain = attention.rho(jnp.append(gates, 0.0))[:, None, None]
        wiener = wiener_gain(variance, jnp.asarray(clock.sigma[:, None] ** 2))
        start = jnp.full(8, 1 / clock.alpha_bar[0])
        energy = recursion_energy(gain * wiener, jnp.asarray(clock.sigma), start, eta)
        return commitment(relative_energy(energy[:-1], energy[-1, -1]), clock.log_snr)

    return clock, estimate


def estimates(settings, gates):
    """Clock, variances and commitment of the bands at every gate."""
    clock, estimate = estimator(settings["steps"])
    variance = gain_model.power_law(settings["s1"], settings["exponent"], 8)
    found = estimate(variance, jnp.asarray(gates), {"ddim": 0.0, "ancestral": 1.0}[settings["sampler"]])
    bands = settings["bands"]
    return clock, variance[:bands], jax.tree.map(lambda value: np.asarray(value)[..., :bands], found)


def test_bands_and_gaps_are_those_of_the_recursion(evaluated, x64):
    ramp = (np.arange(51) / 50) ** 2
    weights = {"ddim": gain_model.w_ode, "ancestral": gain_model.w_sde}
    nothing = 0
    for settings, one in evaluated:
        bands, gates = one["bands"], one["gates"]
        clock, variance, found = estimates(settings, np.append(settings["gate"], ramp))
        reach = clock.log_snr[-1] - clock.log_snr[0]
        close(bands["ell"], clock.log_snr)
        close(bands["variance"], variance)
        close(np.transpose(bands["latched"]), found.latch[0], 1)
        close(bands["decided"], found.decided[0], 1)
        close(bands["tau"], found.level[0], reach)
        close(bands["level"], found.latched[0], reach)
        close(bands["tauStep"], clock.step(found.level[0]), len(clock))
        close(bands["gap"], gap(found.level[0], low=0), reach)
        close(bands["gapLatched"], gap(found.latched[0], low=0), reach)
        steps = clock.step(found.level[0])
        close(bands["gapSteps"], steps[-1] - steps[0], len(clock))
        weight = weights[settings["sampler"]]
        close(bands["share"], weight(attention.rho(settings["gate"])), 1)
        close(gates["gate"], ramp)
        close(gates["gap"], gap(found.level[1:], low=0), reach)
        close(gates["gapLatched"], gap(found.latched[1:], low=0), reach)
        close(gates["decidedLow"], found.decided[1:, 0], 1)
        close(gates["decidedHigh"], found.decided[1:, -1], 1)
        close(gates["share"], weight(attention.rho(jnp.asarray(ramp))), 1)
        nothing += bands["gap"] is None
    assert nothing == 4  # at gate 1


def test_the_clock_is_the_samplers_at_every_number_of_steps(page):
    assert 0.5 in np.arange(18) * 55.5 % 1  # 19 steps: positions between two indices, which go to the even one
    assert respace(19)[1] == 56
    assert respace(19)[3] == 166
    counts = list(range(10, 251))
    levels = call(page, "arguments[0].map(steps => syncgap.evaluate({steps, bands: 2}).bands.ell)", counts)
    for count, level in zip(counts, levels, strict=True):
        assert np.abs(plain(level) - make_clock(count).log_snr).max() < 1e-11


# --- simulated pairs

SIMULATED = [
    {"g": 0.5, "path": "sde"},
    {"g": -0.8, "m2": 20, "s2": 0.05, "path": "sde", "seed": 5},
    {"g": 0.95, "m2": 2, "s2": 1, "path": "sde", "seed": 6},
    {"g": 0.3, "m2": 12, "s2": 0.1, "path": "flow", "seed": 7},
    {"g": 0.95, "m2": 30, "s2": 0.05, "path": "flow", "seed": 8},
]


def theory_squares(settings, mode, t):
    rate = 1 + (-1, 1)[mode] * settings["g"]
    data = settings["m2"] + settings["s2"]
    return np.asarray(process.mode_factor(rate, t)) ** 2 * data + np.asarray(process.mode_variance(rate, t))


@pytest.mark.parametrize("some", SIMULATED)
def test_mean_squares_of_pairs_are_those_of_the_process(page, x64, some):
    found = call(page, "syncgap.ensemble(arguments[0], 8000)", some)
    t = plain(found["t"])
    assert t[-1] == 0
    assert (np.diff(t) < 0).all()
    for mode, name in enumerate(MODES):
        wanted = theory_squares({**DEFAULTS, **some}, mode, t)
        mean, error = plain(found[name]["mean"]), plain(found[name]["error"])
        close(found[name]["theory"], wanted)
        assert (np.abs(mean - wanted) < 4.5 * error).all()
        assert (error < 0.03 * wanted).all()


def paths(page, some, count):
    found = call(page, "syncgap.simulate(arguments[0], arguments[1])", some, count)
    return plain(found["t"]), [plain(found[name]) for name in MODES]


def test_noisy_paths_forget_as_the_process_does(page):
    """Backwards in time or forwards, the state at two times has the same joint law: E x_s x_t decays with the rate."""
    some = {"g": 0.4, "m2": 3, "s2": 0.3, "seed": 21}
    t, both = paths(page, some, 3000)
    for mode, x in enumerate(both):
        rate = 1 + (-1, 1)[mode] * some["g"]
        for late, early in ((0, -1), (60, 120), (100, 101), (140, -1)):
            product = x[:, late] * x[:, early] - np.exp(-rate * (t[late] - t[early])) * x[:, early] ** 2
            assert abs(product.mean()) < 4.5 * product.std() / np.sqrt(len(product))


def test_noisy_paths_end_in_the_clusters(page):
    some = {"g": 0.4, "m2": 9, "s2": 0.25, "seed": 22}
    _, both = paths(page, some, 2000)
    for x in both:
        side = np.sign(x[:, -1])
        rest = side * x[:, -1] - 3
        assert abs(side.mean()) < 4.5 / np.sqrt(2000)
        assert abs(rest.mean()) < 4.5 * 0.5 / np.sqrt(2000)
        assert abs(rest.var() / 0.25 - 1) < 4.5 * np.sqrt(2 / 2000)
    ends = np.sign(both[0][:, -1] * both[1][:, -1])
    assert abs(ends.mean()) < 4.5 / np.sqrt(2000)  # the modes decide independently


@pytest.mark.parametrize("some", SIMULATED[3:])
def test_smooth_paths_keep_their_rank(page, some):
    """The probability flow in one dimension moves every quantile along with the law."""
    t, both = paths(page, some, 300)
    for mode, x in enumerate(both):
        rate = 1 + (-1, 1)[mode] * some["g"]
        factor = np.exp(-rate * t)
        mean, spread = factor * np.sqrt(some["m2"]), np.sqrt(factor**2 * some["s2"] + (1 - factor**2) / rate)
        rank = (ndtr((x - mean) / spread) + ndtr((x + mean) / spread)) / 2
        assert np.abs(rank - rank[:, :1]).max() < 2e-3


def test_a_seed_gives_the_same_pair_again(page):
    few, many = (paths(page, {"seed": 3}, count)[1] for count in (2, 5))
    again, other = paths(page, {"seed": 3}, 2)[1], paths(page, {"seed": 4}, 2)[1]
    assert np.array_equal(few, again)
    assert np.array_equal(few, [x[:2] for x in many])
    assert not np.isclose(few, other).any()
    start = [paths(page, {"seed": 3, "path": path}, 1)[1][0][0, 0] for path in ("sde", "flow")]
    assert start[0] == start[1]
    drawn = call(page, "syncgap.shown().pair")
    _, (u, v) = paths(page, {}, 1)
    assert np.array_equal(drawn["common"], u[0])
    assert np.allclose(plain(drawn["a"]) * np.sqrt(2), u[0] + v[0], atol=1e-12)
    assert np.allclose(plain(drawn["b"]) * np.sqrt(2), u[0] - v[0], atol=1e-12)


def test_paths_bend_with_the_sliders(page):
    _, near = paths(page, {"g": 0.5, "progress": 0.1}, 1)
    _, moved = paths(page, {"g": 0.501, "progress": 0.9}, 1)
    assert 0 < np.abs(np.subtract(near, moved)).max() < 0.2


def test_the_wells_that_are_drawn_are_the_branches(page, x64):
    pair = call(page, "syncgap.shown().pair")
    for mode, name in enumerate(MODES):
        rate = 1 + (-1, 1)[mode] * DEFAULTS["g"]
        close(pair["wells"][name], landau.branch(np.sqrt(6), 0.25, rate, plain(pair["t"])))


# --- the page


def test_it_loads_without_a_server_or_a_network(page):
    assert page.execute_script("return location.protocol") == "file:"
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert call(page, "syncgap.defaults") == DEFAULTS
    assert call(page, "syncgap.settings()") == DEFAULTS


def assert_drawn_is_computed(page):
    assert call(page, "syncgap.shown()") == call(page, "syncgap.evaluate(syncgap.settings())")


CHANGES = {  # what every control redraws
    "g": SPLIT,
    "m2": SPLIT,
    "s2": SPLIT,
    "progress": SPLIT,
    "gate": ["bands", "gaps", "shares"],
    "bands": ["bands", "gaps", "shares"],
    "exponent": ["bands", "gaps", "shares"],
    "s1": ["bands", "gaps", "shares"],
    "steps": ["bands", "gaps", "shares"],
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_slider_moved_by_key_redraws_its_charts_and_no_other(page, name):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    slider, before = page.find_element(By.ID, name), canvases(page)
    slider.send_keys(Keys.PAGE_UP)
    settle(page)
    after, settings = canvases(page), call(page, "syncgap.settings()")
    assert [chart for chart in CHARTS if before[chart] != after[chart]] == CHANGES[name]
    assert settings[name] > DEFAULTS[name]
    assert {key for key, value in settings.items() if value != DEFAULTS[key]} == {name}
    assert_drawn_is_computed(page)
    shown = page.find_element(By.CSS_SELECTOR, f"output[for={name}]").text
    value = settings[name] * (100 if name == "progress" else 1)
    assert float(shown.strip("+ %")) == pytest.approx(value, abs=1e-9)
    assert slider.get_attribute("aria-valuetext") == shown


@pytest.mark.parametrize(
    ("name", "value", "charts"), [("path", "flow", SPLIT[2:]), ("sampler", "ancestral", ["bands", "gaps", "shares"])]
)
def test_a_choice_redraws_its_charts(page, name, value, charts):
    from selenium.webdriver.common.by import By

    before = canvases(page)
    page.find_element(By.CSS_SELECTOR, f"input[name={name}][value={value}]").click()
    settle(page)
    after = canvases(page)
    assert [chart for chart in CHARTS if before[chart] != after[chart]] == charts
    assert call(page, "syncgap.settings()")[name] == value
    assert_drawn_is_computed(page)


def test_new_noise_draws_another_pair(page):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    before = canvases(page)
    page.find_element(By.ID, "again").click()
    settle(page)
    after = canvases(page)
    assert [chart for chart in CHARTS if before[chart] != after[chart]] == SPLIT[2:]
    assert call(page, "syncgap.settings()")["seed"] == DEFAULTS["seed"] + 1
    field = page.find_element(By.ID, "seed")
    # what is no seed leaves the last one; of 1e9 the first digit is one
    for typed, seed in ((Keys.DELETE, 12), ("abc", 12), ("77", 77), ("-5", 77), ("1e9", 1)):
        field.send_keys(Keys.CONTROL + "a")
        field.send_keys(typed)
        page.execute_script("arguments[0].blur()", field)
        settle(page)
        assert call(page, "syncgap.settings()")["seed"] == seed
        assert field.get_attribute("value") == str(seed)


def wait_for_hash(page, wanted):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(page, 10).until(lambda p: p.execute_script("return location.hash") == wanted)


def test_reset_goes_back_to_the_start(page):
    from selenium.webdriver.common.by import By

    before = canvases(page)
    changed = {"g": -0.3, "bands": 3, "path": "flow", "sampler": "ancestral", "seed": 5, "progress": 0.8}
    page.execute_script("syncgap.set(arguments[0])", changed)
    settle(page)
    assert not [chart for chart in CHARTS if canvases(page)[chart] == before[chart]]
    page.find_element(By.ID, "reset").click()
    settle(page)
    assert call(page, "syncgap.settings()") == DEFAULTS
    assert canvases(page) == before
    wait_for_hash(page, "")


def test_a_setting_travels_in_the_address(page):
    changed = {"g": -0.35, "m2": 12.5, "s2": 0.1, "progress": 0.25, "path": "flow", "seed": 99}
    changed |= {"gate": 0.2, "bands": 4, "exponent": 1.5, "s1": 12, "steps": 100, "sampler": "ancestral"}
    page.execute_script("syncgap.set(arguments[0])", changed)
    settle(page)
    text = "&".join(f"{name}={changed[name]}" for name in call(page, "Object.keys(syncgap.settings())"))
    wait_for_hash(page, f"#{text}")
    shown, drawn = call(page, "syncgap.shown()"), canvases(page)
    opened(page, f"#{text}")
    assert call(page, "syncgap.settings()") == changed
    assert call(page, "syncgap.shown()") == shown
    assert canvases(page) == drawn
    page.execute_script("location.hash = 'g=0.1'")  # typed over: the rest is as at the start
    wait_for_hash(page, "#g=0.1")
    settle(page)
    assert call(page, "syncgap.settings()") == {**DEFAULTS, "g": 0.1}


def test_an_address_that_says_nonsense_is_put_right(page):
    opened(
        page, "#g=7&m2=&s2=abc&bands=3.4&steps=-1&exponent=Infinity&path=<b>&sampler=none&seed=-4&other=1&__proto__=2"
    )
    assert call(page, "syncgap.settings()") == {**DEFAULTS, "g": 0.95, "bands": 3, "steps": 10}
    assert_drawn_is_computed(page)


def test_play_runs_to_the_data_and_can_be_paused(page):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def progress():
        return call(page, "syncgap.settings()")["progress"]

    button = page.find_element(By.ID, "play")
    button.click()
    WebDriverWait(page, 20).until(lambda _: progress() > DEFAULTS["progress"])
    assert "Pause" in button.text
    button.click()
    settle(page)
    held = progress()
    settle(page)
    assert progress() == held
    assert "Play" in button.text
    page.execute_script("syncgap.set({progress: 0.99})")
    button.click()
    WebDriverWait(page, 20).until(lambda _: progress() == 1)
    WebDriverWait(page, 20).until(lambda _: "Play" in button.text)
    settle(page)
    assert call(page, "syncgap.shown().potential.t") == 0
    button.click()  # from the end it starts anew
    WebDriverWait(page, 20).until(lambda _: progress() < 0.9)


def test_values_under_the_pointer_are_the_curves(page):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    over = page.find_element(By.CSS_SELECTOR, "#chart-coupling .u-over")
    ActionChains(page).move_to_element_with_offset(over, 40, 0).perform()
    settle(page)
    script = (
        "return [...document.querySelectorAll('#chart-coupling .u-value')].map(e => e.textContent.replace('−', '-'))"
    )
    texts = page.execute_script(script)
    curves = call(page, "syncgap.shown().coupling")
    at = plain(curves["g"]).tolist().index(min(curves["g"], key=lambda g: abs(g - float(texts[0]))))
    assert texts == [f"{curves[name][at]:.2f}" for name in ("g", "common", "difference", "gap")]


def test_every_control_has_a_name_and_can_be_reached_by_key(page):
    names = page.execute_script(
        "return [...document.querySelectorAll('input')].map(e => [e.id, e.labels.length, e.tabIndex])"
    )
    assert len(names) == 14
    assert all(labels == 1 and index == 0 for _, labels, index in names)
    charts = page.execute_script(
        "return [...document.querySelectorAll('.chart')].map(e => [e.role, e.ariaLabel.length])"
    )
    assert len(charts) == len(CHARTS)
    assert all(role == "img" and length > 20 for role, length in charts)


def test_colours_follow_the_system_and_widths_the_window(page):
    before, shown = canvases(page), call(page, "syncgap.shown()")
    for width, scheme in ((1280, "dark"), (900, "dark"), (1280, "light")):
        screen(page, width, 1600, scheme)
        settle(page)
        settle(page)
        after = canvases(page)
        assert [chart for chart in CHARTS if before[chart] == after[chart]] == (CHARTS if scheme == "light" else [])
        fits = "return arguments[0].every(n => { const box = document.querySelector(`#chart-${n}`);"
        fits += " return box.scrollWidth <= box.clientWidth && box.querySelectorAll('canvas').length === 1 })"
        assert page.execute_script(fits, CHARTS)
    assert call(page, "syncgap.shown()") == shown


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 1600), (400, 900)])
def test_it_looks_like_something(page, tmp_path, width, height, scheme):
    screen(page, width, height, scheme)
    opened(page)
    settle(page)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    columns = page.execute_script(
        "return new Set([...document.querySelectorAll('article')].map(e => e.offsetLeft)).size"
    )
    assert columns == (1 if width < 500 else 2)
    shot = page.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True})
    (tmp_path / f"{scheme}{width}.png").write_bytes(base64.b64decode(shot["data"]))
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("L"), float)
    assert image.shape[1] == width
    assert (np.median(image) > 200) == (scheme == "light")
    boxes = page.execute_script(
        "return arguments[0].map(n => { const b = document.querySelector(`#chart-${n} canvas`).getBoundingClientRect();"
        " return [b.x + scrollX, b.y + scrollY, b.width, b.height] })",
        CHARTS,
    )
    for left, top, wide, high in np.round(boxes).astype(int):
        assert left + wide <= width
        assert wide > 200
        panel = image[top : top + high, left : left + wide]
        assert panel.shape == (high, wide)
        assert panel.std() > 8
        halves = np.array_split(panel, 2, axis=1)
        assert min(half.std() for half in halves) > 5
