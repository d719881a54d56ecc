"""The devices that JAX runs on. What is wrong with the platform is said as such, and blamed on no file."""

from collections.abc import Callable
from typing import Any, cast

import jax


class PlatformError(ValueError):
    """JAX has no device on the platform that it is set to."""


def devices() -> list[Any]:
    """All devices, the default one first.

    Raises:
      PlatformError: there is none; the message names the platform and the remedy.
    """
    return _ask(_settings().jax_platforms, jax.devices)


def host_device() -> Any:
    """The host's own device, whose memory is that of the CPU.

    Raises:
      PlatformError: JAX is set to platforms without it.
    """
    return _ask("cpu", lambda: jax.local_devices(backend="cpu"))[0]


def _settings() -> Any:
    return cast(Any, jax.config)  # whose names JAX adds as it runs


def _ask(platform: str | None, find: Callable[[], list[Any]]) -> list[Any]:
    try:
        return find()
    except (RuntimeError, AssertionError) as error:  # the latter where a platform has no plugin
        reason = f" ({str(error).strip().splitlines()[0]})" if str(error).strip() else ""
        platforms = _settings().jax_platforms or ""
        setting = f"JAX_PLATFORMS={platforms}"
        if platforms == "cpu":
            remedy = "the installation of JAX is broken: install it again"
        elif platform == "cpu" and "cpu" not in platforms.split(","):
            remedy = f"set {setting},cpu, or leave it out"
        else:
            remedy = "set JAX_PLATFORMS=cpu to run on the CPU; a GPU needs its driver and `pip install 'jax[cuda13]'`"
        raise PlatformError(
            f"JAX has no usable device on the platform {platform or 'that it is set to'}, {setting}{reason}; {remedy}"
        ) from error
