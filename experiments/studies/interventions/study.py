"""The interventions study as one object."""

from experiments.frame.study import Study
from experiments.studies.interventions.analysis import DEFINITIONS, analyse
from experiments.studies.interventions.measure import check, measure
from experiments.studies.interventions.page import page
from experiments.studies.interventions.settings import InterventionsConfig

STUDY = Study("interventions", InterventionsConfig, measure, page, analyse, DEFINITIONS, check)
