"""The main study as one object."""

from experiments.frame.study import Study
from experiments.studies.compare.analysis import analyse
from experiments.studies.compare.definitions import DEFINITIONS
from experiments.studies.compare.family import together
from experiments.studies.compare.measure import measure
from experiments.studies.compare.modes import check
from experiments.studies.compare.page import page
from experiments.studies.compare.settings import CompareConfig

STUDY = Study("compare", CompareConfig, measure, page, analyse, DEFINITIONS, check, together)
