"""Sampling: denoisers, guidance, DDIM and ancestral steps on a respaced clock, and one `sample` with an observer.

A denoiser is a plain callable ``(x, step, labels) -> DenoiserOutput``: the predicted clean image and, if the denoiser
knows one, the variance of the ancestral step. The network, an exact posterior mean and a Wiener filter are denoisers.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.attention import GateKind, Implementation
from dit_jax.controls import Network
from dit_jax.model import Edit, Tap
from dit_jax.objective import at_step, denoised_at, network_input, posterior_tables
from ou_theory.clock import Clock

GuidedChannels = Literal["official", "all"]
GuidedCoupling = Literal["both", "conditional"]
Sampler = Literal["ddim", "ancestral"]
WITHOUT_GUIDANCE = "run it with guidance 1"


class DenoiserOutput(NamedTuple):
    """What a denoiser returns. Both arrays have the shape of the state."""

    denoised: jax.Array  # predicted clean image x0
    fraction: jax.Array | None = None  # of the step's log-variance between the posterior's (0) and log beta (1)
    taps: Any = None  # what else an observer is given; under guidance of the doubled batch, see `guided_output`


Denoiser = Callable[[jax.Array, jax.Array, jax.Array], DenoiserOutput]
Observer = Callable[..., Any]
Step = Callable[[jax.Array, jax.Array, DenoiserOutput, jax.Array | None], jax.Array]


def doubles(guidance: float | jax.Array) -> bool:
    """Whether classifier-free guidance of this scale needs both the label's and the null label's output. A scale of 1
    is the label's alone, and one of 0 the null label's alone, with the variance that the network learned for it. An
    array, whose value may not be known yet, needs both."""
    return isinstance(guidance, jax.Array) or guidance not in (0.0, 1.0)


def guide(conditional: jax.Array, null: jax.Array, scale, channels: int) -> jax.Array:
    """Classifier-free guidance of raw outputs (..., C_out): the first `channels` channels become
    ``null + scale (conditional - null)``, the others stay those of `conditional`."""
    guided = null[..., :channels] + scale * (conditional[..., :channels] - null[..., :channels])
    return jnp.concatenate([guided, conditional[..., channels:]], -1)


def guided_output(
    model: Network,
    x: jax.Array,
    t: jax.Array,
    y: jax.Array,
    gate: jax.Array | None = None,
    *,
    scale: float | jax.Array,
    channels: GuidedChannels = "all",
    guided_coupling: GuidedCoupling = "both",
    **options: Any,
) -> Any:
    """Network output under classifier-free guidance, from one batch of twice the size.

    Args:
      x, t, y, gate: as `DiT.__call__`.
      scale: guidance scale; 1 gives the conditional output.
      channels: ``"official"`` guides the first three channels only, as the released sampling code does (an accident
        that its authors keep for reproducibility); ``"all"`` guides every image channel.
      guided_coupling: which halves of the doubled batch the gate couples: ``"both"``, or ``"conditional"`` only.
      options: further arguments of `DiT.__call__`. A tap sees the doubled batch, in which image n has its conditional
        half at 2 n and its null half at 2 n + 1. (So both halves of an image stay on one device where a mesh splits the
        batch.)

    Returns:
      the guided output, of the shape that `DiT.__call__` returns; with a tap, a tuple of that and the taps.

    Raises:
      ValueError: unknown `channels` or `guided_coupling`, or the network has no null label.
    """
    model.config.need_null_label("classifier-free guidance", WITHOUT_GUIDANCE)
    if channels not in ("official", "all"):
        raise ValueError(f"guided channels {channels!r} are not one of official, all")
    if guided_coupling not in ("both", "conditional"):
        raise ValueError(f"guided coupling {guided_coupling!r} is not one of both, conditional")
    axis = x.ndim - 4
    null = jnp.full_like(y, model.config.num_classes)
    if gate is not None and guided_coupling == "conditional":
        gate = jnp.broadcast_to(gate, (*gate.shape[:-3], len(y), *gate.shape[-2:]))
        closed = jnp.broadcast_to(jnp.eye(gate.shape[-1], dtype=gate.dtype), gate.shape)
        gate = _interleaved(gate, closed, gate.ndim - 3)
    elif gate is not None and gate.ndim > 2 and gate.shape[-3] > 1:
        gate = _interleaved(gate, gate, gate.ndim - 3)
    out = model(_interleaved(x, x, axis), _interleaved(t, t), _interleaved(y, null), gate, **options)
    out, *taps = out if isinstance(out, tuple) else (out,)
    halves = out.reshape(*x.shape[: axis + 1], 2, *out.shape[axis + 1 :])
    conditional, unconditional = jnp.moveaxis(halves, axis + 1, 0)
    count = model.config.in_channels if channels == "all" else min(3, model.config.in_channels)
    out = guide(conditional, unconditional, scale, count)
    return (out, *taps) if taps else out


def _interleaved(a: jax.Array, b: jax.Array, axis: int = 0) -> jax.Array:
    """Two arrays joined along an axis in turn: a[0], b[0], a[1], ..."""
    return jnp.stack([a, b], axis + 1).reshape(*a.shape[:axis], -1, *a.shape[axis + 1 :])


def network_denoiser(
    model: Network,
    clock: Clock,
    gate: jax.Array | None = None,
    *,
    kind: GateKind = "joint",
    attention: Implementation = "auto",
    guidance: float | jax.Array = 1.0,
    channels: GuidedChannels = "all",
    guided_coupling: GuidedCoupling = "both",
    tap: Tap | None = None,
    edit: Edit | None = None,
) -> Denoiser:
    """The denoiser of a network: state (N, H, W, C) or (R, N, H, W, C), labels (N,).

    States are variance-preserving, also of a network that was trained on a path of flow matching: it is given the state
    times `Clock.scale`, and `Clock.timesteps` of the step. Build the denoiser inside the jitted function
    that uses it, so that weights and gate are arguments of the compiled program and not constants in it.

    Args:
      gate: as in `DiT.__call__`, or (n, layers, pairs, R, R) with a gate for each of the n steps of the clock. None for
        the networks of `dit_jax.controls`, which have no attention to couple in.
      kind, attention, tap, edit: see `DiT.__call__`. The taps come back as `DenoiserOutput.taps`. For an edit that
        depends on the step, write a denoiser that builds this one with the edit of its step.
      guidance: scale of classifier-free guidance; 1 is without, and 0 is the null label alone, whatever the labels.
        Neither needs a doubled batch. An array, which may be traced, always has one.
      channels, guided_coupling: see `guided_output`; of no effect at 0 and 1.

    Raises:
      ValueError: a gate by step is not as long as the clock; the clock is of another path than the network's;
        a network without a null label is to be guided.
    """
    timesteps = np.asarray(clock.timesteps)
    config = model.config
    path = "ddpm" if clock.path is None else clock.path.name
    if path != config.path:
        raise ValueError(f"the clock is of the path {path}, the network of {config.path}: use model.config.clock")
    if isinstance(guidance, jax.Array) or guidance != 1.0:
        scale = "" if isinstance(guidance, jax.Array) else f" {guidance:g}"
        config.need_null_label(f"guidance{scale}", WITHOUT_GUIDANCE)
    if gate is not None and gate.ndim == 5 and gate.shape[0] not in (1, len(clock)):
        raise ValueError(f"the gate has {gate.shape[0]} steps, the clock {len(clock)}")
    options: dict[str, Any] = {"kind": kind, "attention": attention, "tap": tap, "edit": edit}
    if doubles(guidance):
        options.update(scale=guidance, channels=channels, guided_coupling=guided_coupling)

    is_null = not isinstance(guidance, jax.Array) and guidance == 0.0

    def denoise(x: jax.Array, step: jax.Array, labels: jax.Array) -> DenoiserOutput:
        t = jnp.full(labels.shape, jnp.asarray(timesteps)[step])
        inputs, now = network_input(x, step, clock), gate
        y = jnp.full_like(labels, config.num_classes) if is_null else labels
        if gate is not None and gate.ndim == 5:
            now = gate[0] if gate.shape[0] == 1 else gate[step]
        found = (
            guided_output(model, inputs, t, y, now, **options)
            if doubles(guidance)
            else model(inputs, t, y, now, **options)
        )
        out, taps = found if tap is not None else (found, None)
        out = out.astype(x.dtype)
        denoised = denoised_at(clock, step, x, out[..., : config.in_channels], config.prediction)
        fraction = (out[..., config.in_channels :] + 1) / 2 if config.learn_sigma else None
        return DenoiserOutput(denoised, fraction, taps)

    return denoise


def ddim_step(clock: Clock, eta: float = 0.0) -> Step:
    """The DDIM update (Song et al., arXiv 2010.02502). With `eta` = 1 it has the posterior variance; it never uses a
    learned one."""
    ab, after = clock.alpha_bar, clock.alpha_bar_next
    spread = eta * np.sqrt((1 - after) / (1 - ab) * (1 - ab / after))
    from_x, from_x0 = np.sqrt(1 / ab), np.sqrt(1 / ab - 1)
    keep, direction = np.sqrt(after), np.sqrt(np.maximum(1 - after - spread**2, 0))

    def update(step, x, found, noise):
        x0 = found.denoised
        epsilon = (at_step(from_x, step, x) * x - x0) / at_step(from_x0, step, x)
        mean = at_step(keep, step, x) * x0 + at_step(direction, step, x) * epsilon
        return mean if noise is None else mean + at_step(spread, step, x) * noise

    return update


def ancestral_step(clock: Clock) -> Step:
    """The DDPM update: a draw from the Gaussian posterior of the next state. Its variance is the learned one if the
    denoiser gives a `fraction`, else the posterior's; the last step adds no noise (theory, eq. 2.7)."""
    weight_x0, weight_x, low, high = posterior_tables(clock)
    noisy = np.append(np.ones(len(clock) - 1), 0.0)

    def update(step, x, found, noise):
        mean = at_step(weight_x0, step, x) * found.denoised + at_step(weight_x, step, x) * x
        log_variance = at_step(low, step, x)
        if found.fraction is not None:
            log_variance = found.fraction * at_step(high, step, x) + (1 - found.fraction) * log_variance
        return mean + at_step(noisy, step, x) * jnp.exp(0.5 * log_variance) * noise

    return update


