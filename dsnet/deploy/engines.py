"""Inference engines, by name: what runs the segments of a bundle.

`torch` runs its weights. Every other engine runs the ONNX graphs in the bundle's folder `onnx`
(`dsnet.deploy.onnx_files`). A new one is one call of `register`. Needs no engine to be installed.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsnet.errors import ConfigError
from dsnet.wording import way_out

if TYPE_CHECKING:
    from numpy.typing import NDArray

AUTO = "auto"
"""The first engine that is installed and whose files the bundle has."""
TORCH = "torch"

Graph = Callable[[Mapping[str, "NDArray[Any]"]], Sequence["NDArray[Any]"]]
"""A graph that is ready to run: inputs by name -> outputs, in the order of the graph. It may be
called from several threads at a time."""


@dataclass(frozen=True)
class Engine:
    """An engine for ONNX graphs."""

    name: str
    package: str
    """Its Python package, which is imported when a bundle is loaded."""
    open: Callable[[Path, int], Graph]
    """Function (file of a graph, number of threads) -> the graph, which does not need the file any
    more."""
    label: str = ""
    """Its name in tables and reports; empty for `name`."""
    extra: str = ""
    """The extra of dsnet-orch that installs it; empty if none does."""

    @property
    def is_installed(self) -> bool:
        """Whether its package is there."""
        return find_spec(self.package) is not None

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"pip install 'dsnet-orch[{self.extra}]'" if self.extra else f"pip install {self.package}"

    @property
    def title(self) -> str:
        """Its label and version, such as `ONNX Runtime 1.20.0`; the package must be installed."""
        return f"{self.label or self.name} {version(self.package)}"


_ENGINES: dict[str, Engine] = {}
_EXPORT_PACKAGES = ("onnx", "onnxscript")
"""Packages that write graphs."""


def register(engine: Engine) -> Engine:
    """Register an engine under its name; returns it.

    Raises:
        ValueError: the name is taken.
    """
    if engine.name in (AUTO, TORCH) or _ENGINES.setdefault(engine.name, engine) is not engine:
        raise ValueError(f"there is an engine {engine.name!r} already; choose another name")
    return engine


def graph_engines() -> tuple[Engine, ...]:
    """All engines for ONNX graphs, in the order in which `auto` prefers them."""
    return tuple(_ENGINES.values())


def engine_names() -> tuple[str, ...]:
    """Names that `load_bundle` accepts beside `auto`, in the order in which `auto` prefers them."""
    return (*_ENGINES, TORCH)


def chosen_engine(name: str, has_graphs: bool, on_cpu: bool) -> Engine | None:
    """The engine of a name; None for torch.

    Args:
        name: `auto` or one of `engine_names`.
        has_graphs: whether the bundle has ONNX graphs.
        on_cpu: whether it runs on the CPU; other engines than torch run nowhere else.

    Raises:
        ConfigError: there is no such engine, or it cannot run this bundle here.
    """
    if name == AUTO:
        usable = has_graphs and on_cpu
        return next((engine for engine in _ENGINES.values() if usable and engine.is_installed), None)
    if name == TORCH:
        return None
    if name not in _ENGINES:
        raise ConfigError(f"unknown engine {name!r}{way_out(name, (AUTO, *engine_names()))}")
    engine = _ENGINES[name]
    if not engine.is_installed:
        raise ConfigError(f"engine {name}: package {engine.package} is not installed: {engine.install}")
    if not on_cpu:
        raise ConfigError(f"engine {name} runs on the CPU only: load the bundle with device='cpu', or engine='torch'")
    if not has_graphs:
        raise ConfigError(
            f"engine {name}: the bundle has no ONNX files; export it with export.formats: [bundle, onnx], or use engine='torch'"
        )
    return engine


def can_write_graphs() -> bool:
    """Whether the packages that write ONNX graphs are installed."""
    return all(find_spec(package) is not None for package in _EXPORT_PACKAGES)


def timing_engine(name: str) -> Engine | None:
    """The engine with which latency is measured on the CPU; None for torch.

    Raises:
        ConfigError: there is no such engine, or it or a package that writes its graphs is missing.
    """
    engine = chosen_engine(name, has_graphs=True, on_cpu=True)
    missing = [package for package in _EXPORT_PACKAGES if engine and find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"engine {name}: package {missing[0]} is not installed: pip install 'dsnet-orch[deploy]', or use engine torch"
        )
    return engine


def _onnxruntime(file: Path, threads: int) -> Graph:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: session.run(names, inputs)


register(Engine("onnxruntime", "onnxruntime", _onnxruntime, "ONNX Runtime", "deploy"))


@cache
def _openvino_core() -> Any:
    """OpenVINO's runtime, one for the whole process.

    Each would set a stack of its own for signal handlers, and give back that of another one at its
    end, which may have ended before: the next signal would end the process.
    """
    # OpenVINO then uses its own stand-in, which sends nothing.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino.Core()


def _openvino(file: Path, threads: int) -> Graph:
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 on some processors
        "ENABLE_CPU_PINNING": False,  # several networks would be bound to the same cores
    }
    compiled = _openvino_core().compile_model(str(file), "CPU", settings)
    outputs, own = compiled.outputs, threading.local()

    def run(inputs: Mapping[str, NDArray[Any]]) -> Sequence[NDArray[Any]]:
        if not hasattr(own, "request"):
            own.request = compiled.create_infer_request()
        found = own.request.infer(inputs, share_inputs=True)
        return [found[output] for output in outputs]

    return run


register(Engine("openvino", "openvino", _openvino, "OpenVINO", "openvino"))
