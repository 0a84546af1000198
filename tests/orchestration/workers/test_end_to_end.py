"""End-to-end trials as a worker puts them together: from a pickled maker and shared
read-only arrays."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dsnet.data.settings import Augmentation
from dsnet.errors import CheckpointError
from dsnet.gates.end_to_end import GateImages, train_end_to_end, train_stage
from dsnet.gates.settings import EndToEndSettings
from dsnet.measure.evaluate import build_routing_table
from dsnet.measure.latency_table import LatencyTable, Timing
from dsnet.routing.table_routing import run_on_table
from orchestration.config.gate import GateConfig
from orchestration.runs.stages import canonical_settings
from orchestration.workers.end_to_end import EndToEndCheck, MakeEndToEndTrial, shared_images
from orchestration.workers.gate_trials import MakeGateTrial
from orchestration.workers.self_check import REPEATED
from orchestration.workers.sent_network import SentNetwork, network_arrays
from search.gate_trial import gate_settings, router_of
from search.study.runner import PROGRESS, SerialRunner, TrialSpec
from tests.dsnet.samples import NORMALIZATION, small_supernet, tensor_data

FAMILY = "ds_resnet"
SUPERNET = small_supernet(FAMILY)
DATA = tensor_data(24, split="gate")
IMAGES = GateImages(DATA.images("gate"), DATA.labels("gate"), NORMALIZATION)
TABLES = {
    "gate": build_routing_table(SUPERNET, DATA, "gate", NORMALIZATION),
    "val": build_routing_table(SUPERNET, tensor_data(30), "val", NORMALIZATION),
}
RULES = EndToEndSettings(epochs=1)
SMALL_BATCHES = {"gate.optimizer.batch_size": 8}


def make_trial(rules: EndToEndSettings = RULES) -> MakeEndToEndTrial:
    """As it arrives in a worker."""
    millisecond = {1: Timing(1.0, 0.0, 3)}
    tails = {1: {subnet.name: Timing(float(k), 0.0, 3) for k, subnet in enumerate(SUPERNET.subnets)}}
    latency = LatencyTable("a clock", 1, {}, millisecond, millisecond, tails)
    defaults = canonical_settings({"gate": GateConfig(trainer="end_to_end").model_dump(mode="json")})
    tables = MakeGateTrial(
        {split: table.meta() for split, table in TABLES.items()}, SUPERNET.subnets, latency, defaults
    )
    maker = MakeEndToEndTrial(tables, SentNetwork.of(SUPERNET), NORMALIZATION, rules)
    return pickle.loads(pickle.dumps(maker))  # noqa: S301 - our own bytes, as Ray sends them


def shared_arrays() -> dict[str, NDArray[Any]]:
    """Read-only, as they lie in the object store."""
    arrays = {f"{split}/{name}": array for split, table in TABLES.items() for name, array in table.arrays().items()}
    views = {
        name: array.view() for name, array in {**arrays, **shared_images(IMAGES), **network_arrays(SUPERNET)}.items()
    }
    for view in views.values():
        view.flags.writeable = False
    return views


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
@pytest.mark.parametrize("router", ["gate", "gates"])
def test_a_trial_deploys_the_heads_that_its_parameters_train(router: str) -> None:
    trial = make_trial()(shared_arrays()).function
    spec = TrialSpec(0, 7, {**SMALL_BATCHES, "gate.target": 0.3, "gate.router": router})
    metrics, arrays = trial(spec)
    deployed = router_of(arrays)
    assert deployed.kind == router
    assert metrics["madds_m"] == pytest.approx(run_on_table(deployed, TABLES["val"]).madds.mean() / 1e6)
    assert metrics["latency_ms"] >= 2.0
    defaults = canonical_settings({"gate": GateConfig().model_dump(mode="json")})
    settings = gate_settings(spec.params, defaults, TABLES["gate"], 7)
    assert (settings.target, settings.batch_size, settings.seed) == (0.3, 8, 7)
    heads = train_end_to_end(SUPERNET, IMAGES, settings, RULES)
    stored = [array for array in arrays.values() if array.shape == tuple(heads[0].shape)]
    assert any(np.array_equal(array, heads[0].numpy()) for array in stored)


def test_the_makers_epochs_and_augmentation_reach_the_training() -> None:
    one, two, augmented = (
        make_trial(rules)(shared_arrays()).function(TrialSpec(0, 7, SMALL_BATCHES))[1]["weight"]
        for rules in (RULES, EndToEndSettings(epochs=2), replace(RULES, augmentation=Augmentation(crop_padding=2)))
    )
    assert not np.array_equal(one, two)
    assert not np.array_equal(one, augmented)


def test_trials_do_not_influence_each_other() -> None:
    make = make_trial()
    first, second = (TrialSpec(slot, slot, SMALL_BATCHES) for slot in (0, 1))
    together = {outcome.slot: outcome for outcome in SerialRunner(make(shared_arrays())).run([first, second])}
    alone = next(SerialRunner(make(shared_arrays())).run([second]))
    assert together[1].state == alone.state == "complete"
    assert together[1].metrics == alone.metrics
    assert np.array_equal(together[1].arrays["weight"], alone.arrays["weight"])
    assert not np.array_equal(together[0].arrays["weight"], alone.arrays["weight"])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("router", ["gate", "gates"])
def test_a_trial_in_stages_is_the_trial_at_once_with_and_without_its_progress(router: str, optimizer: str) -> None:
    rules = EndToEndSettings(epochs=4, augmentation=Augmentation(crop_padding=2))
    trial = make_trial(rules)(shared_arrays()).function
    whole = TrialSpec(3, 7, {**SMALL_BATCHES, "gate.router": router, "gate.optimizer.name": optimizer})
    metrics, arrays = trial(whole)
    assert not any(name.startswith(PROGRESS) for name in arrays)
    progress: dict[str, NDArray[Any]] = {}
    for until in (1, 3, None):
        spec = replace(whole, until=until)
        alone, alone_arrays = trial(spec)
        met, met_arrays = trial(replace(spec, progress=progress))
        assert met == alone
        assert met_arrays.keys() == alone_arrays.keys()
        assert all(np.array_equal(array, alone_arrays[name]) for name, array in met_arrays.items())
        progress = {name: array for name, array in met_arrays.items() if name.startswith(PROGRESS)}
        assert bool(progress) == (until is not None)
        for array in progress.values():
            array.flags.writeable = False  # as they come back from the object store
    assert met == metrics
    assert all(np.array_equal(array, arrays[name]) for name, array in met_arrays.items())


def test_what_a_stage_returns_beside_its_progress_is_the_router_that_it_was_scored_by() -> None:
    trial = make_trial(EndToEndSettings(epochs=2))(shared_arrays()).function
    metrics, arrays = trial(TrialSpec(0, 7, SMALL_BATCHES, until=1))
    deployed = router_of({name: array for name, array in arrays.items() if not name.startswith(PROGRESS)})
    assert metrics["madds_m"] == pytest.approx(run_on_table(deployed, TABLES["val"]).madds.mean() / 1e6)


def test_a_stage_of_another_trial_fails_with_the_reason() -> None:
    run = SerialRunner(make_trial(EndToEndSettings(epochs=2))(shared_arrays())).run
    one = TrialSpec(0, 7, {**SMALL_BATCHES, "gate.router": "gates"}, until=1)
    progress = {name: array for name, array in next(run([one])).arrays.items() if name.startswith(PROGRESS)}
    outcome = next(run([replace(one, params=SMALL_BATCHES, progress=progress)]))
    assert outcome.state == "failed"
    assert outcome.reason is not None
    assert "heads of the shapes" in outcome.reason


def test_a_bad_parameter_fails_its_trial_alone() -> None:
    diverging = {"gate.optimizer.name": "sgd", "gate.optimizer.lr": 1e6, "gate.losses.cls": 1e38}
    bad = [{"gate.router": "cascade"}, diverging, {}]
    specs = [replace(TrialSpec(0, 0, {**SMALL_BATCHES, **changes}), slot=slot) for slot, changes in enumerate(bad)]
    unknown, infinite, good = SerialRunner(make_trial()(shared_arrays())).run(specs)
    assert unknown.reason is not None
    assert "gate and gates, not 'cascade'" in unknown.reason
    assert infinite.reason is not None
    assert "NonFiniteLossError" in infinite.reason
    assert good.state == "complete"


def test_an_unknown_parameter_is_refused() -> None:
    trial = make_trial()(shared_arrays()).function
    with pytest.raises(ValueError, match=r"gate\.end\.epochs"):
        trial(TrialSpec(0, 7, {"gate.end.epochs": 3}))


def test_a_network_that_does_not_fit_its_weights_is_refused() -> None:
    arrays = {name: array for name, array in shared_arrays().items() if not name.endswith("classifier.bias")}
    assert len(arrays) < len(shared_arrays())
    with pytest.raises(CheckpointError, match=r"the network that the driver sent: .* missing classifier\.bias"):
        make_trial()(arrays)


def test_the_check_before_a_search_trains_the_same_gate_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    function = make_trial()(shared_arrays())
    finding = EndToEndCheck()(function)
    assert finding.unequal == ()
    assert finding == EndToEndCheck()(function)
    draws = iter(range(100))
    real = train_stage

    def unsteady(*arguments: Any, **options: Any) -> Any:
        stage = real(*arguments, **options)
        return replace(stage, heads=[head + next(draws) for head in stage.heads])

    monkeypatch.setattr("orchestration.workers.end_to_end.train_stage", unsteady)
    assert EndToEndCheck()(function).unequal == (REPEATED,)
