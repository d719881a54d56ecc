"""The solvable study as one object."""

from experiments.frame.study import Study
from experiments.studies.solvable.analysis import DEFINITIONS, analyse
from experiments.studies.solvable.measure import check, measure
from experiments.studies.solvable.page import page
from experiments.studies.solvable.settings import SolvableConfig

STUDY = Study("solvable", SolvableConfig, measure, page, analyse, DEFINITIONS, check)
