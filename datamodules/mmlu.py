"""Earlier name of `MultipleChoiceData`, which saved runs and recipes may hold."""

from datamodules.multiple_choice import MultipleChoiceData as MMLUData  # noqa: F401
