"""The loop of a structure search, independent of where candidates are scored, and its result.

Every score and choice is written to a trace as soon as it is known. A search that was ended replays
its trace and asks only for what is missing, so that it ends as if it had not been ended.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dsnet.errors import CheckpointError, ConfigError
from dsnet.files import append_bytes, atomic_write_text
from dsnet.network.supernet import Supernet
from dsnet.space.subnet_set import SubnetSet
from dsnet.stored.checkpoint import load_supernet, save_supernet
from dsnet.stored.names import STRUCTURE
from dsnet.structure.filters import Batches
from dsnet.structure.method import (
    Candidate,
    Choice,
    Found,
    Score,
    ScoredBy,
    Search,
    StructureProblem,
    Trained,
    Trainings,
)
from dsnet.structure.methods import structure_method
from dsnet.structure.order import Orders, channel_orders, compose, no_order, transfer, with_ids

TRACE = "trace.jsonl"

Scorer = Callable[[Sequence[Candidate]], Iterable[Score]]
"""Scores candidates, in their order; each score that arrives is stored at once."""


def _no_training(trainings: Trainings) -> None:
    raise ValueError(f"nothing can train {', '.join(each.base.name for each in trainings.networks)}")


def _no_other(network: Supernet) -> None:
    raise ValueError("nothing can score another network")


@dataclass(frozen=True)
class Facilities:
    """Functions that score and train for a search."""

    score: Scorer
    """Scores candidates by the network of `use`, at first that with which the search begins."""
    train: Callable[[Trainings], None] = _no_training
    """Trains networks, as far as they are not trained yet."""
    use: Callable[[Supernet], None] = _no_other
    """Sets the network by which candidates are scored."""


@dataclass(frozen=True, eq=False)
class SortedStart:
    """The network in which a search takes place: its channels have the order of the settings."""

    supernet: Supernet
    orders: Orders
    """For every channel group the old place of each channel."""


@dataclass(frozen=True, eq=False)
class Structure:
    """The result of a search: a set of sub-networks with the weights from which they start."""

    supernet: Supernet
    """A network for the set, in eval mode, with its channels in order."""
    orders: Orders
    """For every channel group the place of each channel in the network that the search was given
    before it was sorted."""
    summary: Mapping[str, Any]
    """JSON-able: the method, the number of scored candidates, seconds and MAdds that they took,
    MAdds and share of every sub-network, hold-out accuracies, notes."""

    @property
    def subnets(self) -> SubnetSet:
        """The sub-networks."""
        return self.supernet.subnets


def sorted_start(problem: StructureProblem, start: Supernet, batches: Batches = ()) -> SortedStart:
    """The network of a search with its channels in the order of the settings.

    Args:
        problem: the problem.
        start: the network that was trained last, or the weights with which the sweep begins; not
            changed.
        batches: normalised images with labels, for orders `taylor` and `noise`.

    Raises:
        ConfigError: the channels of this network cannot have that order.
    """
    orders = channel_orders(problem, start, batches)
    return SortedStart(transfer(start, start.subnets, orders), orders)


def find_structure(
    problem: StructureProblem,
    start: SortedStart,
    facilities: Facilities,
    *,
    folder: Path,
    should_stop: Callable[[], bool] = lambda: False,
    fresh: Supernet | None = None,
    trained: Trained | None = None,
) -> Structure | None:
    """Run the search of the settings' method; continues from the trace in `folder`.

    Args:
        problem: the problem, already checked.
        start: the network whose sub-networks are scored.
        facilities: score candidates of that network, and train further ones.
        folder: receives `trace.jsonl`.
        should_stop: called before every score; True ends the search, to be continued by another
            call.
        fresh: the weights with which joint training begins instead of those of `start`, before any
            sorting.
        trained: what the method trained beforehand; None if it needs nothing.

    Returns:
        The result; None where the search was stopped.

    Raises:
        CheckpointError: the trace is damaged, or that of another search.
        ConfigError: the sub-networks that were found do not fit the network.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trace = Trace(folder / TRACE, {"problem": problem.digest, "start": weights_digest(start.supernet)})
    counted = replace(problem, subnets=with_ids(problem.subnets, start.supernet.spec, no_order(start.supernet)))
    search = structure_method(problem.settings.method).find(counted, start.supernet, trained or Trained())
    found = _run(search, facilities, trace, should_stop)
    if found is None:
        return None
    orders = start.orders if found.order is None else compose(start.orders, found.order)
    try:
        subnets = problem.set_of(found)
        if fresh is not None:
            weights = transfer(fresh, subnets, orders)
        elif found.network is not None:
            weights = transfer(found.network, subnets, None)
        else:
            weights = transfer(start.supernet, subnets, found.order)
    except ValueError as error:
        raise ConfigError(f"supernet.structure: the sub-networks that were found do not fit: {error}") from error
    counted = replace(problem, subnets=weights.subnets)
    return Structure(weights.eval(), orders, _summary(counted, found, trace))


