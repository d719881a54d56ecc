"""Sampling in the frame and time of a path of flow matching: Euler, Heun, and Euler-Maruyama (docs/theory.md, 2.1).

`dit_jax.diffusion.sample` runs the same networks in the variance-preserving frame of all studies. Here one integrates
``dx/dt = v(x, t)`` on a grid of the path's own time, which may begin at t = 0, where log-SNR is minus infinity. Its
conventions are those of SiT (Ma et al., arXiv 2401.08740). A sampler is one function: `Sampler`, and an entry of
`SAMPLERS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from dit_jax.config import Diffusion, LastStep, NetworkConfig, Prediction
from dit_jax.controls import Network
from dit_jax.diffusion import WITHOUT_GUIDANCE, GuidedChannels, doubles, guided_output
from dit_jax.objective import at_step
from ou_theory.paths import FIRST_TIME, PATHS, FloatArray, ProbabilityPath

LAST_SIZE = 0.04  # of the last step of a stochastic sampler: the noise-free one from t = 0.96 to 1


class Field(NamedTuple):
    """What moves a state, of its shape each: the velocity of the flow, and the score of the state's law."""

    velocity: jax.Array
    score: jax.Array


@dataclass(frozen=True, eq=False)
class Flow:
    """A flow on a grid of times.

    Attributes:
      times: (n + 1,) float64, increasing, or decreasing to go from data to noise: n steps lead from first to last.
      field: ``field(x, k)``, velocity and score of states `x` at time k of the grid.
    """

    path: ProbabilityPath
    times: FloatArray
    field: Callable[[jax.Array, jax.Array], Field]

    @property
    def sizes(self) -> FloatArray:
        """(n,) size of each step."""
        return np.diff(self.times)


Update = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]
Sampler = Callable[[Flow, FloatArray], Update]  # (flow, diffusion at its times) -> (step, state, noise) -> next state


# --- samplers


def euler(flow: Flow, diffusion: FloatArray) -> Update:
    """Euler's method: one evaluation a step."""

    def update(k, x, noise):
        return x + at_step(flow.sizes, k, x) * flow.field(x, k).velocity

    return update


def heun(flow: Flow, diffusion: FloatArray) -> Update:
    """The trapezoidal method of Heun: the mean of the velocities at both ends of an Euler step, two evaluations."""

    def update(k, x, noise):
        size, first = at_step(flow.sizes, k, x), flow.field(x, k).velocity
        second = flow.field(x + size * first, k + 1).velocity
        return x + size / 2 * (first + second)

    return update


def euler_maruyama(flow: Flow, diffusion: FloatArray) -> Update:
    """The method of Euler and Maruyama for ``dx = (v + w score) dt + sqrt(2 w) dW``, which has the law of the flow."""
    spread = np.sqrt(2 * diffusion[:-1] * flow.sizes)

    def update(k, x, noise):
        drift = _drift(flow, diffusion, k, x)
        return x + at_step(flow.sizes, k, x) * drift + at_step(spread, k, x) * noise

    return update


SAMPLERS: dict[str, Sampler] = {"euler": euler, "heun": heun, "sde": euler_maruyama}
STOCHASTIC = ("sde",)


# --- diffusions and last steps


def diffusion_table(path: ProbabilityPath, t: ArrayLike, name: Diffusion, norm: float = 1.0) -> FloatArray:
    """The diffusions w(t) that SiT offers, float64 of the shape of `t`. Each leaves the law of the flow as it is.

    ``"sbdm"`` is the diffusion of the forward process whose noise the path has: infinite where the path has no data.
    """
    t = np.asarray(t, np.float64)
    if name == "sbdm":
        with np.errstate(divide="ignore", invalid="ignore"):
            return norm * path.sigma(t) * _wronskian(path, t) / path.alpha(t)
    forms: dict[str, Callable[[], FloatArray]] = {
        "constant": lambda: np.full_like(t, norm),
        "sigma": lambda: norm * path.sigma(t),
        "linear": lambda: norm * (1 - t),
        "decreasing": lambda: np.square(norm * np.cos(np.pi * t) + 1) / 4,
        "increasing-decreasing": lambda: norm * np.square(np.sin(np.pi * t)),
    }
    if name not in forms:
        raise ValueError(f"diffusion {name!r} is not one of {', '.join(get_args(Diffusion))}")
    return forms[name]()


