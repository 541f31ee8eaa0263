"""Errors on the user's side, and the exit code of each.

The launcher prints one sentence for them and no traceback. (torchrun itself exits with 1 whatever
its workers return; its summary shows their codes.)
"""

# A checkpoint was saved because a signal asked the job to stop: start the same command again.
REQUEUE = 75
# Stopped likewise, but checkpoints are off and the steps taken are lost. (128 + SIGTERM, as shells
# report it.)
TERMINATED = 143
# Interrupted from the keyboard before training began. (128 + SIGINT.)
INTERRUPTED = 130
# Another rank, or torchrun, has died, is stopped or hangs: start the same command again.
HUNG = 69
# The last checkpoint could not be written.
DISK_FAILED = 74


class UserError(ValueError):
    """A mistake that one sentence can explain."""

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


class HungRankError(UserError):
    """Another rank did not come in time; the message names it."""

    exit_code = HUNG


class RemoteRankError(UserError):
    """Another rank found the problem and prints it; this one exits quietly with the same code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
