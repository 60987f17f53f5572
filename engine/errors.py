"""The error tree of the engine. Every error that leaves the package is one of these.

CollmError
├── ConfigError            a configuration that cannot be served; the message names the field
├── CheckpointError        a checkpoint that cannot be read; the message names the file
├── GateError              a gate artifact that is damaged or does not fit its models
├── CompositionError       a composed checkpoint that is damaged or does not fit its members
├── EngineStartupError     the engine process refused to start; the message is one clear line
├── EngineDeadError        the engine process is gone; nothing more can be served by it
└── RequestError           one request failed; the others go on
"""


class CollmError(Exception):
    """Base of every error raised by this project."""


class ConfigError(CollmError, ValueError):
    """A configuration that cannot be served. The message names the field."""


class CheckpointError(CollmError, ValueError):
    """A checkpoint that cannot be read. The message names the file."""


class GateError(CollmError, ValueError):
    """A gate artifact that is damaged, or that does not fit the models beside it."""


class CompositionError(CollmError, ValueError):
    """A composed checkpoint that is damaged, or whose members are not those that it was made for."""


class EngineStartupError(CollmError):
    """The engine refused to start. The message is one line and says what to change."""


class EngineDeadError(CollmError):
    """The engine process is gone, or a lane in it failed beyond repair."""


class RequestError(CollmError):
    """One request failed while it ran; the message is safe to show to its sender."""
