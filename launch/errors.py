"""What can go wrong on the user's side, and the exit code that says which.

The launcher prints one sentence for these and no traceback. (torchrun itself exits with 1 whatever
its workers return; their codes stand in its summary.)
"""

__all__ = [
    "REQUEUE",
    "TERMINATED",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EchoError",
    "NonFiniteError",
    "UserError",
]

# A checkpoint was saved because the job was asked to stop: start the same command again.
REQUEUE = 75
# Stopped likewise, but checkpoints are off and the steps taken are lost (128 + SIGTERM, as shells
# report it).
TERMINATED = 143


class UserError(ValueError):
    """A mistake that a sentence can explain."""

    exit_code = 1


class ConfigError(UserError):
    """The configuration cannot be run as it stands; restarting does not help."""

    exit_code = 73


class DataError(UserError):
    """The data cannot be trained on; the message names file and offset."""

    exit_code = 73


class CheckpointError(UserError):
    """A checkpoint is damaged, or belongs to another model."""

    exit_code = 70


class NonFiniteError(UserError):
    """Loss or gradients were NaN or infinite too many times in a row."""

    exit_code = 72


class EchoError(UserError):
    """Another rank found the problem and prints it; this one ends quietly with the same code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
