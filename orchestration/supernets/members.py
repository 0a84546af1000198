"""The members of a sweep of supernets: drawn before training, each distinct supernet once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dashboards.supernet_names import with_settings
from dsnet.errors import CheckpointError, ConfigError, DsnetError, StorageError
from orchestration.config.distribution import Distribution
from orchestration.config.resolve import gate_space, supernet_space
from orchestration.config.space import supernet_with
from orchestration.config.sweep import SweepConfig
from orchestration.pipeline.search import refuse_impossible_layout
from orchestration.prepare.preparation import Images, Prepared, prepare, supernet_record, with_found_structure
from orchestration.runs.folder import RunDir
from orchestration.supernets.entries import read_entries
from search.suggest.drawing import drawn_points
from search.suggest.samplers import SamplerSettings
from search.suggest.space import Scalar, Space, parse_space

KEY_CHARACTERS = 8
"""Number of characters of the supernet's stage key in a member's name."""
DRAWS_PER_SUPERNET = 50
"""Draws per wanted supernet, and draws in a row without a new supernet, after which the space
counts as exhausted."""


@dataclass(frozen=True)
class Member:
    """One supernet of a sweep, with the gates that are searched under it."""

    name: str
    key: str
    """Key of its supernet stage; a digest of its settings if they are not valid."""
    settings: Mapping[str, Scalar]
    """Its values of the supernet part of the space, by dotted key."""
    prepared: Prepared | None
    """Its data and network; None if the settings make no valid supernet."""
    problem: str | None = None
    """Why the settings make no valid supernet; None if they do."""

    @property
    def label(self) -> str:
        """Its name with its settings, where they are short: `s0-3fa29c01 (uniform)`."""
        return with_settings(self.name, self.settings)

    @property
    def config(self) -> SweepConfig:
        """The configuration of its own sweep: the whole sweep's, with these settings and only the
        gates' part of the space."""
        assert self.prepared is not None
        return self.prepared.config

    @property
    def run(self) -> RunDir:
        """Its run folder."""
        return RunDir(Path(self.config.storage.runs), self.name)


def supernet_part(config: SweepConfig) -> Space:
    """The part of the space that varies the supernet; choices that are lists are given as JSON
    text."""
    distributions = {key: _with_text(distribution) for key, distribution in supernet_space(config).items()}
    return parse_space({key: distribution.written() for key, distribution in distributions.items()})


def _with_text(distribution: Distribution) -> Distribution:
    if distribution.kind != "choice":
        return distribution
    return replace(distribution, values=tuple(_text(choice) for choice in distribution.values))


def _text(choice: Any) -> Any:
    return json.dumps(choice) if isinstance(choice, tuple) else choice


def draw_members(config: SweepConfig, run: RunDir, images: Images, warn: Callable[[str], None]) -> tuple[Member, ...]:
    """Draw the supernets of a sweep, in order.

    Settings that give the same supernet count once. Settings that give no valid supernet are also
    a member, with the reason, so that the sweep shows what failed.

    Args:
        config: configuration of the sweep, resolved, with absolute folders.
        run: the sweep's run folder; it need not exist.
        images: the sweep's data.
        warn: called with a warning if start weights are gone.
    """
    known = {entry.key: entry.name for entry in read_entries(run, everything=True)}
    members: dict[str, Member] = {}
    num_in_vain = 0
    for settings in _drawn(config):
        member = _member(config, run, settings, images, warn)
        if member.key in members:
            num_in_vain += 1
            if num_in_vain >= DRAWS_PER_SUPERNET:
                break
            continue
        num_in_vain = 0
        name = known.setdefault(member.key, f"s{_next_number(known.values())}-{member.key[:KEY_CHARACTERS]}")
        members[member.key] = _named(member, name)
        if len(members) == config.supernets.number:
            break
    return tuple(members.values())


def _drawn(config: SweepConfig) -> Iterator[dict[str, Scalar]]:
    settings = SamplerSettings(config.supernets.sampler)
    return islice(
        drawn_points(supernet_part(config), settings, config.seed), DRAWS_PER_SUPERNET * config.supernets.number
    )


def _next_number(names: Sequence[str] | Any) -> int:
    """The number of a new member's name; numbers are never reused, so that a member keeps its name
    and folder when another space draws it at another position."""
    numbers = [int(name.partition("-")[0][1:]) for name in names]
    return max(numbers, default=-1) + 1


def _member(
    config: SweepConfig,
    run: RunDir,
    settings: Mapping[str, Scalar],
    images: Images,
    warn: Callable[[str], None],
) -> Member:
    """A member without its name."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    key, prepared = digest, None
    try:
        prepared = prepare(member_config(config, run, settings), None, warn, images)
        key = supernet_record(prepared).key
        refuse_impossible_layout(prepared.config, prepared.subnets, prepared.image_size)
    except (CheckpointError, StorageError):
        raise  # broken files are not a fault of the settings
    except DsnetError as error:
        return Member("", key, settings, None, str(error))
    return Member("", key, settings, prepared)


def _named(member: Member, name: str) -> Member:
    if member.prepared is None:
        return replace(member, name=name)
    config = member.prepared.config.model_copy(update={"name": name})
    prepared = replace(member.prepared, config=config)
    named = replace(member, name=name, prepared=prepared)
    return replace(named, prepared=with_found_structure(prepared, named.run))


def member_config(config: SweepConfig, run: RunDir, settings: Mapping[str, Scalar]) -> SweepConfig:
    """The configuration of a member's own sweep, except its name.

    Raises:
        ConfigError: the settings contradict each other, or the rest of the sweep.
    """
    meant = {key: _meant(config, key, value) for key, value in settings.items()}
    plain = config.model_dump(mode="json", exclude={"presets", "supernet"})
    plain["space"] = {key: distribution.written() for key, distribution in gate_space(config).items()}
    plain["storage"]["runs"] = str(run.supernets_dir)
    if config.storage.artifacts is not None:
        below = run.supernets_dir.relative_to(run.path.parent).as_posix()
        plain["storage"]["artifacts"] = f"{config.storage.artifacts.rstrip('/')}/{below}"
    try:
        plain["supernet"] = supernet_with(config.supernet, meant).model_dump(mode="json")
        return SweepConfig.model_validate(plain)
    except ValidationError as error:
        raise ConfigError("; ".join(_told(item) for item in error.errors(include_url=False))) from error


def _told(error: Any) -> str:
    place = ".".join(map(str, error["loc"]))
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{place}: {message}" if place and not message.startswith(place) else message


def _meant(config: SweepConfig, key: str, value: Scalar) -> Any:
    """The list that a drawn text encodes; other values are returned as they are."""
    lists = [choice for choice in config.space[key].values if isinstance(choice, tuple)]
    return json.loads(str(value)) if any(_text(choice) == value for choice in lists) else value
