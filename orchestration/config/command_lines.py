"""Command lines of dsnet-orch in messages, as they can be copied into a shell."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from dsnet.import_path import is_model_path
from orchestration.config.resolve import supernet_space
from orchestration.config.sweep import SweepConfig

ALLOW_FLAG = "--allow-imports"
"""The flag of commands that may run code of the user."""
_STRUCTURE = "supernet.structure."


def command_line(command: str, *arguments: str | Path, own_code: bool = False) -> str:
    """A command line, with its arguments quoted for a shell.

    Args:
        command: name of the command, such as `launch`.
        arguments: its arguments and options.
        own_code: whether it runs code of the user; then it gets the flag that allows this.
    """
    flag = [ALLOW_FLAG] if own_code else []
    return shlex.join(["dsnet-orch", command, *map(str, arguments), *flag])


def launch_command(config: SweepConfig, sweep: Path) -> str:
    """The command that launches or continues a sweep.

    Args:
        config: the sweep.
        sweep: its file.
    """
    return command_line("launch", sweep, own_code=has_own_code(config))


def has_own_code(config: SweepConfig) -> bool:
    """Whether a sweep uses code of the user that must be allowed, in its settings or among the
    values of its space."""
    structure = config.supernet.structure
    return has_own_network(config) or any(
        is_model_path(value)
        for value in (structure.method, structure.score, *_swept(config, f"{_STRUCTURE}method", f"{_STRUCTURE}score"))
    )


def has_own_network(config: SweepConfig) -> bool:
    """Whether a network of the user is in a sweep, so that its bundles run code of the user."""
    return any(map(is_model_path, (config.supernet.model, *_swept(config, "supernet.model"))))


def _swept(config: SweepConfig, *keys: str) -> Iterator[str]:
    """The values of settings of the supernet in the space of a sweep."""
    space = supernet_space(config)
    for key in keys:
        if key in space:
            yield from map(str, space[key].edge_values())
