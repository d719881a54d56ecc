"""The paper's claims as statements about a run: verdict, value, interval, and what the controls say.

A claim holds when its 95 % interval lies wholly on the claimed side, does not hold when it lies wholly on the other,
and is undecided in between. The same rule is applied to the controls.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from experiments.studies.compare.analysis import order
from ou_theory.bootstrap import basic_interval

COLLAPSED = 0.5  # the gap has collapsed when less than this share of it is left


@dataclass
class Control:
    name: str
    value: float | None
    interval: list[float] | None
    also_holds: bool | None
    statement: str


@dataclass
class Claim:
    id: int
    title: str
    verdict: str
    measure: str
    value: float | None
    interval: list[float] | None
    statement: str
    controls: list[Control] = field(default_factory=list)


def claims(analysis: xr.Dataset, drawn: dict[str, dict]) -> list[dict]:
    """Claims 1, 2 and 4, and a placeholder for 3, as JSON-able dictionaries."""
    found = [_gap_exists(analysis), _gap_collapses(analysis, drawn), _depth(), _order(analysis, drawn)]
    return [finite(asdict(claim)) for claim in found]


def finite(entry: Any) -> Any:
    """The same with null for what is not a number, as JSON has it."""
    if isinstance(entry, dict):
        return {name: finite(value) for name, value in entry.items()}
    if isinstance(entry, list):
        values = [finite(value) for value in entry]
        return None if values and all(value is None for value in values) else values
    return None if isinstance(entry, float) and not np.isfinite(entry) else entry


def side(interval: list[float] | None, threshold: float = 0.0) -> str:
    """Verdict of an interval: wholly above the threshold, not above it anywhere, or neither."""
    if interval is None or not np.all(np.isfinite(interval)):
        return "undecided"
    low, high = interval
    return "holds" if low > threshold else "does not hold" if high <= threshold else "undecided"


def _interval(point, draws) -> list[float]:
    low, high = basic_interval(np.asarray(point), np.asarray(draws))
    return [float(low), float(high)]


def _gap(analysis: xr.Dataset, source: str) -> tuple[float, list[float]]:
    at = analysis.sel(source=source).isel(coupling=0)
    return float(at.gap), [float(v) for v in at.gap_interval]


def _gap_exists(analysis: xr.Dataset) -> Claim:
    value, interval = _gap(analysis, "network")
    steps = float(analysis.gap_steps.sel(source="network").isel(coupling=0))
    blank, blank_interval = _gap(analysis, "untrained")
    exact, _ = _gap(analysis, "wiener")
    theory = float(analysis.gap.sel(source="wiener theory").isel(coupling=0))
    measured, measured_interval = _gap(analysis, "measured gain")
    return Claim(
        1,
        "The synchronization gap is there without coupling",
        side(interval),
        "gap at g = 0, nats of log-SNR",
        value,
        interval,
        f"Uncoupled, the highest band commits {value:.2f} nats ({steps:.1f} sampler steps) after the lowest.",
        [
            Control(
                "untrained network",
                blank,
                blank_interval,
                side(blank_interval) == "holds",
                f"The same architecture with random weights: {100 * blank / value:.0f} % of the network's gap.",
            ),
            Control(
                "Wiener denoiser",
                exact,
                None,
                None,
                f"An exact denoiser of the same spectrum; its own theory says {theory:.2f}.",
            ),
            Control(
                "theory with the measured gain",
                measured,
                measured_interval,
                None,
                "The exact recursion of the sampler under the network's one-pass gain, nothing fitted.",
            ),
        ],
    )


def _ratio(analysis: xr.Dataset, drawn: dict, source: str) -> tuple[float, list[float]]:
    gap = analysis.gap.sel(source=source).values
    gap, draws = gap[np.isfinite(gap)], drawn[source]["gap"]
    draws = draws[:, np.isfinite(draws).all(0)]  # a source may lack couplings, or have nothing left at the strongest
    if min(gap.size, draws.shape[1]) < 2:
        return np.nan, [np.nan, np.nan]
    return float(gap[-1] / gap[0]), _interval(gap[-1] / gap[0], draws[:, -1] / draws[:, 0])


def _collapsed(interval: list[float]) -> str:
    low, high = interval
    if low > -COLLAPSED and high < COLLAPSED:
        return "holds"
    return "does not hold" if low >= COLLAPSED or high <= -COLLAPSED else "undecided"


def _gap_collapses(analysis: xr.Dataset, drawn: dict) -> Claim:
    strongest = float(analysis.coupling[-1])
    value, interval = _ratio(analysis, drawn, "network")
    network = analysis.sel(source="network").isel(coupling=-1)
    low, high = (float(network.decided[analysis.attrs[name]]) for name in ("low_band", "high_band"))
    _, blank_gap = _gap(analysis, "untrained")
    controls = []
    if side(blank_gap) == "holds":
        blank, blank_interval = _ratio(analysis, drawn, "untrained")
        controls.append(
            Control(
                "untrained network",
                blank,
                blank_interval,
                _collapsed(blank_interval) == "holds",
                "The same ratio.",
            )
        )
    else:
        controls.append(Control("untrained network", None, None, None, "It has no gap at g = 0 that could collapse."))
    for source, text in (
        ("measured gain", "The exact recursion under the network's one-pass gain."),
        ("ideal gain", "The ideal model, where coupling removes individuality but leaves the timing gap."),
    ):
        ratio, ratio_interval = _ratio(analysis, drawn, source)
        controls.append(Control(f"theory: {source}", ratio, ratio_interval, None, text))
    return Claim(
        2,
        "The gap collapses under strong coupling",
        _collapsed(interval),
        f"gap at g = {strongest:g} as a share of the gap at g = 0",
        value,
        interval,
        f"At g = {strongest:g} the gap is {value:+.2f} times what it is uncoupled; collapsed means less than "
        f"{COLLAPSED:g} either way. Of what each band decides uncoupled, the replicas still decide individually "
        f"{100 * low:.1f} % in the lowest band and {100 * high:.1f} % in the highest.",
        controls,
    )


def _depth() -> Claim:
    return Claim(
        3,
        "The gap is localised in the last layers",
        "not tested",
        "commitment by layer",
        None,
        None,
        "This run reads the network's output only; depth is a question of its own.",
    )


def _order(analysis: xr.Dataset, drawn: dict) -> Claim:
    def control(name, levels, draws, text):
        value = float(order(levels))
        interval = [float(v) for v in np.clip(_interval(value, order(draws)), -1, 1)]
        return Control(name, value, interval, side(interval) == "holds", text)

    levels = analysis.tau.sel(source="network").isel(coupling=0).values
    network = control("network", levels, drawn["network"]["tau"][:, 0], "")
    shuffled = drawn["shuffled bands"]
    share = float(np.mean(drawn["network"]["gap"][:, 0] > 0))
    blank = analysis.tau.sel(source="untrained").isel(coupling=0).values
    return Claim(
        4,
        "Low, global frequencies commit before high, local ones",
        side(network.interval),
        "Kendall's tau-b of commitment level against frequency, DC left out, g = 0",
        network.value,
        network.interval,
        f"In {100 * share:.1f} % of the resampled runs the lowest band commits before the highest.",
        [
            control(
                "shuffled bands",
                shuffled["point"]["tau"][0],
                shuffled["tau"][:, 0],
                "The same trajectories, coefficients assigned to bands at random.",
            ),
            control(
                "untrained network",
                blank,
                drawn["untrained"]["tau"][:, 0],
                f"The same architecture with random weights; its levels span {np.ptp(blank):.3f} nats in all.",
            ),
        ],
    )
