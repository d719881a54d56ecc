"""Questions asked of theory and network together, a folder each; `open_run` reads what they have stored."""

from typing import Any

__all__ = ["open_run"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """`open_run`, imported when it is first used: the command line imports nothing heavy."""
    if name == "open_run":
        from experiments.frame.reader import open_run

        return open_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