def sample(
    denoiser: Denoiser,
    x: jax.Array,
    clock: Clock,
    labels: jax.Array,
    *,
    sampler: Sampler = "ddim",
    eta: float = 0.0,
    noise: Callable[[jax.Array], jax.Array] | None = None,
    clip: float | None = None,
    observe: Observer | None = None,
) -> tuple[jax.Array, Any]:
    """Runs the reverse process as one `lax.scan`.

    Args:
      denoiser: see the module docstring.
      x: initial noise, of any shape that the denoiser takes.
      clock: n noise levels.
      labels: passed to the denoiser.
      sampler: ``"ddim"`` or ``"ancestral"``.
      eta: stochasticity of DDIM; 0 is deterministic.
      noise: ``noise(step)`` gives unit Gaussian noise of the shape of `x`; needed unless the sampler is DDIM with
        `eta` = 0.
      clip: bound on the absolute value of the predicted clean image; None leaves it alone.
      observe: ``observe(step, x, denoised)`` is called in every step with the state that the denoiser saw, and with
        `DenoiserOutput.taps` as a fourth argument if there are any. What it returns is stacked over steps; nothing else
        is kept.

    Returns:
      the sample, of the shape of `x`, and the observations with a leading axis n (None without an observer).

    Raises:
      ValueError: the sampler is unknown, or it is stochastic and `noise` is missing.
    """
    if sampler not in ("ddim", "ancestral"):
        raise ValueError(f"sampler {sampler!r} is not one of ddim, ancestral")
    stochastic = sampler == "ancestral" or eta > 0
    if stochastic and noise is None:
        raise ValueError(f"sampler {sampler!r} with eta {eta} is stochastic: give noise(step)")
    update = ancestral_step(clock) if sampler == "ancestral" else ddim_step(clock, eta)

    def body(x, step):
        found = denoiser(x, step, labels)
        if clip is not None:
            found = found._replace(denoised=jnp.clip(found.denoised, -clip, clip))
        taps = () if found.taps is None else (found.taps,)
        kept = None if observe is None else observe(step, x, found.denoised, *taps)
        return update(step, x, found, noise(step) if stochastic and noise is not None else None), kept

    return jax.lax.scan(body, x, jnp.arange(len(clock)))
