"""The questions that are asked, a folder each.

A study of your own is one more folder and one more name in `NAMES`. Its ``settings.py`` defines ``<Name>Config``, its
``study.py`` defines ``STUDY``.
"""

from importlib import import_module
from typing import Any

NAMES = (
    "compare",
    "spectrum",
    "depth",
    "mechanism",
    "interventions",
    "release",
    "cloning",
    "speciation",
    "response",
    "gaussianity",
    "solvable",
    "modalities",
)


def settings_of(name: str) -> type[Any]:
    """The settings of a study, ``<Name>Config`` of its ``settings.py``, which imports nothing heavy."""
    return getattr(import_module(f"experiments.studies.{name}.settings"), f"{name.capitalize()}Config")


def find(name: str) -> Any:
    """The study of this name, an `experiments.frame.study.Study`; None if there is none."""
    return import_module(f"experiments.studies.{name}.study").STUDY if name in NAMES else None
