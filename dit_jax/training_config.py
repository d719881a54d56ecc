"""How a model is trained: the settings, and the schedule of the learning rate that follows from them."""

import dataclasses
import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import optax

from dit_jax.training_run import Extensions, training_entries


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. A run is resumed with the same settings; only `steps` may be larger.

    Raises:
      ValueError: a setting is out of its domain, or not finite.
    """

    steps: int = 6000
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 300
    decay_fraction: float = 0.25  # share of the steps, at the end, over which the rate falls linearly to zero
    weight_decay: float = 0.01
    beta2: float = 0.99
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    label_dropout: float = 0.1
    flip: bool = True
    weight_cap: float = 1.0  # epsilon only: loss weight min(1 + 1/SNR, cap); 1 is the official, unweighted loss
    seed: int = 0
    extensions: Extensions = ()  # how a run was made longer: (step at which, steps that it had before)

    def __post_init__(self) -> None:
        for name, fits, domain in (
            ("steps", self.steps >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "positive and finite"),
            ("warmup_steps", self.warmup_steps >= 0, "at least 0"),
            ("decay_fraction", 0 < self.decay_fraction <= 1, "in (0, 1]"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0 and finite"),
            ("beta2", 0 <= self.beta2 < 1, "in [0, 1)"),
            ("clip_norm", self.clip_norm > 0, "positive"),
            ("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)"),
            ("label_dropout", 0 <= self.label_dropout < 1, "in [0, 1)"),
            ("weight_cap", 0 < self.weight_cap < math.inf, "positive and finite"),
            ("seed", 0 <= self.seed < 2**32, "a whole number from 0 to 2^32 - 1"),
        ):
            if not fits:
                raise ValueError(f"{name} must be {domain}, got {getattr(self, name)}")

    def to_dict(self) -> dict:
        """All entries; extensions only if there are any."""
        entries = dataclasses.asdict(self)
        return training_entries(entries, entries.pop("extensions"))


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up, constant, linear decay to zero at the last step.

    A run that was made longer before its decay has the schedule of one that was as long from the start. One that was
    made longer later goes on from the rate that it had reached: it rises as fast as in the warm-up, to the constant
    rate or to the line of the decay to zero at the new last step.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    decay = max(1, round(config.steps * config.decay_fraction))
    if config.extensions:
        *earlier, (at, planned) = config.extensions
        shorter = dataclasses.replace(config, steps=planned, extensions=tuple(earlier))
        if earlier or at > max(warmup, planned - max(1, round(planned * config.decay_fraction))):
            return _longer(learning_rate(shorter), at, config.steps, peak, peak / max(1, warmup), peak / decay)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, warmup),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.0, decay),
        ],
        [warmup, max(warmup, config.steps - decay)],
    )


def _longer(before: optax.Schedule, at: int, steps: int, peak: float, rising: float, falling: float) -> optax.Schedule:
    """The schedule `before` up to step `at`; from there without a jump, at these slopes, to zero at `steps`."""
    reached = float(np.asarray(before(at)))

    def schedule(step):
        rate = jnp.minimum(reached + rising * (step - at), jnp.maximum(falling * (steps - step), 0.0))
        return jnp.where(step < at, before(step), jnp.minimum(rate, peak))

    return schedule
