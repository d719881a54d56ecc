"""How a sweep's axes are laid out on figures and tables, and their values in words."""

from typing import NamedTuple

import numpy as np
import xarray as xr

from experiments.sweeps.plan import POINT

MOST_FACETS = 4  # values of a third axis that are drawn side by side


class Layout(NamedTuple):
    """What the axes of a sweep are for.

    Attributes:
      dims: all axes of the plan.
      first, second: the first two with more than one value, None where there are fewer.
      facet: a third one, if it has few values.
      repeats: the axis of repeats, which is averaged over.
      fixed: further axes, which are drawn at their first value.
    """

    dims: tuple[str, ...]
    first: str | None
    second: str | None
    facet: str | None
    repeats: str | None
    fixed: tuple[str, ...]

    @classmethod
    def of(cls, result: xr.Dataset, repeats: str | None) -> "Layout":
        """The layout of a result.

        Args:
          repeats: the axis whose places are all repeats of each other.
        """
        dims = tuple(map(str, result.status.dims))
        repeats = repeats if repeats is not None and result.sizes[repeats] > 1 else None
        varied = [dim for dim in dims if result.sizes[dim] > 1 and dim != repeats]
        if not varied and repeats is not None:  # repeats alone are drawn beside each other
            varied, repeats = [repeats], None
        first, second, *more = [*varied, None, None]
        facet = next((dim for dim in more if dim is not None and result.sizes[dim] <= MOST_FACETS), None)
        fixed = tuple(dim for dim in more if dim is not None and dim != facet)
        return cls(dims, first, second, facet, repeats, fixed)

    @property
    def repeats_in_words(self) -> str:
        """What the repeats are."""
        return "seeds" if self.repeats == "seed" else "trainings"

    def note(self, result: xr.Dataset) -> str:
        """What a figure shows of the axes that it has no room for."""
        said = [f"{named(dim)} = {spelled(result, dim, 0)}" for dim in self.fixed]
        said = [f"Shown at {', '.join(said)}; the table has all cells."] if said else []
        if self.repeats is not None:
            said.append(f"Values are means over {self.repeats_in_words}.")
        return " ".join(said)


def tested(result: xr.Dataset) -> list[int]:
    """Indices of the claims that at least one cell tests."""
    words = result.verdict.values.reshape(-1, result.sizes["claim"]) if result.sizes["claim"] else np.empty((0, 0))
    return [index for index in range(words.shape[1]) if set(words[:, index]) - {"", "not tested"}]


def level_of(result: xr.Dataset, claim: int) -> float:
    """Level of the intervals of a claim, the lowest of its cells."""
    return float(np.nanmin(result.claim_level.isel(claim=claim).values))


def measure_of(result: xr.Dataset, claim: int) -> str:
    """What a claim measures. Cells may differ in it, for example in the coupling at which they look."""
    words = list(dict.fromkeys(str(word) for word in result.claim_measure.isel(claim=claim).values.ravel() if word))
    return " or ".join(words[:2]) + (" and so on" if len(words) > 2 else "")


def named(dim: str) -> str:
    """The name of an axis as figures and tables have it."""
    return dim.replace("_", " ")


def spelled(result: xr.Dataset, dim: str, index: int, *, whole: bool = False) -> str:
    """A value of an axis in words; a listed point by the setting that tells all points apart, or by all that it sets
    where there is none or the `whole` point is asked for."""
    if dim != POINT:
        return _word(result[dim].values[index])
    set_by = {str(name): v.values for name, v in result.coords.items() if v.dims == (POINT,) != (name,)}
    words = {name: [_word(v) if v == v else "" for v in values] for name, values in set_by.items()}  # NaN is not set
    apart = [name for name, each in words.items() if all(each) and len(set(each)) == len(each)]
    told = (not whole and apart[:1]) or words
    return ", ".join(f"{named(name)} {words[name][index]}" for name in told if words[name][index])


def _word(value: object) -> str:
    return f"{value:g}" if isinstance(value, float | np.floating) else str(value)
