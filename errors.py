"""The errors Glassine raises on purpose.

GlassineError            exit code 1; the message says what, where, expected, got and what to do next
├── CheckpointError      a weights file that cannot be read or trusted
├── ConversionError      weights that do not fit the network: missing, left over, wrong shape, not finite
├── PackageError         a model folder or .mlpackage that is missing, unfinished, damaged or in the way
├── EngineError          a package that cannot be run, or was called with the wrong inputs
├── RequestError         a prompt, picture, map or setting that cannot be drawn with
└── MissingDependency    an optional library is not installed; the message names the extra
"""


class GlassineError(Exception):
    """Base of every error Glassine raises on purpose; its text is meant for the user."""


class CheckpointError(GlassineError):
    """A weights file that cannot be read or trusted."""


class ConversionError(GlassineError):
    """Weights that do not fit the network."""


class PackageError(GlassineError):
    """A model folder or package that is missing, unfinished, damaged or in the way."""


class EngineError(GlassineError):
    """A package that cannot be run, or was called with the wrong inputs."""


class RequestError(GlassineError):
    """A prompt, picture, map or setting that cannot be drawn with."""


class MissingDependency(GlassineError):
    """An optional library is not installed."""
