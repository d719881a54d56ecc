"""Which verdicts depend on the kind of prediction: noise, image, v, or the velocity of a path."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.frame.page import NOTHING, Table, claims_of
from experiments.frame.store import RunFolder

SAME, DIFFERS = "the same for all kinds here", "differs between kinds"
OPEN, WITHIN = "undecided for some kinds", "differs within a kind"
OF_NO_MATTER = {"weights", "seed", "classes", "dtype", "block", "pairs", "parameters"}  # settings that may differ


def kind_of(manifest: Mapping[str, Any]) -> str | None:
    """What the network of a run predicts, with its path unless that is DDPM's; None if the run has no network."""
    model = manifest.get("model") or {}
    if "prediction" not in model:
        return None
    path = model.get("path", "ddpm")
    return model["prediction"] if path == "ddpm" else f"{model['prediction']} ({path} path)"


def compared(verdicts: Iterable[Iterable[str]]) -> str:
    """What the verdicts on one claim say of the kinds, from those of the networks of each kind. Only a verdict and its
    opposite differ; one that is undecided says nothing."""
    tested = [{verdict for verdict in each if verdict != "not tested"} for each in verdicts]
    tested = [each for each in tested if each]
    if len(tested) < 2:
        return NOTHING
    decided = [each - {"undecided"} for each in tested]
    if any(len(each) > 1 for each in decided):
        return WITHIN
    if len(set().union(*decided)) > 1:
        return DIFFERS
    return SAME if all(each == tested[0] and len(each) == 1 for each in tested) else OPEN


def by_kind(study: str, runs: Sequence[RunFolder]) -> Table | None:
    """Verdicts of a study's runs, a row for each claim and a column for each kind of prediction; None if there are not
    two kinds.

    Raises:
      StoreError: the claims of a run cannot be read.
    """
    kinds: dict[str, list[RunFolder]] = {}
    for run in runs:
        if (kind := kind_of(run.manifest)) is not None:
            kinds.setdefault(kind, []).append(run)
    if len(kinds) < 2:
        return None
    found: dict[tuple[int, str], dict[str, list[str]]] = {}
    for kind, members in kinds.items():
        for run in members:
            for claim in claims_of(run):
                by = found.setdefault((claim["id"], claim["title"]), {})
                by.setdefault(kind, []).append(claim["verdict"])
    rows = [
        [
            f"({number}) {title}" if number else title,
            *(_cell(by.get(kind, [])) for kind in kinds),
            compared(by.values()),
        ]
        for (number, title), by in sorted(found.items(), key=lambda each: each[0][0] or 99)
    ]
    head = ["claim", *(f"{kind}: {len(members)} run{'s' * (len(members) > 1)}" for kind, members in kinds.items())]
    differing = _differing([run for members in kinds.values() for run in members])
    note = (
        "Only a verdict and its opposite differ; one that is undecided says nothing either way. Networks of one kind "
    )
    note += "may differ in more than the kind."
    if differing:
        note += f" Settings that differ between these runs, too: {', '.join(differing)}."
    return Table(f"{study}: verdicts by kind of prediction", [*head, "of the kinds"], rows, note)


def _cell(verdicts: Sequence[str]) -> str:
    """Verdicts of one kind: one word if they agree, else how many say what."""
    each = {verdict: verdicts.count(verdict) for verdict in verdicts}
    if len(each) < 2:
        return next(iter(each), NOTHING)
    return ", ".join(f"{verdict} ({count})" for verdict, count in each.items())


def _differing(runs: Sequence[RunFolder]) -> list[str]:
    """Names of the settings, of those that bear on a verdict, in which runs differ."""
    settings = [run.manifest["settings"] for run in runs]
    names = sorted(set().union(*settings) - OF_NO_MATTER)
    return [name for name in names if any(each.get(name) != settings[0].get(name) for each in settings)]
