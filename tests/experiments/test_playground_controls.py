"""The interactive page in a real browser: its controls do what they say, and it looks like something."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from playground_browser import CHARTS, DEFAULTS, SPLIT, call, canvases, opened, plain, screen, settle

pytestmark = pytest.mark.long


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
