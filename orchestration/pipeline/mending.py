"""Damaged files of a run, which a launch sets aside first, so that the stages make them again."""

from __future__ import annotations

from orchestration.runs.folder import RunDir
from orchestration.runs.manifest import Manifest
from orchestration.runs.stages import StageDir, mend_stages
from search.study.journal_chain import mend_journal


def mend_run(run: RunDir) -> list[str]:
    """Set the damaged files of the run's present stages aside. Only for the process that holds the
    run's lock.

    Returns:
        What was found, a sentence per file.
    """
    entry = Manifest(run.manifest_path).read()["stages"].get("search")
    told = [] if entry is None else mend_search(run, str(entry["key"]))
    return told + mend_stages(run)


def mend_search(run: RunDir, key: str) -> list[str]:
    """Cut the study of a search back to the records that are as they were written, if it is
    damaged; the search then goes on from there. Arguments and result as for `mend_run`."""
    journal, folder = run.study_journal(key), StageDir(run.stage_dir("search", key))
    found = mend_journal(journal, folder.recorded_sha256(journal.name))
    if found is None:
        return []
    told, has_lost_records = found
    if has_lost_records:
        folder.reopen()
    return [told]
