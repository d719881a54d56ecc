"""The analytic model: when the modes of a diffusion commit, and what coupling does to that. No networks here.

The names of `__all__` are what most uses need; the modules have the rest. Each is imported when it is first asked for,
so that ``import ou_theory`` loads no library.
"""

# ruff: noqa: F401

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers see; at run time the table below is used
    from ou_theory.attention import first_order_difference, rho, rho_n
    from ou_theory.clock import Clock, log_snr, make_clock, ou_time, path_clock
    from ou_theory.cloning import clone_correlation, same_cluster_probability
    from ou_theory.cluster_laws import Clusters, clusters, mmse
    from ou_theory.collapse import collapse_time, collapse_time_modes, pair_collapse_times
    from ou_theory.ensembles import (
        bridges,
        clusters_flow,
        clusters_sde,
        mixture_flow,
        mixture_sde,
        noise_steps,
        simulate,
    )
    from ou_theory.estimator import Commitment, commitment, gap, relative_energy
    from ou_theory.gain_model import q_ode, q_sde, q_uncoupled, wiener_gain
    from ou_theory.landau import magnetisation
    from ou_theory.mixture import Mixture, gaussian, log_density, mode_mixture, posterior_mean, score, two_clusters
    from ou_theory.modes import Bands, band_mean, dct2, idct2, pair_modes, radial_bands
    from ou_theory.process import Process, Transition, coupled, replicas, symmetric_pair, transition, transition_time
    from ou_theory.recursion import recursion_energy
    from ou_theory.schedules import scheduled_noise, scheduled_time
    from ou_theory.speciation import kappa, mode_speciation_time, speciation_gap, speciation_time

    __version__: str

_NAMES = {
    "ou_theory.attention": "first_order_difference rho rho_n",
    "ou_theory.clock": "Clock log_snr make_clock ou_time path_clock",
    "ou_theory.cloning": "clone_correlation same_cluster_probability",
    "ou_theory.cluster_laws": "Clusters clusters mmse",
    "ou_theory.collapse": "collapse_time collapse_time_modes pair_collapse_times",
    "ou_theory.ensembles": "bridges clusters_flow clusters_sde mixture_flow mixture_sde noise_steps simulate",
    "ou_theory.estimator": "Commitment commitment gap relative_energy",
    "ou_theory.gain_model": "q_ode q_sde q_uncoupled wiener_gain",
    "ou_theory.landau": "magnetisation",
    "ou_theory.mixture": "Mixture gaussian log_density mode_mixture posterior_mean score two_clusters",
    "ou_theory.modes": "Bands band_mean dct2 idct2 pair_modes radial_bands",
    "ou_theory.process": "Process Transition coupled replicas symmetric_pair transition transition_time",
    "ou_theory.recursion": "recursion_energy",
    "ou_theory.schedules": "scheduled_noise scheduled_time",
    "ou_theory.speciation": "kappa mode_speciation_time speciation_gap speciation_time",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}

__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("syncgap")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
