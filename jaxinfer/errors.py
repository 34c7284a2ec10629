"""The exceptions that users meet. Knows nothing of HTTP, JAX or any other part of jaxinfer.

JaxInferError
|- UserError (also ValueError)      something the user can repair; the message says how
|  |- ConfigError                   a flag, a YAML key, a combination of settings
|  |- CheckpointError               a model directory or file that cannot be used as it is
|  |- ModelNotFoundError            a model name that is not served, or cannot be found
|  `- RequestError                  one request; `param` names the field
|- CapacityError                    does not fit: memory, devices
|- QueueFullError                   the waiting queue is at its limit; has `retry_after_s`
`- EngineDeadError                  the engine process is gone; open requests have failed
"""


class JaxInferError(Exception):
    """Base of every error raised on purpose by jaxinfer."""


class UserError(JaxInferError, ValueError):
    """Something the user gave is wrong; the message names the field, the value and the repair."""


class ConfigError(UserError):
    """A flag, a configuration key or a combination of settings is wrong."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or holds something this version cannot serve."""


class ModelNotFoundError(UserError):
    """No model of that name is served or can be found."""


class RequestError(UserError):
    """One request is wrong. `param` is the name of the request field, as the user wrote it."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class CapacityError(JaxInferError):
    """What was asked for does not fit the hardware; the message says what would."""


class QueueFullError(JaxInferError):
    """The bounded waiting queue is full."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineDeadError(JaxInferError):
    """The engine is gone or stopping; the request was not (fully) served."""
