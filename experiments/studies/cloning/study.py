"""The cloning study as one object."""

from experiments.frame.study import Study
from experiments.studies.cloning.analysis import DEFINITIONS, analyse
from experiments.studies.cloning.measure import check, measure
from experiments.studies.cloning.page import page
from experiments.studies.cloning.settings import CloningConfig

STUDY = Study("cloning", CloningConfig, measure, page, analyse, DEFINITIONS, check)
