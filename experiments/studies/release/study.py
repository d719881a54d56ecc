"""The release study as one object."""

from experiments.frame.study import Study
from experiments.studies.release.analysis import DEFINITIONS, analyse
from experiments.studies.release.measure import check, measure
from experiments.studies.release.page import page
from experiments.studies.release.settings import ReleaseConfig

STUDY = Study("release", ReleaseConfig, measure, page, analyse, DEFINITIONS, check)
