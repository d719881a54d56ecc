"""The exact split of what coupling leaves of one head's difference: routing, keys and queries."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.frame.settings import GateKind
from ou_theory.attention import exact_difference, first_order_difference, pair_weights


class HeadSplit(NamedTuple):
    """What `split_head` finds. The first axis holds `settings.PARTS`, of `cross` `settings.READINGS`."""

    exact: jax.Array  # (4, T, d)
    alone: jax.Array  # (4, T, d) the same without coupling
    error: jax.Array  # (4, T, d) exact minus first order
    cross: jax.Array  # (2, T, d)


def split_head(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, kind: GateKind) -> HeadSplit:
    """Splits the difference ``O_A - O_B`` of one head's outputs.

    The self-only reading assumes that the two replicas read each other with the same pattern. ``cross`` is what it
    leaves out: ``(a_AB - a_BA) V``. It is taken twice: with the weights as they are, and with rows normalised and
    multiplied by their mean mass. The two are the same but under a `joint` gate, where the first one also counts mass
    that moves between a replica's own keys and the other's, which the self part takes back.

    Args:
      q, k, v: (2, T, d) of both replicas.
      g: coupling, a scalar.
      kind: of the gate.
    """

    def rows(parts):
        return jnp.stack([*parts, parts.total])

    exact = rows(exact_difference(q, k, v, g, kind))
    common = [x.mean(0) for x in (q, k, v)]
    differences = [x[0] - x[1] for x in (q, k, v)]
    first = rows(first_order_difference(*common, *differences, g=g, kind=kind))
    weights = pair_weights(q, k, g, kind)
    a, b = weights[0, :, 1], weights[1, :, 0]
    mass = [w.sum(-1, keepdims=True) for w in (a, b)]
    pattern_a, pattern_b = (w / jnp.where(m > 0, m, 1) for w, m in zip((a, b), mass, strict=True))
    cross = jnp.stack([a - b, (mass[0] + mass[1]) / 2 * (pattern_a - pattern_b)]) @ common[2]
    return HeadSplit(exact, rows(exact_difference(q, k, v, jnp.zeros_like(g), kind)), exact - first, cross)