def _run(search: Search, facilities: Facilities, trace: Trace, should_stop: Callable[[], bool]) -> Found | None:
    """Run a method's search against the trace; None where it was stopped."""
    answer: Sequence[Score] | None = None
    while True:
        try:
            event = next(search) if answer is None else search.send(answer)
        except StopIteration as end:
            trace.finish()
            result: Found = end.value
            return result
        if isinstance(event, Choice | Trainings | ScoredBy):
            _do(event, facilities, trace)
            answer = ()
            continue
        scores = _scores(event, facilities.score, trace, should_stop)
        if scores is None:
            return None
        answer = scores


def _do(event: Choice | Trainings | ScoredBy, facilities: Facilities, trace: Trace) -> None:
    """Do what a search asks for beside scores, and note it in the trace."""
    if isinstance(event, Choice):
        trace.choice(event)
    elif isinstance(event, Trainings):
        trace.trainings(event)
        facilities.train(event)
    else:
        trace.scored_by(event)
        facilities.use(event.network)


def _scores(
    candidates: Sequence[Candidate], score: Scorer, trace: Trace, should_stop: Callable[[], bool]
) -> list[Score] | None:
    """The scores of candidates, from the trace as far as it has them; None where it was stopped."""
    known = trace.known(candidates)
    missing = candidates[len(known) :]
    if not missing:
        return known
    if should_stop():
        return None
    scores = iter(score(missing))
    for number, candidate in enumerate(missing):
        if number and should_stop():
            return None
        given = next(scores, None)
        if given is None:
            raise ValueError(f"the scorer gave {number} scores for {len(missing)} candidates")
        trace.score(candidate, given)
        known.append(given)
    return known


class Trace:
    """The file of a search: a line for the search, one for every scored candidate, and one for
    every choice."""

    def __init__(self, path: Path, search: Mapping[str, Any]) -> None:
        """Open a trace, and remove a last line that is torn.

        Raises:
            CheckpointError: it is damaged, or that of another search.
        """
        self.path = path
        _without_torn_line(path)
        self._lines = _whole_lines(path)
        self._next = 0
        self.scores: list[tuple[Candidate, Score]] = []
        self._event({"kind": "search", **search})

    def known(self, candidates: Sequence[Candidate]) -> list[Score]:
        """The stored scores of the first of these candidates, as far as there are any."""
        scores: list[Score] = []
        for candidate in candidates:
            if self._next == len(self._lines):
                break
            line = self._replay({"kind": "candidate", **asdict(candidate)})
            scores.append(_score_in(line, self.path, self._next))
            self.scores.append((candidate, scores[-1]))
        return scores

    def score(self, candidate: Candidate, score: Score) -> None:
        """Add the score of a candidate."""
        self._append({"kind": "candidate", **asdict(candidate), **asdict(score)})
        self.scores.append((candidate, score))

    def choice(self, choice: Choice) -> None:
        """Add a choice, or compare it with the stored one."""
        self._event({"kind": "choice", **asdict(choice)})

    def trainings(self, trainings: Trainings) -> None:
        """Add networks that are trained, or compare them with the stored ones."""
        starts = {each.base.name: weights_digest(each.start) for each in trainings.networks}
        self._event({"kind": "trainings", "starts": starts})

    def scored_by(self, event: ScoredBy) -> None:
        """Add a change of the scored network, or compare it with the stored one."""
        self._event({"kind": "scored_by", "weights": weights_digest(event.network)})

    def finish(self) -> None:
        """Check that the trace ends with the search.

        Raises:
            CheckpointError: it has further lines.
        """
        if self._next < len(self._lines):
            raise self._other(self._next)

    def _event(self, event: Mapping[str, Any]) -> None:
        if self._next < len(self._lines):
            self._replay(event)
        else:
            self._append(event)

    def _replay(self, event: Mapping[str, Any]) -> Mapping[str, Any]:
        """The next stored line, which must be that of an event."""
        line = self._lines[self._next]
        if any(line.get(name) != value for name, value in json.loads(json.dumps(event)).items()):
            raise self._other(self._next)
        self._next += 1
        return line

    def _append(self, event: Mapping[str, Any]) -> None:
        self._lines.append(event)
        self._next += 1
        append_bytes(self.path, f"{json.dumps(event)}\n".encode(), is_synced=False)

    def _other(self, number: int) -> CheckpointError:
        return CheckpointError(
            f"{self.path}, line {number + 1}: was written by another search (other settings, weights or version); "
            "remove the file to search anew"
        )


