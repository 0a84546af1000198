"""The classes of all errors that are reported to users.

They are raised where the cause is known; only the command line turns them into an exit code. A
message says what is wrong, where, the value found, and what to do.
"""

from __future__ import annotations


class DsnetError(Exception):
    """Base class of errors that the user can correct; `exit_code` is for the command line."""

    exit_code = 1


class ConfigError(DsnetError):
    """The configuration or the command line is invalid."""

    exit_code = 2


class PreflightError(DsnetError):
    """The configuration is valid, but something it names (data, folder, device, checkpoint) is
    missing or broken."""

    exit_code = 3


class DataError(PreflightError):
    """A data file is missing, truncated or mislabelled; the message names the file."""


class CheckpointError(PreflightError):
    """A checkpoint, table or bundle is missing, truncated, of another version, or does not match
    its hash."""


class StorageError(PreflightError):
    """A file or folder cannot be written or read: the disk is full, read-only or failing, the user
    may not, or the folder is gone. The message names the path."""


class TooManyFailedTrialsError(DsnetError):
    """The sweep finished, but more trials failed than the budget allows."""

    exit_code = 4


class NothingFeasibleError(DsnetError):
    """The sweep finished without any feasible point."""

    exit_code = 5


class StoppedError(DsnetError):
    """The run was asked to stop early; launching again continues."""

    exit_code = 6


class StorageStoppedError(StoppedError):
    """A run was stopped by its storage; launching again continues when that is corrected."""


class ClusterLostError(StoppedError):
    """A part of Ray without which no work can go on has ended or hangs; launching again starts it
    anew and continues."""


class VerificationError(DsnetError):
    """The results of the real network differ from the claimed ones."""

    exit_code = 7


class LockedError(DsnetError):
    """Another process holds the lock of the folder."""

    exit_code = 8


class NotFoundError(DsnetError):
    """The named run, trial, point or bundle does not exist."""

    exit_code = 9


class NonFiniteLossError(DsnetError):
    """A training loss became NaN or infinite; the message names the step and the sub-network."""

    exit_code = 5