def _drift(flow: Flow, diffusion: FloatArray, k: jax.Array, x: jax.Array) -> jax.Array:
    velocity, score = flow.field(x, k)
    return velocity + at_step(diffusion, k, x) * score


def _last(flow: Flow, diffusion: FloatArray, x: jax.Array, last_step: LastStep) -> jax.Array:
    """The step without noise from the last time of the grid to t = 1."""
    k = jnp.asarray(len(flow.times) - 1)
    t = flow.times[-1:]
    if last_step == "mean":
        return x + (1 - t[0]) * _drift(flow, diffusion, k, x)
    if last_step == "euler":
        return x + (1 - t[0]) * flow.field(x, k).velocity
    return (x + flow.path.sigma(t)[0] ** 2 * flow.field(x, k).score) / flow.path.alpha(t)[0]


# --- from a network to samples


def flow_times(config: NetworkConfig, steps: int, last_size: float = 0.0) -> FloatArray:
    """SiT's grid of times for a network: ``steps + 1`` of them at equal distances, float64.

    They span [0, 1] for a velocity. Other predictions keep a margin of 1e-3 from an end of the path at which data or
    noise have no weight, and the VP path keeps one from its end, where sigma has no derivative.

    Args:
      last_size: the grid ends this much before t = 1, for a last step without noise.

    Raises:
      ValueError: `steps` is below 1, or the network is not of a path of flow matching.
    """
    path = _path(config)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    whole = config.prediction == "velocity"
    first = 0.0 if whole else path.first_time
    last = 1.0 if whole and path.name != "vp" else 1 - FIRST_TIME
    return np.linspace(first, 1 - last_size if last_size else last, steps + 1)


def field_weights(path: ProbabilityPath, t: ArrayLike, prediction: Prediction) -> tuple[FloatArray, ...]:
    """Velocity and score are linear in the state and the network's output.

    Returns:
      the weights of state and output in the velocity, then in the score: four arrays of the shape of `t`, float64,
      not finite at times at which the prediction does not tell the quantity.
    """
    t = np.asarray(t, np.float64)
    a, s, (a_rate, s_rate) = path.alpha(t), path.sigma(t), path.rates(t)
    wronskian, square = _wronskian(path, t), np.square(path.scale(t))
    none, one = np.zeros_like(t), np.ones_like(t)
    with np.errstate(divide="ignore", invalid="ignore"):
        if prediction == "velocity":
            return none, one, -a_rate / (wronskian * s), a / (wronskian * s)
        if prediction == "score":
            return a_rate / a, s * wronskian / a, none, one
        if prediction == "epsilon":
            return a_rate / a, -wronskian / a, none, -1 / s
        if prediction == "x0":
            return s_rate / s, wronskian / s, -1 / s**2, a / s**2
        return (s_rate * s + a_rate * a) / square, -wronskian / np.sqrt(square), -1 / square, -a / (s * np.sqrt(square))


def network_flow(
    model: Network,
    times: ArrayLike,
    labels: jax.Array,
    *,
    guidance: float = 1.0,
    channels: GuidedChannels = "all",
) -> Flow:
    """The flow of a network for states (N, H, W, C) and labels (N,). Build it inside the jitted function that uses it.

    Args:
      times: see `Flow.times`; those of `flow_times` are SiT's.
      guidance: as in `dit_jax.diffusion.network_denoiser`.
      channels: see `dit_jax.diffusion.guided_output`.

    Raises:
      ValueError: the network is not of a path of flow matching, or has no null label to be guided with; the times are
        no grid in [0, 1], or the network's prediction tells no velocity at one of them at which a step begins.
    """
    config = model.config
    path, times = _path(config), np.asarray(times, np.float64)
    if guidance != 1.0:
        config.need_null_label(f"guidance {guidance:g}", WITHOUT_GUIDANCE)
    inside = times.ndim == 1 and times.size > 1 and times.min() >= 0 and times.max() <= 1
    if not inside or not (np.all(np.diff(times) > 0) or np.all(np.diff(times) < 0)):
        raise ValueError("times of a flow must be two or more in [0, 1], all increasing or all decreasing")
    weights = field_weights(path, times, config.prediction)
    known = np.isfinite(weights[0]) & np.isfinite(weights[1])
    _check_each(known[:-1], times, f"a network that predicts {config.prediction} tells no velocity")

    def field(x: jax.Array, k: jax.Array) -> Field:
        t = jnp.full(labels.shape, jnp.asarray(times)[k])
        y = jnp.full_like(labels, config.num_classes) if guidance == 0.0 else labels
        if doubles(guidance):
            out = guided_output(model, x, t, y, scale=guidance, channels=channels)
        else:
            out = model(x, t, y)
        out = out.astype(x.dtype)[..., : config.in_channels]
        from_x, from_out, score_x, score_out = (at_step(table, k, x) for table in weights)
        return Field(from_x * x + from_out * out, score_x * x + score_out * out)

    return Flow(path, times, field)