def _score_in(line: Mapping[str, Any], path: Path, number: int) -> Score:
    try:
        return Score(int(line["num_correct"]), int(line["num_images"]), float(line["seconds"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}, line {number}: holds no score ({error!r}); remove the file to search anew"
        ) from error


def _without_torn_line(path: Path) -> None:
    """Remove a last line that was not written whole."""
    if path.is_file():
        text = path.read_bytes().decode("utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            atomic_write_text(path, whole)


def _whole_lines(path: Path) -> list[Mapping[str, Any]]:
    """The lines of a trace that were written whole; empty while there is no trace."""
    text = path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else ""
    whole = text[: text.rfind("\n") + 1]
    lines: list[Mapping[str, Any]] = []
    for number, line in enumerate(whole.splitlines(), start=1):
        read = None
        with suppress(ValueError, RecursionError):
            read = json.loads(line)
        if not isinstance(read, dict):
            raise CheckpointError(f"{path}, line {number}: is no JSON object; remove the file to search anew")
        lines.append(read)
    return lines


def scored_candidates(path: Path) -> list[tuple[Candidate, Score]]:
    """The candidates of a trace with their scores, in order; empty while there is no trace.

    Raises:
        CheckpointError: a line is damaged.
    """
    found = []
    for number, line in enumerate(_whole_lines(path), start=1):
        if line.get("kind") == "candidate":
            candidate = Candidate(int(line["round"]), tuple(line["widths"]), int(line["madds"]))
            found.append((candidate, _score_in(line, path, number)))
    return found


def weights_digest(supernet: Supernet) -> str:
    """SHA-256 of all tensors of a network."""
    digest = hashlib.sha256()
    for name, value in sorted(supernet.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _summary(problem: StructureProblem, found: Found, trace: Trace) -> dict[str, Any]:
    accuracies = {candidate.widths: score.accuracy for candidate, score in trace.scores}
    members = [
        {
            "name": subnet.name,
            "widths": list(subnet.widths),
            "madds": problem.madds(subnet.widths),
            "share": problem.share(problem.madds(subnet.widths)),
            "holdout_top1": accuracies.get(subnet.widths),
        }
        for subnet in (*found.members, *(() if found.teacher is None else (found.teacher,)))
    ]
    return {
        "method": problem.settings.method,
        "order": problem.sorted_by,
        "candidates": len(trace.scores),
        "seconds": sum(score.seconds for _, score in trace.scores),
        "madds": sum(candidate.madds * score.num_images for candidate, score in trace.scores),
        "subnets": members,
        "notes": list(found.notes),
    }


def save_structure(folder: Path, structure: Structure) -> Path:
    """Write a result as `structure.safetensors|json`, from which training can start; returns its
    stem."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / STRUCTURE
    save_supernet(stem, structure.supernet, {"structure": {"orders": structure.orders, "summary": structure.summary}})
    return stem


def load_structure(folder: Path) -> Structure:
    """Read a result.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    stem = folder / STRUCTURE
    supernet, meta = load_supernet(stem)
    try:
        stored = meta["structure"]
        orders = tuple(tuple(map(int, order)) for order in stored["orders"])
        return Structure(supernet, orders, stored["summary"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{stem}.json: holds no result of a structure search ({error!r}); remove {folder} to search anew"
        ) from error
