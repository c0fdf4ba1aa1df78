"""The one tree of errors. A message says what is wrong, in which tensor or file, and what to do about it."""


class XentQuantError(Exception):
    """Base of every error that a user can cause; the command line prints it in one line and exits 1."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or a polite kill; the message says what became of the work."""


class ConfigError(XentQuantError):
    """An option, a config.json or a recipe that cannot be followed."""


class CheckpointError(XentQuantError):
    """A checkpoint that cannot be read: missing or truncated file, wrong shape or dtype, NaN or infinite weight."""


class UnsupportedError(XentQuantError):
    """Something valid that this project, or the target runtime, cannot express."""


class QuantizationError(XentQuantError):
    """Values that a block format cannot hold: ragged rows, NaN, infinities, a scale beyond float16."""


class CalibrationError(XentQuantError):
    """Calibration text or statistics that are missing, empty or of another model."""


class ExportError(XentQuantError):
    """An output that cannot be written."""


class ValidationError(XentQuantError):
    """A comparison that cannot be made: mismatched tokenizer, missing runtime, empty suite."""


def is_interrupt(error: BaseException) -> bool:
    """Whether it is Ctrl-C, or what Python makes of it where C code goes on with it: a SystemError, of which it is the cause."""
    return isinstance(error.__cause__ if isinstance(error, SystemError) else error, KeyboardInterrupt)
