"""The verify stage: freeze the front, open the sealed split, run the front's gates on it, and
analyse them beside their controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from dsnet.environment import resolve_device
from dsnet.errors import CheckpointError
from dsnet.files import atomic_write_json, file_sha256, known_sha256, read_object, read_sealed, set_aside, write_sealed
from dsnet.network.supernet import Supernet
from dsnet.routers.base import Router
from dsnet.routing.routing_table import RoutingTable
from dsnet.wording import plural
from orchestration.pipeline.agreement import check_agreement, time_front
from orchestration.pipeline.context import Launch
from orchestration.pipeline.measure_and_table import build_table
from orchestration.prepare.preparation import latency_settings, verify_definition
from orchestration.progress import Task
from orchestration.results.verified import Agreement
from orchestration.runs.folder import RunDir
from orchestration.runs.stages import StageDir, StagePlan, StageRecord, plan_stage
from search.front.analysis import Bootstrap, analyse_split
from search.front.analysis_records import BudgetPick, SplitAnalysis
from search.front.ceiling import RouteForecast

VERIFY_FILE = "verify.json"


def verify_stage(work: Launch, plans: Mapping[str, StagePlan], supernet: Supernet) -> None:
    """Verify the front of a search, or its sample; the stored result holds all that report and
    export need of the test split."""
    work.check_stop()
    config, run, prepared, results = work.config, work.run, work.prepared, work.results
    front, contenders = results.front_sample, results.contenders
    definition = verify_definition(config, prepared.fingerprint, front, contenders)
    plan = plan_stage(run, definition, {"search": plans["search"].key})

    def verify(folder: Path) -> Sequence[Path]:
        num_openings = work.count_test_opening("verify")
        data = prepared.open_test()
        table_key = plans["table"].key
        sealed = run.sealed_table(table_key)
        if not _is_whole(work, sealed):
            build_table(work, supernet, data, "test", sealed)
            write_sealed(hash_file(sealed), {"file": sealed.name, "file_sha256": file_sha256(sealed)})
        test, val = RoutingTable.load(sealed), RoutingTable.load(run.table(table_key, "val"))
        routers = {slot: results.router(slot) for slot in front}
        known = known_agreements(run, plan.record)
        agreements = []
        with work.progress.bar(Task("verify: the front on test", len(routers), "gate")) as bar:
            for slot, router in routers.items():
                if slot not in known:
                    work.check_stop()
                    net = supernet.to(resolve_device(config.supernet.device))
                    known[slot] = check_agreement(slot, net, router, test, data.images("test"), prepared.normalization)
                agreements.append(known[slot])
                bar.update(len(agreements))
        timed = {
            name: time_front(
                supernet,
                routers,
                data.images("test"),
                prepared.normalization,
                settings,
                before_each=work.check_stop,
            )
            for name, settings in latency_settings(config).items()
        }
        analyser = _SplitAnalyser.of(work, plans, val, routers)
        on_test = analyser.analysis(test)
        latencies = {
            name: latency.beside(results.latencies[name], on_test.points, on_test.routes).to_json()
            for name, latency in timed.items()
        }
        content = {
            "front": list(front),
            "contenders": [asdict(pick) for pick in contenders],
            "num_openings": num_openings,
            "agreements": [asdict(agreement) for agreement in agreements],
            "latencies": latencies,
            "val": analyser.analysis(val).to_json(),
            "test": on_test.to_json(),
        }
        output = folder / VERIFY_FILE
        atomic_write_json(output, content)
        return [output]

    num_before = 0 if plan.is_done else len(known_agreements(run, plan.record).keys() & set(front))
    work.run_stage(plan, verify)
    verified = results.verified
    assert verified is not None
    ties = sum(agreement.num_ties for agreement in verified.agreements)
    work.progress.say(
        f"verify: {plural(len(front), 'gate')} ran on {verified.test.num_images} test images; every image agrees with the routing table"
        + (f" ({ties} numerical ties)" if ties else "")
        + (f"; {num_before} of them ran in an earlier launch" if num_before else "")
    )


def hash_file(path: Path) -> Path:
    """The file beside a table that holds its SHA-256; the table of `test` is made by another stage
    than the one in whose folder it lies, and is no output of that."""
    return path.with_name(f"{path.name}.json")


def _is_whole(work: Launch, table: Path) -> bool:
    """Whether the table of `test` is there as it was written; a damaged one is set aside."""
    record = hash_file(table)
    problem = None
    if table.is_file():
        try:
            if record.is_file() and read_sealed(record).get("file_sha256") != known_sha256(table):
                problem = "its SHA-256 differs"
            RoutingTable.load(table)
        except CheckpointError as error:
            problem = str(error)
    if problem is not None:
        kept = set_aside(table).name
        work.progress.warn(f"verify: {table} is not as it was written ({problem}); it is kept as {kept} and made again")
    if problem is not None or not table.is_file():
        record.unlink(missing_ok=True)
    return table.is_file()


def known_agreements(run: RunDir, record: StageRecord) -> dict[int, Agreement]:
    """Agreements by slot, from earlier results of the stage about gates of the same search, and so
    of the same tables and weights.

    A gate that has agreed with its table is not run again, because nothing that could change the
    result has changed. All gates of a front are timed together, whether their agreement is known or
    not, because times measured at different moments cannot be compared.

    Args:
        run: run whose verify folders are read.
        record: record of the stage that will run.
    """
    found: dict[int, Agreement] = {}
    for path in sorted((run.path / record.stage).glob("*/")):
        folder = StageDir(path)
        earlier = folder.record() if folder.is_done() else None
        if earlier is None or (earlier.version, earlier.parent_keys) != (record.version, record.parent_keys):
            continue
        with suppress(KeyError, TypeError):  # another release wrote it
            found |= {item["slot"]: Agreement(**item) for item in read_object(path / VERIFY_FILE)["agreements"]}
    return found


@dataclass(frozen=True)
class _SplitAnalyser:
    """The settings and routers with which a split is analysed."""

    forecast: RouteForecast
    val: RoutingTable
    front: Mapping[int, Router]
    contenders: Mapping[BudgetPick, Router]
    """The router of the best trial of each kind for each budget, chosen on `val`."""
    num_classes: int
    bootstrap: Bootstrap

    @classmethod
    def of(
        cls,
        work: Launch,
        plans: Mapping[str, StagePlan],
        val: RoutingTable,
        front: Mapping[int, Router],
    ) -> _SplitAnalyser:
        """Fit the reachable ceiling on `gate`, and load the routers of the contenders."""
        run, results = work.run, work.results
        forecast = RouteForecast.fit(RoutingTable.load(run.table(plans["table"].key, "gate")))
        contenders = {pick: results.router(pick.slot) for pick in results.contenders}
        return cls(
            forecast,
            val,
            front,
            contenders,
            num_classes=len(work.prepared.image_set.class_names),
            bootstrap=Bootstrap(
                objectives=tuple((metric.name, metric.goal) for metric in results.config.metrics),
                measured={slot: results.record(slot).metrics for slot in front},
            ),
        )

    def analysis(self, reported: RoutingTable) -> SplitAnalysis:
        """Analyse the front and every kind of router on a split."""
        return analyse_split(
            self.forecast,
            self.val,
            reported,
            self.front,
            self.contenders,
            num_classes=self.num_classes,
            bootstrap=self.bootstrap,
        )
