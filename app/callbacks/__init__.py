"""One callback a file."""

from app.callbacks.adapter_checkpoint import AdapterCheckpoint
from app.callbacks.adapter_spectrum import AdapterSpectrum
from app.callbacks.errors import CallbackError
from app.callbacks.prediction_writer import PredictionWriter
from app.callbacks.run_summary import RunSummary

__all__ = ["AdapterCheckpoint", "AdapterSpectrum", "CallbackError", "PredictionWriter", "RunSummary"]
