"""Earlier name of `TextClassificationData`, which saved runs and recipes may hold."""

from datamodules.text_classification import TextClassificationData as GlueData  # noqa: F401
