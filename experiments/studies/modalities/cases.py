"""The cases of the study of two modalities, and what theory says of each (docs/theory.md, section 13.10)."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import root_scalar

from ou_theory import process as ou
from ou_theory.cluster_laws import Clusters
from ou_theory.schedules import scheduled_noise, scheduled_time
from ou_theory.speciation import speciation_time

B = 1.0  # relaxation rate of a modality alone; the noise strength is 1
CENTRE, WIDTH = 2.0, 0.25  # of a mode's two clusters: centre, and variance within
SPREAD = CENTRE**2 - WIDTH
MODES = ("common", "difference")


def pair_of_clusters() -> Clusters:
    """Common and difference mode, each in two clusters of its own."""
    return Clusters(jnp.full(2, WIDTH), CENTRE * jnp.eye(2))


# --- a symmetric pair

COUPLINGS = np.array([0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9])


def mode_rates(g: float) -> np.ndarray:
    """Relaxation rates (2,) of the common and the difference mode."""
    return np.array([B - g, B + g])


# --- couplings of any symmetry

# what drives what: entries g12 (of the second modality in the first one's drift) and g21, in units of the coupling
KINDS = {
    "symmetric": (1.0, 1.0),
    "first drives second": (0.0, 1.0),
    "second drives first": (1.0, 0.0),
    "rotating": (1.0, -1.0),
}
UNEQUAL = np.array([0.0, 0.4, 0.8, 1.2])
UNEQUAL_LAW = (np.array([CENTRE, 0.0]), np.diag([WIDTH, 1.0]))  # the first modality is clustered


def unequal_process(kind: str, g: float) -> ou.Process:
    """Drift ``[[b, -g12], [-g21, b]]`` of a kind of coupling."""
    g12, g21 = KINDS[kind]
    return ou.Process(jnp.array([[B, -g12 * g], [-g21 * g, B]]), jnp.asarray(1.0))


def unequal_time(kind: str, g: float) -> float:
    """Speciation time by the joint criterion under a kind of coupling."""
    return float(_joint_time(unequal_process(kind, g).drift))


@jax.jit
def _joint_time(drift: jax.Array) -> jax.Array:
    return speciation_time(ou.Process(drift, jnp.asarray(1.0)), *UNEQUAL_LAW)


def plane_of_couplings(reach: float = 2.0, points: int = 41) -> tuple[np.ndarray, np.ndarray]:
    """Couplings (N,) and the time of the joint criterion (N, N) over them, g21 along the first axis; NaN where there is
    no stationary state."""
    axis = np.linspace(-reach, reach, points)
    g12, g21 = (jnp.asarray(v) for v in np.meshgrid(axis, axis))
    drift = jnp.stack(
        [jnp.stack([jnp.full(g12.shape, B), -g12], -1), jnp.stack([-g21, jnp.full(g12.shape, B)], -1)], -2
    )
    times = jax.vmap(jax.vmap(_joint_time))(drift)
    return axis, np.where(np.asarray(g12 * g21) < B**2, np.asarray(times), np.nan)


# --- stored samples

LOAD = 0.3  # alpha: log of the stored samples per mode of a modality
SIZES = np.array([12, 16, 20, 24, 28])
COLLAPSE_COUPLINGS = np.array([0.0, 0.3, 0.6])
SCORES = ("joint", *MODES)  # what the score knows: both modes, or one


# --- a ring of modalities

RING, STRENGTH = 8, 4.0  # modalities around a ring, and the variance of their Gaussian features
RING_COUPLINGS = np.array([0.0, 0.2, 0.4])


def ring_rates(g: float) -> np.ndarray:
    """Rates ``b - 2 g cos(2 pi a / n)`` of the waves around the ring, a = 0..n/2."""
    return B - 2 * g * np.cos(2 * np.pi * np.arange(RING // 2 + 1) / RING)


# --- couplings that change in time

HORIZON, TOTAL = 1.6, 0.48  # time up to which schedules couple, and the integral of their coupling
EDGES = np.linspace(0, HORIZON, 65)


def schedules() -> dict[str, np.ndarray]:
    """Couplings by step of the grid `EDGES`. Those between ``none`` and ``reversed`` have the integral `TOTAL` over
    time; ``reversed`` couples at every noise and yet leaves no gap."""
    middle = (EDGES[1:] + EDGES[:-1]) / 2 / HORIZON
    flat = np.full(middle.size, TOTAL / HORIZON)
    shapes = {
        "none": 0 * flat,
        "constant": flat,
        "clean quarter": 4 * flat * (middle < 0.25),
        "clean half": 2 * flat * (middle < 0.5),
        "noisy half": 2 * flat * (middle >= 0.5),
        "rising with noise": 2 * flat * middle,
    }
    first, strong = middle < 0.2, 2 * TOTAL / HORIZON

    def left(counter):  # gap of a coupling that is reversed beyond the clean fifth
        return float(np.subtract(*schedule_times(np.where(first, strong, -counter))))

    return {**shapes, "reversed": np.where(first, strong, -root_scalar(left, bracket=(0.0, 0.95)).root)}


def schedule_times(g: np.ndarray) -> np.ndarray:
    """Speciation times (2,) of both modes under the couplings (64,) of the steps."""
    return np.asarray(scheduled_time(np.stack([B - g, B + g]), EDGES, np.full(2, SPREAD)), np.float64)


def schedule_noise(g: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Noise (t, 2) of both modes at times that need not be on the grid."""
    grid = np.union1d(EDGES, t)
    inside = np.clip(np.searchsorted(EDGES, (grid[1:] + grid[:-1]) / 2) - 1, 0, g.size - 1)
    noise = np.asarray(scheduled_noise(np.stack([B - g[inside], B + g[inside]]), grid))
    return noise[:, np.searchsorted(grid, t)].T
