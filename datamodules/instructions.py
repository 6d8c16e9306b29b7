"""Earlier name of `LanguageModelingData`, which saved runs and recipes may hold."""

from datamodules.language_modeling import LanguageModelingData as InstructionData  # noqa: F401
