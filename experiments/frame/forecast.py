"""What a run says of its cost: what goes through the network, before it starts; how long it takes, after a block."""

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta

import jax
from tqdm import tqdm

from experiments.frame.chunks import blocks_of
from experiments.frame.store import RunFolder

LONG = 600.0  # seconds; blocks that take longer should be smaller
COMPILING = "/jax/core/compile/"  # events of JAX that are compilation; the times of inner ones lie in outer ones

Span = tuple[float, float]


class Forecast:
    """Tells once, of the first group of a run that goes through a network, what the run will cost."""

    def __init__(
        self,
        study: str,
        passes: Callable[[int], Mapping[str, int]],
        pairs: int,
        block: int,
        least: int = 1,
        heard: Callable[[float], None] | None = None,
    ) -> None:
        """
        Args:
          study: its name.
          passes: images that go through a network, by group, of a run of so many pairs; see `Study.passes`.
          pairs: of the run.
          block: pairs in a block.
          least: smallest number of pairs of a block.
          heard: is told the seconds that an image takes in the first block, in the place of the terminal.
        """
        self.heard = heard
        self.study, self._passes, self.block, self.least = study, passes, block, least
        self.total = dict(passes(pairs))
        self._is_told = False

    def wants(self, group: str) -> bool:
        """Whether this group is the one to tell of. The next one is not."""
        wanted = group in self.total and not self._is_told
        self._is_told |= wanted
        return wanted

    def tell_before(self, group: str, size: int, run: RunFolder) -> None:
        """Says what is known before anything is measured; `size` is the group's, in bytes."""
        if self.heard is not None:
            return
        parts = ", ".join(f"{name} {count:,}" for name, count in self.total.items())
        free = in_bytes(shutil.disk_usage(run.path).free)
        told = f"{sum(self.total.values()):,} images go through the network ({parts})"
        _tell(self.study, f"{told}; the group {group} takes up to {in_bytes(size)} of disk, {free} are free")

    @contextmanager
    def telling(self, group: str, blocks: Sequence[slice], pairs: int, run: RunFolder) -> Iterator[None]:
        """Times the first of these blocks of a group of so many pairs, inside, and says how long the run will take."""
        started = time.perf_counter()
        with compilation() as compiling:
            yield
            compiled = compiling()
        seconds = time.perf_counter() - started - compiled
        images = [self.of_block(group, block.start, block.stop, pairs) for block in blocks]
        if self.heard is not None:
            self.heard(seconds / images[0])
            return
        others = sum(count * (1 - share_of(run, name)) for name, count in self.total.items() if name != group)
        more = (sum(images[1:]) + others) * seconds / images[0]
        end = datetime.now() + timedelta(seconds=more)
        when = f"{end:%H:%M}" if more < 12 * 3600 else f"{end:%A %d %B, %H:%M}"
        _tell(
            self.study,
            f"the first block took {duration(seconds)}, and its compilation {duration(compiled)}; about "
            f"{duration(more)} more, until {when}; peak memory so far {peak_memory()}{self.advice(seconds)}",
        )

    def of_block(self, group: str, first: int, last: int, pairs: int) -> float:
        """Images of the pairs `first` to `last` - 1 of a group of so many pairs. Some studies measure more on the first
        pairs of their first group."""
        if group == next(iter(self.total)):
            return self._up_to(group, last) - self._up_to(group, first)
        return self.total[group] * (last - first) / pairs

    def _up_to(self, group: str, pairs: int) -> float:
        least = max(pairs, 2)  # settings refuse fewer
        return self._passes(least)[group] * pairs / least

    def advice(self, seconds: float) -> str:
        """A smaller block if one takes that long."""
        fitting = math.floor(self.block * LONG / seconds / self.least) * self.least
        smaller = max(self.least, fitting)
        return f"; --block {smaller} loses less where the run is interrupted" if smaller < self.block else ""


def _tell(study: str, line: str) -> None:
    tqdm.write(f"syncgap {study}: {line}", file=sys.stderr)  # above a progress bar


def share_of(run: RunFolder, group: str) -> float:
    """The share of a group that is measured and stored."""
    if not run.holds(group):
        return 0.0
    done = run.manifest["blocks"].get(group)
    return 1.0 if done is None else len(done) / max(1, len(blocks_of(run.path / "data.zarr" / group)))


@contextmanager
def compilation() -> Iterator[Callable[[], float]]:
    """A function that says how many seconds went into compiling inside this context so far."""
    spans: list[Span] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith(COMPILING):
            now = time.perf_counter()
            spans.append((now - duration_secs, now))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lambda: covered(spans)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def covered(spans: list[Span]) -> float:
    """The length of the union of intervals."""
    total, end = 0.0, -math.inf
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def peak_memory() -> str:
    """The most memory that this process has had so far, and that its first device has had if it has its own."""
    import resource  # which Windows does not have

    unit = 1 if sys.platform == "darwin" else 1024
    here = in_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return here if device is None else f"{here}, on the device {in_bytes(device)}"


def in_bytes(count: float) -> str:
    """A number of bytes in words: ``12 MB``, ``3.4 GB``."""
    if count < 1e6:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def duration(seconds: float) -> str:
    """Seconds in words: ``12 s``, ``4 min 05 s``, ``2 h 03 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
