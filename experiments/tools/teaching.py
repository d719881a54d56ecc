"""Figures for a first lecture on the theory, each from `ou_theory` alone, and the page that shows them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

from experiments.frame.drawing import FAINT, INK, LEVEL_LABEL, QUIET, draw_figures, new_figure
from experiments.frame.files import write_text
from experiments.frame.page import embedded, templates
from experiments.tools.playground import write_playground
from ou_theory import cloning, cluster_laws, gain_model, landau, process, speciation
from ou_theory.attention import rho
from ou_theory.clock import make_clock
from ou_theory.estimator import commitment, relative_energy
from ou_theory.recursion import recursion_energy

COMMON, DIFFERENCE, THIRD = "#0072B2", "#D55E00", "#009E73"
B, CENTRE2, WIDTH2 = 1.0, 4.0, 0.25  # own rate; square of the clusters' centre, and their variance
SPREAD, FAR = CENTRE2 - WIDTH2, 24.0  # m^2 - s^2; and of clusters far apart
TICKS = (-1, -0.5, 0, 0.5, 1)
RADII = np.arange(1, 7)  # of a power-law spectrum
VARIANCES = 30.0 * RADII**-3.0


def transition() -> Figure:
    """Forward paths of a coupled pair, and the ellipses of its law."""
    figure, (left, right) = new_figure(7.2, 3.3, 1, 2)
    pair, start, times = process.symmetric_pair(B, 0.6), np.array([2.5, -1.0]), np.linspace(0, 4, 201)
    law = process.transition(pair, times)
    mean, spread = np.asarray(law.factor) @ start, np.sqrt(np.diagonal(np.asarray(law.covariance), axis1=1, axis2=2))
    step = process.transition(pair, times[1])
    factor, root = np.asarray(step.factor), np.linalg.cholesky(np.asarray(step.covariance))
    paths = np.empty((len(times), 40, 2))
    paths[0], rng = start, np.random.default_rng(3)
    for k in range(1, len(times)):
        paths[k] = paths[k - 1] @ factor.T + rng.standard_normal((40, 2)) @ root.T
    for i, (color, name) in enumerate(((COMMON, "$x_1$"), (DIFFERENCE, "$x_2$"))):
        left.plot(times, paths[:, 0, i], color=color, linewidth=0.9, alpha=0.8)
        left.fill_between(times, mean[:, i] - spread[:, i], mean[:, i] + spread[:, i], color=color, alpha=0.15)
        left.plot(times, mean[:, i], color=color, linestyle="--", label=name)
    left.set(xlabel="time $t$", ylabel="replica", title="One pair of paths, mean and one standard deviation")
    left.legend()
    shades = colormaps["viridis"](np.linspace(0, 0.85, 4))
    for t, color in zip((0.1, 0.4, 1.2, 4.0), shades, strict=True):
        k = int(np.searchsorted(times, t))
        value, vector = np.linalg.eigh(np.asarray(law.covariance)[k])
        angle = np.degrees(np.arctan2(vector[1, 1], vector[0, 1]))
        size = 4 * np.sqrt(value)
        ellipse = Ellipse(tuple(mean[k]), size[1], size[0], angle=angle, fill=False, color=color, linewidth=1.6)
        right.add_patch(ellipse)
        right.plot(*paths[k].T, ".", color=color, markersize=3)
        right.plot([], [], color=color, label=f"$t$ = {t:g}")
    right.plot(*start, "k+")
    right.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal", xlim=(-4.2, 4.6), ylim=(-4.2, 4.2))
    right.set_title("Two standard deviations, 40 pairs")
    right.legend(loc="upper left", fontsize=7.5)
    return figure


def eigenmodes() -> Figure:
    """Rates and stationary variances of the modes of a symmetric pair."""
    figure, (left, right) = new_figure(7.2, 3.0, 1, 2)
    g = np.linspace(-0.95, 0.95, 191)
    for sign, color, name in ((-1, COMMON, "common mode $u$"), (1, DIFFERENCE, "difference mode $v$")):
        rate = B + sign * g
        left.plot(g, rate, color=color, label=name)
        right.plot(g, 1 / rate, color=color)
    left.axhline(0, color=FAINT, linewidth=0.8)
    for ax in (left, right):
        ax.set_xticks(TICKS)
    left.set(xlabel="coupling $g$", ylabel="relaxation rate $\\lambda$", title="$\\lambda_{u,v} = b \\mp g$,  $b = 1$")
    left.legend()
    right.set(xlabel="coupling $g$", ylabel="stationary variance", title="$D / \\lambda$", ylim=(0, 8))
    return figure


def pitchfork() -> Figure:
    """The potential of a mode at four times, and the position of its minima."""
    figure, (left, right) = new_figure(7.2, 3.3, 1, 2)
    centre, onset = np.sqrt(CENTRE2), float(speciation.mode_speciation_time(np.sqrt(CENTRE2), WIDTH2))
    x = np.linspace(-3, 3, 301)
    shades = colormaps["viridis"](np.linspace(0, 0.85, 4))
    for t, color in zip((onset + 0.5, onset, onset - 0.25, onset - 0.5), shades, strict=True):
        moved, spread = centre * np.exp(-t), WIDTH2 * np.exp(-2 * t) + float(process.mode_variance(1.0, t))
        potential = x**2 / (2 * spread) - np.logaddexp(moved * x / spread, -moved * x / spread)
        left.plot(x, potential - potential.min(), color=color, label=f"$t$ = {t:.2f}")
    left.set(xlabel="$x$", ylabel="$-\\ln p_t(x)$ + constant", ylim=(-0.1, 3), title="One well becomes two")
    left.legend(loc="upper center", fontsize=7.5)
    t = np.linspace(0, 2 * onset, 400)
    maximum = np.asarray(landau.branch(centre, WIDTH2, 1.0, t))
    near = np.linspace(onset - 0.35, onset, 60)
    slope = float(landau.onset_slope(centre, WIDTH2))
    for sign in (1, -1):
        right.plot(t, sign * maximum, color=COMMON, label="minima" if sign > 0 else None)
        amplitude = sign * centre * np.exp(-near) * np.sqrt(slope * (onset - near))
        right.plot(near, amplitude, color=INK, linestyle="--", linewidth=1.1, label="Landau" if sign > 0 else None)
    right.plot(t[t < onset], 0 * t[t < onset], color=QUIET, linestyle=":", label="unstable")
    right.axvline(onset, color=FAINT, linewidth=0.8)
    right.set(xlabel="time $t$   (generation $\\leftarrow$)", ylabel="$x^*$", title=f"Speciation at $t$ = {onset:.2f}")
    right.legend()
    return figure


def speciation_times() -> Figure:
    """Times of both modes against the coupling, and the gap with its limits."""
    figure, (left, right) = new_figure(7.2, 3.2, 1, 2)
    g = np.linspace(-0.99, 0.99, 397)
    for sign, color, name in ((-1, COMMON, "common mode"), (1, DIFFERENCE, "difference mode")):
        left.plot(g, np.asarray(process.transition_time(B + sign * g, SPREAD)), color=color, label=name)
    left.set_xticks(TICKS)
    left.set(xlabel="coupling $g$", ylabel="speciation time", title="A slower mode speciates earlier in generation")
    left.legend(loc="upper center")
    g = np.linspace(0, 0.999, 400)
    right.plot(g, np.asarray(speciation.speciation_gap(B, g, FAR, FAR)), color=INK, label="exact")
    right.plot(g, np.asarray(speciation.gap_small_coupling(B, g, FAR)), color=THIRD, linestyle="--", label="small $g$")
    large = np.asarray(speciation.gap_large_spread(B, g, FAR))
    right.plot(g, large, color=DIFFERENCE, linestyle=":", label="far clusters")
    right.plot(1, float(speciation.gap_at_bound(B, FAR)), "o", color=INK, markersize=4.5)
    right.set(xlabel="coupling $g$", ylabel="gap  $t_u - t_v$", ylim=(0, 12), title=f"$m^2 - s^2$ = {FAR:g}")
    right.legend()
    return figure


def cloning_curves() -> Figure:
    """Correlation of two clones at the end, for a Gaussian mode and for clusters of the same variance."""
    figure, ax = new_figure(7.2, 3.2)
    ell = np.linspace(-6, 8, 281)
    sigma2 = np.exp(-ell)
    total = CENTRE2 + WIDTH2
    ax.plot(ell, np.asarray(gain_model.q_uncoupled(total / sigma2)), color=INK, linestyle="--", label="Gaussian mode")
    law = cluster_laws.Clusters(jnp.array([WIDTH2]), jnp.array([[np.sqrt(CENTRE2)]]))
    found = np.asarray(cloning.clone_correlation(law, jnp.asarray(sigma2)))[:, 0]
    ax.plot(ell, found, color=COMMON, label="two clusters")
    same = np.asarray(cloning.same_cluster_probability(law.kappa(jnp.asarray(sigma2))[:, 0]))
    ax.plot(ell, same, color=DIFFERENCE, label="two clusters: probability of the same one")
    ax.axvline(-np.log(SPREAD), color=QUIET, linewidth=0.9)
    ax.annotate("speciation", (-np.log(SPREAD), 0.93), xytext=(-58, 0), textcoords="offset points", color=QUIET)
    ax.axhline(0.5, color=FAINT, linewidth=0.8)
    ax.set(xlabel=LEVEL_LABEL, ylabel="correlation of the ends", ylim=(0, 1.02))
    ax.legend(loc="lower right")
    return figure


def commitment_by_band() -> Figure:
    """Curves and levels of a power-law spectrum, continuum and sampler."""
    figure, ax = new_figure(7.2, 3.2)
    clock = make_clock(50)
    ell = np.linspace(-6, clock.log_snr[-1], 300)
    tau = np.asarray(_estimate(clock, 1.0).level)
    energy = np.asarray(_energy(clock, 1.0))
    shades = colormaps["viridis"](np.linspace(0, 0.88, len(RADII)))
    for i, color in enumerate(shades):
        ax.plot(ell, np.asarray(gain_model.q_uncoupled(VARIANCES[i] * np.exp(ell))), color=color, linestyle="--")
        ax.plot(clock.log_snr, energy[:, i] / energy[-1, i], ".", color=color, markersize=4)
        ax.plot(tau[i], -0.045, "^", color=color, markersize=7, clip_on=False, label=f"$k$ = {RADII[i]}")
    ax.axhline(0.5, color=FAINT, linewidth=0.8)
    ax.set(xlabel=LEVEL_LABEL, ylabel="share decided, $Q$", xlim=(-6, 9.3), ylim=(-0.05, 1.02))
    ax.legend(ncols=2, loc="lower right", title="frequency")
    return figure


def gap_against_gate() -> Figure:
    """A constant gain keeps the timing gap and lowers the decided share."""
    figure, (left, right) = new_figure(7.2, 3.2, 1, 2)
    gates = np.concatenate([np.linspace(0, 0.1, 21), np.linspace(0.12, 0.95, 30)])
    clock = make_clock(50)
    gains = rho(jnp.asarray(gates))
    found = [_estimate(clock, float(gain)) for gain in gains]
    timing = [float(one.level[-1] - one.level[0]) for one in found]
    latched = [float(one.latched[-1] - one.latched[0]) for one in found]
    left.plot(gates, timing, color=COMMON, label="timing  $\\Gamma_\\tau$")
    left.plot(gates, latched, color=DIFFERENCE, label="latched, all counted")
    left.axhline(np.log(VARIANCES[0] / VARIANCES[-1]), color=QUIET, linestyle="--", linewidth=1.1, label="continuum")
    left.set(xlabel="attention gate $g$", ylabel="gap (nats)", ylim=(0, None), title="Gap, 50 DDIM steps")
    left.legend(loc="center right")
    for flow, color, name in ((gain_model.w_ode, COMMON, "flow"), (gain_model.w_sde, DIFFERENCE, "SDE")):
        right.plot(gates, np.asarray(flow(gains)), color=color, label=name)
    right.plot(gates, np.asarray(gains) ** 2, color=QUIET, linestyle="--", linewidth=1.1, label="$\\rho^2$")
    right.set(xlabel="attention gate $g$", ylabel="share ever decided individually", title="$w(\\rho)$")
    right.legend()
    return figure


def discrete_sampler() -> Figure:
    """A sampler of few steps changes the curves, and biases the half-energy step."""
    figure, (left, right) = new_figure(7.2, 3.2, 1, 2)
    variance = np.array([1.0])
    ell = np.linspace(-6, 8, 200)
    left.plot(ell, np.asarray(gain_model.q_uncoupled(np.exp(ell))), color=INK, linestyle="--", label="continuum")
    for steps, color in ((10, DIFFERENCE), (20, THIRD), (50, COMMON)):
        clock = make_clock(steps)
        energy = np.asarray(_energy(clock, 1.0, variance))[:, 0]
        left.plot(clock.log_snr, energy / energy[-1], "o-", color=color, markersize=3, label=f"{steps} steps")
    left.set(xlabel=LEVEL_LABEL, ylabel="$Q$, relative to the sampler's end", xlim=(-6, 8), title="DDIM, $S = 1$")
    left.legend()
    variances = np.geomspace(0.01, 100, 33)
    for steps, color in ((20, THIRD), (50, COMMON), (250, INK)):
        for eta, style in ((0.0, "-"), (1.0, ":")):
            bias = cloning.half_energy_bias(make_clock(steps), variances, eta)
            name = f"{steps} steps" + (", ancestral" if eta else "")
            right.semilogx(variances, bias, color=color, linestyle=style, label=name)
    right.set(xlabel="variance $S$ of the mode", ylabel="steps", title="Half of the energy, against SNR = 1")
    right.legend(fontsize=7)
    return figure


def _energy(clock, gain: float, variances: np.ndarray = VARIANCES) -> jax.Array:
    """Exact difference energies (K, B) under DDIM with the gain `gain` on Wiener filters."""
    gains = gain * gain_model.wiener_gain(jnp.asarray(variances), jnp.asarray(clock.sigma[:, None] ** 2))
    return recursion_energy(gains, jnp.asarray(clock.sigma), jnp.asarray(variances + clock.sigma[0] ** 2))


def _estimate(clock, gain: float):
    q = relative_energy(_energy(clock, gain), _energy(clock, 1.0)[-1])
    return commitment(q, clock.log_snr)


@dataclass(frozen=True)
class Lesson:
    """A figure of the page."""

    draw: Callable[[], Figure]
    title: str
    caption: str  # two lines: what is shown, what it means
    section: str  # of docs/theory.md


LESSONS = {
    "transition": Lesson(
        transition,
        "Two coupled replicas",
        "Two replicas forget where they started and pull on each other while noise is added. "
        "Coupling makes their joint law wider along the common mode and narrower along the difference mode.",
        "12.1",
    ),
    "eigenmodes": Lesson(
        eigenmodes,
        "Two modes, two rates",
        "Sum and difference of the replicas do not mix: the sum relaxes with b - g, the difference with b + g. "
        "A slow mode gathers more noise, and where its rate falls to 0 it has no stationary state.",
        "12.1",
    ),
    "pitchfork": Lesson(
        pitchfork,
        "Speciation is a pitchfork",
        "Run backwards, the potential of a mode with two clusters turns from one well into two. "
        "Its minima leave 0 like the magnetisation of an Ising magnet as it cools below its critical point.",
        "13.2",
    ),
    "speciation": Lesson(
        speciation_times,
        "Coupling opens a gap",
        "With the same clusters in both modes, the slow mode speciates at more noise, earlier in generation. "
        "The gap grows with the coupling and stays finite at g = b; the formula for far clusters diverges there.",
        "13.3",
    ),
    "cloning": Lesson(
        cloning_curves,
        "Clones tell when a feature is decided",
        "Two clones branch at a level and continue independently: their ends have correlation 1 - mmse / Var. "
        "Clusters are decided earlier than a Gaussian mode of the same variance, and near their speciation.",
        "4.1",
    ),
    "commitment": Lesson(
        commitment_by_band,
        "Low frequencies commit first",
        "Photographs have large variance at low frequencies, and a band commits where signal equals noise. "
        "Dashed: continuum; dots: a sampler of 50 steps; triangles: the levels that the estimator gives.",
        "7.2",
    ),
    "gap": Lesson(
        gap_against_gate,
        "What a gate does, and does not",
        "One gain for all bands lowers every curve alike: less is decided individually, at the same gaps. "
        "If a network's gap closes under coupling, its gain must depend on the band.",
        "5.2",
    ),
    "sampler": Lesson(
        discrete_sampler,
        "A sampler is not the continuum",
        "With few steps a mode reaches half of its energy earlier than where signal equals noise. "
        "The bias is between a fraction of a step and two steps for any number of steps, so theory uses the recursion.",
        "5.3",
    ),
}


def theory(out: str | Path) -> Path:
    """Draws all figures and writes ``theory.html`` and the interactive ``playground.html`` into the folder `out`, each
    self-contained; returns the path of the first."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with jax.enable_x64(True):
        draw_figures(out / "figures", {name: lesson.draw for name, lesson in LESSONS.items()})
    sources = {name: embedded(out / "figures" / f"{name}.svg") for name in LESSONS}
    template = templates(Path(__file__).parent).get_template("theory.html")
    write_playground(out / "playground.html")
    return write_text(out / "theory.html", template.render(lessons=LESSONS, sources=sources))
