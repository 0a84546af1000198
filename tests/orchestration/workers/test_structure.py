"""Scores of candidates on Ray: those of one process, with any number of actors, also when one is
lost."""

from __future__ import annotations

import pytest

from dsnet.data.normalization import Normalization
from dsnet.errors import DsnetError
from dsnet.space.width_space import WidthSpace
from dsnet.structure.method import Candidate
from dsnet.structure.scoring import HoldOutScorer
from orchestration.workers.structure import ScoringJob, _Actors, ray_scorer
from orchestration.workers.training_watch import StallRules
from tests.dsnet.samples import lively_supernet, random_labels, random_pixels

pytestmark = pytest.mark.ray
NORMALIZATION = Normalization((120.0, 130.0, 125.0), (60.0, 55.0, 65.0))
NUM_IMAGES = 60


@pytest.fixture
def job() -> ScoringJob:
    return ScoringJob(lively_supernet(), random_pixels(NUM_IMAGES), random_labels(NUM_IMAGES), NORMALIZATION, "cpu")


def candidates() -> list[Candidate]:
    spec = lively_supernet().spec
    options = WidthSpace(0.3, 4).options(spec)
    return [
        Candidate(0, tuple(own[min(place, len(own) - 1)] for own in options), place + 1)
        for place in range(max(map(len, options)))
    ]


def test_scores_are_those_of_one_process_also_when_an_actor_is_lost(ray_cluster: None, job: ScoringJob) -> None:
    import ray

    alone = HoldOutScorer(lively_supernet(), random_pixels(NUM_IMAGES), random_labels(NUM_IMAGES), NORMALIZATION)
    wanted = [alone.score(each.widths).num_correct for each in candidates()]
    assert len(set(wanted)) > 2
    with ray_scorer(job, 1) as score:
        assert [each.num_correct for each in score(candidates())] == wanted
    actors = _Actors(job, 2, lambda: False, StallRules())
    scores = actors.score(candidates())
    found = [next(scores).num_correct]
    ray.kill(actors._idle[0])
    found += [each.num_correct for each in scores]
    actors.close()
    assert found == wanted
    assert {each.num_images for each in actors.score(candidates()[:1])} == {NUM_IMAGES}
    actors.close()


def test_a_candidate_that_does_not_fit_is_one_clear_error(ray_cluster: None, job: ScoringJob) -> None:
    with ray_scorer(job, 1) as score, pytest.raises(DsnetError, match=r"could not be scored: ValueError: .*widths"):
        list(score([Candidate(0, (1, 2), 1)]))
