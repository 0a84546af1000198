"""The Ray Tune scheduler of a sweep, made with the lengths of its trainings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestration.workers.tune_ledger import TuneRules

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler

from orchestration.config.schedulers import TIME, check_scheduler, made_scheduler, scheduler_of_path


def make_scheduler(rules: TuneRules, epochs: int) -> TrialScheduler:
    """Make the scheduler of a sweep, with the metric to maximise.

    Args:
        rules: rules of the sweep, checked already.
        epochs: number of epochs of the longest training, >= 1.

    Raises:
        ConfigError: as `check_scheduler`; also if the options do not fit the number of epochs.
    """
    from orchestration.workers.tune_schedule import METRIC, SCHEDULERS

    check_scheduler(rules.scheduler, rules.options)
    if rules.scheduler in SCHEDULERS:
        made = {
            "none": {},
            "asha": {
                "time_attr": TIME,
                "max_t": epochs,
                "grace_period": max(1, epochs // 9),
                "reduction_factor": 3,
            },
            "median": {"time_attr": TIME, "grace_period": max(1, epochs // 3), "min_samples_required": 2},
            "hyperband": {"time_attr": TIME, "max_t": epochs},
        }[rules.scheduler]
        scheduler = made_scheduler(rules.scheduler, SCHEDULERS[rules.scheduler], {**made, **rules.options})
    else:
        scheduler = scheduler_of_path(rules.scheduler, rules.options, epochs)
    scheduler.set_search_properties(METRIC, "max")
    return scheduler
