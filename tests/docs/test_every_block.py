"""Every block of README.md and docs/*.md runs as pasted, in order, in a fresh folder.

Images are small ones made here, in the places that the commands name. Commands that a test cannot
run as they are follow `RULES`, each with its reason; all others run as pasted.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.docs.blocks import REPOSITORY, Block, blocks
from tests.dsnet.stored.released import NUM_CLASSES, whole_checkpoint

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.timeout(7200)]

COMMAND_TIMEOUT_S = 1800.0
"""A sweep of photos takes some minutes; on a machine with much other work, many times that."""
SERVER_TIMEOUT_S = 120.0
EXIT_MORE = 6


@dataclass(frozen=True)
class Rule:
    """How commands that begin with `start` are run instead of as pasted, and why."""

    start: str
    how: Callable[[Reader, str], None]
    why: str


class Reader:
    """Simulates a reader who pastes one block after the other into a terminal."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "dsnet-orch"
        self.home = folder / "home"
        _copy_of_the_repository(self.folder)
        programs = _programs(folder / "bin")
        path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = {**os.environ, "HOME": str(self.home), "PATH": path, "PYTHONPATH": str(REPOSITORY)}
        self.environment.pop("DSNET_DATA", None)

    def start(self, command: str) -> subprocess.Popen[str]:
        """Start a command line in a shell."""
        return subprocess.Popen(
            ["bash", "-euc", command],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, command: str) -> None:
        """Run a command line to its end; its exit code must be 0."""
        process = self.start(command)
        try:
            output, _ = process.communicate(timeout=COMMAND_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        assert process.returncode == 0, f"$ {command}\n{output}"


def as_makefile_does(reader: Reader, command: str) -> None:
    """The recipe of a target, without the step that makes the environment."""
    target = command.split()[1]
    (recipe,) = re.findall(rf"^{target}: \$\(READY\)\n\t(.+)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    reader.run(recipe.replace("$(BIN)/", ""))


def not_here(reader: Reader, command: str) -> None:
    """Do nothing; the quick tests check that its target, extra or file exists."""


def only_validated(reader: Reader, command: str) -> None:
    """Check the same file, preset and options."""
    reader.run(command.replace("dsnet-orch launch", "dsnet-orch validate"))


def until_it_answers(reader: Reader, command: str) -> None:
    """Start a server, wait for the link that it prints, and press Ctrl-C."""
    process = reader.start(f"exec {command}")
    assert process.stdout is not None
    try:
        deadline, lines = time.monotonic() + SERVER_TIMEOUT_S, []
        while not any("http://127.0.0.1:" in line for line in lines):
            line = process.stdout.readline()
            assert line, f"it ended: $ {command}\n{''.join(lines)}"
            assert time.monotonic() < deadline, f"no link: $ {command}\n{''.join(lines)}"
            lines.append(line)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(SERVER_TIMEOUT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def repeated(reader: Reader, command: str) -> None:
    """Repeat a command that ends with 6 while there is more to do, as its comment says."""
    reader.run(f"while ! {command}; do [ $? = {EXIT_MORE} ] || exit 1; done")


RULES = (
    Rule("make launch", as_makefile_does, "the suite runs in an environment that is made already"),
    Rule("make test", not_here, "this is the suite"),
    Rule("source .venv/bin/activate", not_here, "the suite's environment is active"),
    Rule("pip install", not_here, "the suite needs no package index"),
    Rule("dsnet-orch ui", until_it_answers, "it runs until Ctrl-C"),
    Rule("optuna-dashboard", until_it_answers, "it runs until Ctrl-C"),
    Rule(
        "dsnet-orch launch examples/cifar10.yaml", only_validated, "it takes 60,000 images, and minutes, hours or a GPU"
    ),
    Rule("ray ", not_here, "the suite has no machines; the quick tests check the options against Ray's own program"),
    Rule("export RAY_AUTH_MODE", not_here, "it is for the cluster that is not started"),
    Rule("dsnet-orch launch examples/digits.yaml --set ray.address", only_validated, "it needs that cluster"),
    Rule("docker ", not_here, "the suite has no container engine"),
    Rule("kubectl ", not_here, "the suite has no Kubernetes"),
    Rule("python -m dsnet.training", repeated, "its comment says so"),
)


def run_block(reader: Reader, block: Block) -> None:
    """Do what a person does with a block."""
    match block.language:
        case "yaml":
            name = re.search(r"^name: (\w+)$", block.text, re.MULTILINE)
            if name:  # a fragment goes into a file of the reader's; the quick tests validate it
                (reader.folder / f"{name[1]}.yaml").write_text(block.text, encoding="utf-8")
        case "python":
            (reader.folder / "pasted.py").write_text(block.text, encoding="utf-8")
            reader.run("python pasted.py")
        case "bash":
            for line in block.text.splitlines():
                for command in line.partition("  #")[0].split(" && "):
                    run_command(reader, command.strip())


def run_command(reader: Reader, command: str) -> None:
    """Run a command as pasted, or by its rule."""
    rule = next((rule for rule in RULES if command.startswith(rule.start)), None)
    if rule is not None:
        rule.how(reader, command)
    elif command:
        reader.run(command)


def _copy_of_the_repository(folder: Path) -> None:
    """Copy the files that commands name, without the packages, which are installed."""
    folder.mkdir(parents=True)
    for name in ("examples", "docs", "constraints.txt", "README.md", "Makefile", "setup.py"):
        (folder / name).symlink_to(REPOSITORY / name)


def _programs(folder: Path) -> Path:
    folder.mkdir()
    program = folder / "dsnet-orch"
    program.write_text(f"#!{sys.executable}\nfrom dsnet_orch import main\n\nmain()\n", encoding="utf-8")
    program.chmod(0o755)
    return folder


def _make_images(folder: Path, num_classes: int, num_images: int, size: int) -> None:
    """Images of flat colours with noise, a folder for each class."""
    random = np.random.default_rng(0)
    for label in range(num_classes):
        (folder / f"class-{label}").mkdir(parents=True)
        for number in range(num_images):
            pixels = random.integers(0, 60, (size, size, 3)) + random.permutation([40, 90, 20 * label])
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class-{label}" / f"{number}.png")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """A reader with images and a released checkpoint where README has them."""
    reader = Reader(tmp_path_factory.mktemp("reader"))
    _make_images(reader.home / "photos", num_classes=3, num_images=40, size=64)
    _make_images(reader.home / "imagenet" / "val", num_classes=NUM_CLASSES, num_images=2, size=64)
    (reader.home / "data" / "cifar10").mkdir(parents=True)
    torch.save(whole_checkpoint(), reader.folder / "model_best.pth.tar")
    return reader


def test_every_rule_is_needed() -> None:
    commands = [" ".join(words) for block in blocks("bash") for words in block.commands()]
    assert [rule.start for rule in RULES if not any(command.startswith(rule.start) for command in commands)] == []


@pytest.mark.parametrize("block", blocks("bash", "python", "yaml"), ids=lambda block: block.place)
def test_a_block_runs_as_pasted_after_those_before_it(reader: Reader, block: Block) -> None:
    tracked = {path: path.stat().st_mtime_ns for path in (REPOSITORY / "docs").iterdir()}
    run_block(reader, block)
    assert {path: path.stat().st_mtime_ns for path in (REPOSITORY / "docs").iterdir()} == tracked
