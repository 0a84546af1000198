"""Every error that a user of the platform can meet, in one tree.

Raise them where the cause is known; only the command line turns them into an exit code. A message says what is wrong, where,
the value that was met, and the way out.
"""

from __future__ import annotations


class DsnetError(Exception):
    """Base of all errors that are the user's to mend; `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(DsnetError):
    """The configuration or the command line cannot be accepted."""

    exit_code = 2


class PreflightError(DsnetError):
    """The configuration is fine, but something it names (data, folder, device, checkpoint) is missing or broken."""

    exit_code = 3


class DataError(PreflightError):
    """A data file is missing, truncated or mislabelled; the message names the file."""


class CheckpointError(PreflightError):
    """A checkpoint, table or bundle is missing, truncated, of another version, or does not match its hash."""


class TooManyFailedTrialsError(DsnetError):
    """The sweep finished, but more trials failed than the budget allows."""

    exit_code = 4


class NothingFeasibleError(DsnetError):
    """The sweep finished without one usable point."""

    exit_code = 5


class StoppedError(DsnetError):
    """The run was asked to stop early; launching again continues."""

    exit_code = 6


class VerificationError(DsnetError):
    """What really ran differs from what was claimed."""

    exit_code = 7


class LockedError(DsnetError):
    """Another driver holds the run folder."""

    exit_code = 8


class NotFoundError(DsnetError):
    """The named run, trial, point or bundle does not exist."""

    exit_code = 9


class NonFiniteLossError(DsnetError):
    """A training loss became NaN or infinite; the message names the step and the sub-network. There is nothing to search."""

    exit_code = 5
