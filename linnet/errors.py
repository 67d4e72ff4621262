"""The errors linnet raises on purpose, and what each one promises.

    LinnetError
    +-- ConfigError (also ValueError)   a config, recipe or command line that cannot be meant
    +-- CheckpointError                 a saved model or run that is missing, damaged or misshapen
    +-- DataError                       a corpus, shard or tokenizer that cannot be used
    +-- TrainingError                   a run that must stop (non-finite loss or gradients)
    +-- EnvError                        a task environment that failed
    +-- EngineError                     the inference engine cannot go on
        +-- MemoryPlanError             what is asked for does not fit into memory
        +-- RequestError                one request is wrong; the engine goes on
            +-- Overloaded              too many requests wait; try again later
            +-- PromptTooLong           (also ValueError) more tokens than the engine has room for

Each message is one line: what was found, what was expected, what to do. `linnet` on the command
line prints that line and exits with 1; wrong tensor arguments to an op raise plain `ValueError`.
"""


class LinnetError(Exception):
    """Base class of every error that linnet raises deliberately."""


class ConfigError(LinnetError, ValueError):
    """A configuration value is unknown, missing or contradicts another."""


class CheckpointError(LinnetError):
    """A checkpoint is missing, damaged, or does not fit the model."""


class DataError(LinnetError):
    """A corpus, token shard or tokenizer cannot be used."""


class TrainingError(LinnetError):
    """Training cannot continue."""


class EnvError(LinnetError):
    """A task environment failed."""


class EngineError(LinnetError):
    """The inference engine cannot continue."""


class MemoryPlanError(EngineError):
    """The memory that is free does not hold what the engine was asked to hold."""


class RequestError(EngineError):
    """A single request is invalid; others are not affected."""


class Overloaded(RequestError):
    """The queue is full."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """When it is worth to try again."""


class PromptTooLong(RequestError, ValueError):
    """A prompt, with the tokens it asks for, is longer than the engine allows."""

    def __init__(self, num_tokens: int, limit: int) -> None:
        super().__init__(
            f"the prompt has {num_tokens:,} tokens; requests may have {limit:,} with their answer"
        )
        self.num_tokens, self.limit = num_tokens, limit
