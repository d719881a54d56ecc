"""Questions asked of theory and network together, a folder each; `open_run` and `open_sweep` read what is stored."""

from importlib import import_module
from typing import Any

_PLACES = {"open_run": "experiments.frame.reader", "open_sweep": "experiments.sweeps.result"}
__all__ = ["open_run", "open_sweep"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """A function, imported when it is first used: the command line imports nothing heavy."""
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
