"""How a model is trained: the settings, and the schedule of the learning rate that follows from them."""

import dataclasses
import math
from dataclasses import dataclass

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

    A run that was made longer goes on from the rate that it had reached. The rate rises from there as fast as in the
    warm-up, is constant, and decays to zero at the new last step; where no decay had begun, that is the schedule of a
    run that was as long from the start.
    """
    decay = max(1, round(config.steps * config.decay_fraction))
    if config.extensions:
        *earlier, (at, planned) = config.extensions
        before = learning_rate(dataclasses.replace(config, steps=planned, extensions=tuple(earlier)))
        reached = float(np.asarray(before(at)))
        risen = at + round((1 - reached / config.learning_rate) * config.warmup_steps)
        falls = max(risen, config.steps - decay)
        return optax.join_schedules(
            [
                before,
                optax.linear_schedule(reached, config.learning_rate, max(1, risen - at)),
                optax.constant_schedule(config.learning_rate),
                optax.linear_schedule(config.learning_rate, 0.0, max(1, config.steps - falls)),
            ],
            [at, risen, falls],
        )
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps),
            optax.constant_schedule(config.learning_rate),
            optax.linear_schedule(config.learning_rate, 0.0, decay),
        ],
        [config.warmup_steps, max(config.warmup_steps, config.steps - decay)],
    )