def sample_flow(
    flow: Flow,
    x: jax.Array,
    *,
    sampler: str | Sampler = "euler",
    diffusion: Diffusion = "sigma",
    norm: float = 1.0,
    last_step: LastStep | None = None,
    noise: Callable[[jax.Array], jax.Array] | None = None,
    observe: Callable[[jax.Array, jax.Array], Any] | None = None,
) -> tuple[jax.Array, Any]:
    """Runs a flow over its grid as one `lax.scan`.

    Args:
      x: states at the first time, in the frame of the path: unit Gaussian noise at t = 0.
      sampler: a name of `SAMPLERS`, or a function as those.
      diffusion, norm: of a stochastic sampler, see `diffusion_table`.
      last_step: a step without noise from the last time to 1: ``"mean"`` by the drift, ``"euler"`` by the velocity,
        ``"tweedie"`` to the posterior mean; None makes none.
      noise: ``noise(step)`` gives unit Gaussian noise of the shape of `x`; a stochastic sampler needs it.
      observe: ``observe(step, x)`` is called with the state before every step; what it returns is stacked over steps.

    Returns:
      the sample, of the shape of `x`, and the observations (None without an observer).

    Raises:
      ValueError: unknown sampler, diffusion or last step; a stochastic sampler lacks `noise`, or its times decrease;
        the diffusion is infinite at a time of the grid; a last step is to follow a grid that ends at 1.
    """
    if isinstance(sampler, str):
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler {sampler!r} is not one of {', '.join(SAMPLERS)}")
        if sampler in STOCHASTIC and noise is None:
            raise ValueError(f"sampler {sampler!r} is stochastic: give noise(step)")
        if sampler in STOCHASTIC and flow.sizes[0] < 0:
            raise ValueError(f"sampler {sampler!r} runs from noise to data: its times must increase")
    if last_step is not None and last_step not in get_args(LastStep):
        raise ValueError(f"last step {last_step!r} is not one of {', '.join(get_args(LastStep))}")
    if last_step is not None and flow.times[-1] == 1:
        raise ValueError("a last step leads to t = 1, where this grid of times ends already: see flow_times")
    table = diffusion_table(flow.path, flow.times, diffusion, norm)
    if noise is not None:
        _check_each(
            np.isfinite(table[:-1]), flow.times, f"diffusion {diffusion!r} is infinite", ", or take another one"
        )
    update = (SAMPLERS[sampler] if isinstance(sampler, str) else sampler)(flow, table)

    def body(x, step):
        kept = None if observe is None else observe(step, x)
        return update(step, x, None if noise is None else noise(step)), kept

    x, kept = jax.lax.scan(body, x, jnp.arange(len(flow.times) - 1))
    return (x if last_step is None else _last(flow, table, x, last_step)), kept


def _wronskian(path: ProbabilityPath, t: FloatArray) -> FloatArray:
    a_rate, s_rate = path.rates(t)
    return a_rate * path.sigma(t) - path.alpha(t) * s_rate


def _path(config: NetworkConfig) -> ProbabilityPath:
    if config.path == "ddpm":
        raise ValueError(
            "a flow is that of a network on a path of flow matching; this one was trained on the schedule of DDPM: use "
            "the sampler ddim or ancestral"
        )
    return PATHS[config.path]


def _check_each(fine: np.ndarray, times: FloatArray, what: str, else_: str = "") -> None:
    if not fine.all():
        raise ValueError(f"{what} at t = {times[np.argmin(fine)]:g}: leave that time out of the grid{else_}")
