"""What fits on the nodes of a cluster, and what is said if something does not."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from dsnet.errors import ClusterLostError, PreflightError
from orchestration.workers import tune_supernets
from orchestration.workers.node_check import code_digest, differences, facts_of_this_machine
from orchestration.workers.nodes import Need, Node, most_threads, nodes_in_words, refuse_without_room, room
from orchestration.workers.supernet import training_need
from orchestration.workers.trials import Actors
from orchestration.workers.tune_supernets import members_need


def nodes(*cpus: int, gpus: int = 0) -> list[Node]:
    return [Node(f"10.0.0.{number}", {"CPU": float(count), "GPU": float(gpus)}) for number, count in enumerate(cpus)]


def placed(free: list[int], threads: int, processes: int) -> bool:
    """Whether processes can be placed one after another: an oracle by trying."""
    left = list(free)
    for _ in range(processes):
        places = [index for index, count in enumerate(left) if count >= threads]
        if not places:
            return False
        left[places[0]] -= threads
    return True


@pytest.mark.parametrize("cpus", [(1,), (1, 1), (4, 1), (3, 3, 2), (8,), (0, 2)])
def test_threads_are_the_most_that_can_be_placed(cpus: tuple[int, ...]) -> None:
    for processes in range(1, 9):
        threads = most_threads(nodes(*cpus), processes, {})
        assert threads == 1 or placed(list(cpus), threads, processes)
        assert not placed(list(cpus), threads + 1, processes)


def test_room_is_what_can_be_placed_one_after_another() -> None:
    for cpus, threads in itertools.product(itertools.product(range(4), repeat=3), (1, 2, 3)):
        count = room(nodes(*cpus), {"CPU": threads})
        assert placed(list(cpus), threads, count)
        assert not placed(list(cpus), threads, count + 1)


def test_one_gpu_on_each_of_two_nodes_takes_two_workers_and_no_third() -> None:
    both = nodes(8, 8, gpus=1)
    assert room(both, {"CPU": 1, "GPU": 1}) == 2
    assert room(both, {"CPU": 1, "GPU": 0.5}) == 4
    assert room(nodes(8, 8), {"CPU": 1, "GPU": 1}) == 0
    assert most_threads(both, 2, {"GPU": 1.0}) == 8
    assert most_threads(nodes(8, 8), 1, {"GPU": 1.0}) == 1, "no node has one: it is refused afterwards"


def test_the_message_says_what_the_nodes_have_and_what_to_change() -> None:
    with pytest.raises(PreflightError) as caught:
        refuse_without_room(training_need(1, 2, "cpu"), nodes(1, 1))
    assert str(caught.value) == (
        "supernet.workers 1 x supernet.threads 2: one process needs 2 CPUs, but the Ray cluster has room for none "
        "(2 nodes with 1 CPU each); lower supernet.threads, or raise ray.num_cpus"
    )
    assert caught.value.exit_code == 3
    refuse_without_room(training_need(2, 1, "cpu"), nodes(1, 1))
    with pytest.raises(
        PreflightError, match=r"3 processes need 1 CPU each, but .* room for 2 .*lower supernet\.workers"
    ):
        refuse_without_room(training_need(3, 1, "cpu"), nodes(1, 1))
    with pytest.raises(
        PreflightError, match=r"1 CPU and 1 GPU, but .*\(1 node with 2 CPUs and no GPU\); add nodes with a GPU"
    ):
        refuse_without_room(training_need(1, 1, "cuda"), nodes(2))
    with pytest.raises(
        PreflightError, match=r"supernets\.concurrent 3 x supernet\.threads 1.*lower supernets\.concurrent"
    ):
        refuse_without_room(members_need(3, 1, "cpu"), nodes(1, 1))
    with pytest.raises(PreflightError, match=r"room for none \(no node\)"):
        refuse_without_room(training_need(1, 1, "cpu"), [])


@pytest.mark.parametrize(
    ("actors", "said"),
    [
        (Actors(number=5), r"ray\.trial_actors 5: 5 processes .* room for 4 .*lower ray\.trial_actors, or raise"),
        (Actors(threads=3), r"gate\.end_to_end\.threads 3: one process needs 3 CPUs.*lower gate\.end_to_end\.threads"),
        (Actors(resources={"memory": 2.0**32}), r"4,096 MiB of memory.*lower ray\.trial_resources\.memory"),
    ],
)
def test_trial_actors_that_fit_on_no_node_are_refused(actors: Actors, said: str) -> None:
    with pytest.raises(PreflightError, match=said):
        refuse_without_room(actors.need(), nodes(2, 2))


def test_trial_actors_are_counted_by_node() -> None:
    assert Actors().places(nodes(2, 1)) == 3
    assert Actors(threads=2).places(nodes(2, 1)) == 1
    assert Actors(number=2).places(nodes(2, 1)) == 2
    assert Actors(number=4).places(nodes(2)) == 2, "a node has left since the start"


def test_nodes_of_different_sizes_are_listed_by_size() -> None:
    assert nodes_in_words(nodes(1, 1, 8), {"CPU": 1}) == "2 nodes with 1 CPU each; 1 node with 8 CPUs"
    assert Need(what="x", number=1, each={"CPU": 1}, remedy="y").number == 1


def test_a_node_with_another_version_or_other_files_is_told_from_this_machine(tmp_path: Path) -> None:
    here = facts_of_this_machine()
    assert differences(here, here) == []
    assert differences({**here, "torch": "1.0"}, here) == [f"torch 1.0 there, {here['torch']} here"]
    assert differences({name: value for name, value in here.items() if name != "ray"}, here) == [
        f"ray absent there, {here['ray']} here"
    ]
    (tmp_path / "dsnet").mkdir()
    seen = set()
    for name, text in (("a", "1"), ("b", "1"), ("b", "2")):
        (tmp_path / "dsnet" / f"{name}.py").write_text(text)
        seen.add(code_digest(tmp_path))
    assert len(seen) == 3


class Clock:
    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


def test_supernets_wait_for_a_place_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, left = Clock(), nodes(2)
    monkeypatch.setattr(tune_supernets, "time", clock)
    monkeypatch.setattr(tune_supernets, "cluster_nodes", lambda: left)
    monkeypatch.setattr("orchestration.workers.nodes.cluster_nodes", lambda: left)
    watch = tune_supernets._PlaceWatch({"CPU": 2.0})

    def wait(seconds: int, *, is_idle: bool) -> None:
        for _ in range(seconds):
            clock.now_s += 1
            watch.look(is_idle=is_idle)

    wait(1000, is_idle=False)
    wait(int(tune_supernets.IDLE_TIMEOUT_S) - 10, is_idle=True)
    wait(5, is_idle=False)
    with pytest.raises(ClusterLostError, match=r"no node with 2 CPUs free within 120 s.*1 node with 2 CPUs"):
        wait(int(tune_supernets.IDLE_TIMEOUT_S) + 10, is_idle=True)
    watch = tune_supernets._PlaceWatch({"CPU": 2.0})
    left = nodes(1)
    with pytest.raises(ClusterLostError, match=r"no node with 2 CPUs free within 60 s.*1 node with 1 CPU"):
        wait(int(tune_supernets.PLACE_TIMEOUT_S) + 10, is_idle=False)
