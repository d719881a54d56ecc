"""The speciation study as one object."""

from experiments.frame.study import Study
from experiments.studies.speciation.analysis import DEFINITIONS, analyse
from experiments.studies.speciation.measure import check, measure
from experiments.studies.speciation.page import page
from experiments.studies.speciation.settings import SpeciationConfig

STUDY = Study("speciation", SpeciationConfig, measure, page, analyse, DEFINITIONS, check)
