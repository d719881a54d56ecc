"""The mechanism study as one object."""

from experiments.frame.study import Study
from experiments.studies.mechanism.analysis import DEFINITIONS, analyse
from experiments.studies.mechanism.measure import measure
from experiments.studies.mechanism.page import page
from experiments.studies.mechanism.settings import MechanismConfig

STUDY = Study("mechanism", MechanismConfig, measure, page, analyse, DEFINITIONS)
