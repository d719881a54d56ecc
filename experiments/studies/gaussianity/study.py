"""The gaussianity study as one object."""

from experiments.frame.study import Study
from experiments.studies.gaussianity.analysis import DEFINITIONS, analyse
from experiments.studies.gaussianity.measure import check, measure
from experiments.studies.gaussianity.page import page
from experiments.studies.gaussianity.settings import GaussianityConfig

STUDY = Study("gaussianity", GaussianityConfig, measure, page, analyse, DEFINITIONS, check)
