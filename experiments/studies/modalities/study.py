"""The study of two modalities as one object."""

from experiments.frame.study import Study
from experiments.studies.modalities.measure import DEFINITIONS, measure
from experiments.studies.modalities.page import page
from experiments.studies.modalities.settings import ModalitiesConfig

STUDY = Study("modalities", ModalitiesConfig, measure, page, definitions=DEFINITIONS, subject="exact scores")
