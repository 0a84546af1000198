"""Whether the measured times of a run are unreliable, in words."""

from __future__ import annotations

from dsnet.wording import plural
from orchestration.config.command_lines import command_line, has_own_code
from orchestration.results.run import RunResults


def timing_doubt(results: RunResults) -> str | None:
    """A sentence that says why the measured times are unreliable and what to do; None if nothing is
    wrong."""
    noise = timing_noise(results)
    if noise is None:
        return None
    return (
        f"the latencies are unreliable, because the machine was busy or its times varied ({noise}); "
        f"measure again on an idle machine: {command_line('measure', results.run.path, own_code=has_own_code(results.config))}"
    )


def timing_noise(results: RunResults) -> str | None:
    """Which of the timings were disturbed, and how; None if none was."""
    timed = [(f"sub-networks{_on(name)}", table.noise) for name, table in results.newest_latencies.items()]
    if results.verified is not None:
        timed += [(f"the front{_on(name)}", own.noise) for name, own in results.verified.latencies.items()]
    found = [f"{what}: {why}" for what, why in timed if why is not None]
    if not found:
        return None
    others = f"; and {plural(len(found) - 1, 'more timing')}" if len(found) > 1 else ""
    return f"{found[0]}{others}"


def _on(device: str) -> str:
    return f" on {device}" if device else ""
