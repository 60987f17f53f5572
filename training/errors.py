"""The error tree of training. Each message is one line that says what to change; the command prints it and ends with 1.

TrainingError (a CollmError)
├── SettingsError     a setting is missing, unknown or impossible; the message names it
├── DataError         an example that cannot be used; the message names the file and the line
├── ModelError        a checkpoint that cannot be read, or models that do not fit each other
└── DivergedError     the loss or a gradient is not finite; the last checkpoint is kept
"""

from engine.errors import CollmError


class TrainingError(CollmError):
    """Base of what the training commands refuse."""


class SettingsError(TrainingError, ValueError):
    """A setting is missing, unknown or impossible."""


class DataError(TrainingError, ValueError):
    """An example that cannot be used."""


class ModelError(TrainingError):
    """A checkpoint that cannot be read, or models that do not fit each other."""


class DivergedError(TrainingError):
    """The loss or a gradient is not finite. Nothing after the last checkpoint was kept."""
