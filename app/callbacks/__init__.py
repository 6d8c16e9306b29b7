"""Callbacks of a run, one callback a file."""

from app.callbacks.adapter_averaging import AdapterAveraging
from app.callbacks.adapter_checkpoint import AdapterCheckpoint, nothing_left
from app.callbacks.adapter_spectrum import AdapterSpectrum
from app.callbacks.adapter_writer import AdapterWriter
from app.callbacks.bank_batches import BankBatches, class_names_of
from app.callbacks.class_scores import ClassScores
from app.callbacks.confusion_picture import ConfusionPicture
from app.callbacks.data_report import DataReport
from app.callbacks.forgetting import Forgetting
from app.callbacks.generalization_gap import GeneralizationGap
from app.callbacks.generated_samples import GeneratedSamples
from app.callbacks.learning_rate_search import LearningRateSearch
from app.callbacks.metric_recorder import MetricRecorder
from app.callbacks.prediction_writer import PredictionWriter
from app.callbacks.run_summary import RunSummary
from app.callbacks.save_run_config import SaveRunConfig
from app.callbacks.termination import Termination
from app.callbacks.user_callbacks import usable_callbacks

__all__ = [
    "AdapterAveraging",
    "AdapterCheckpoint",
    "AdapterSpectrum",
    "AdapterWriter",
    "BankBatches",
    "ClassScores",
    "ConfusionPicture",
    "DataReport",
    "Forgetting",
    "GeneralizationGap",
    "GeneratedSamples",
    "LearningRateSearch",
    "MetricRecorder",
    "PredictionWriter",
    "RunSummary",
    "SaveRunConfig",
    "Termination",
    "class_names_of",
    "nothing_left",
    "usable_callbacks",
]
