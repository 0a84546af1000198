"""README and docs are correct: every command exists with its options, every file is there or made
by an earlier command, and every YAML block is valid."""

from __future__ import annotations

import re
import subprocess
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import click
import pytest

from dsnet.families import family_names
from dsnet.standalone.__main__ import _parser
from orchestration.cli import cli
from orchestration.commands.steering import read_points
from orchestration.config.loading import load_config
from tests.docs.blocks import LANGUAGES, PAGES, REPOSITORY, Block, blocks, spans

MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
PLACEHOLDERS = {"COMMAND": "plan", "+N": "+1", "N": "1"}
"""Words of running text that stand for a value, where any word would not do."""
EXAMPLES = {
    "--state": "failed",
    "--where": "top1>=0.5",
    "--pick": "knee",
    "--set": "gate.target=0.3",
    "--device": "cpu",
    "--engine": "torch",
}
"""Values for options that a table shows with `...`."""
BROUGHT = ("model_best.pth.tar",)
"""Files that readers have themselves; their own images are below ~ and given with --data."""
BASE = "version: 1\nname: base\ndata: {name: digits}\nsupernet: {model: ds_tiny}\n"
"""The file to which a YAML block that is not a whole file is added, without the sections that the
block has itself."""
MAKES = ("--resolved", "--out", "--figure", "--routers-figure", "--speed-figure", "--export-kit")
"""Options whose value is a file or folder that the command writes."""
ON_A_CLUSTER = ("ray", "kubectl", "docker")
"""Programs that start a cluster of several machines."""
WRITTEN_SCRIPTS = {"kit/time_kit.py": "dsnet/measure/time_kit.py"}
"""Scripts that a command writes -> the files that it copies."""


def problem_of(words: list[str]) -> str | None:
    """Why a command is not valid; None if its program would accept it."""
    match words:
        case ["dsnet-orch", name, *arguments]:
            return problem_of_ours(PLACEHOLDERS.get(name, name), arguments)
        case ["python", "-P", "-m", *rest] | ["python", "-m", *rest]:
            return problem_of_module(rest[0], rest[1:])
        case ["python", script, *arguments] if script.endswith(".py"):
            return problem_of_script(REPOSITORY / WRITTEN_SCRIPTS.get(script, script), arguments)
        case ["make", *targets]:
            return next((f"no target {name}" for name in targets if f"\n{name}:" not in MAKEFILE), None)
        case ["pip", "install", *arguments]:
            setup = (REPOSITORY / "setup.py").read_text(encoding="utf-8")
            extras = [name for word in arguments for name in re.findall(r"\[(\w+)\]", word)]
            return next((f"no extra {name}" for name in extras if f'"{name}": [' not in setup), None)
        case ["source", ".venv/bin/activate"] | ["optuna-dashboard", _]:
            return None
    return problem_on_a_cluster(words)


def problem_on_a_cluster(words: list[str]) -> str | None:
    match words:
        case ["ray", name, *arguments]:
            return problem_of_ray(name, arguments)
        case ["kubectl", "apply", "-f", path] | ["docker", "build", "--file", path, *_]:
            return None if (REPOSITORY / path).is_file() else f"no file {path}"
        case ["export", assignment]:
            return None if re.fullmatch(r"[A-Z_]+=\S+", assignment) else "no assignment"
        case ["kubectl", "create", "configmap", *_]:
            return None
    return "no rule says how this is checked"


def problem_of_ours(name: str, arguments: list[str]) -> str | None:
    command = cli.commands.get(name)
    if command is None:
        return f"no command {name}"
    if not arguments:
        return None  # in running text a command is named without its arguments
    given = [
        EXAMPLES.get(option, word) if word == "..." else PLACEHOLDERS.get(word, word)
        for option, word in pairwise(["", *arguments])
    ]
    try:
        command.make_context(name, [word for word in given if word != "..."])
    except click.exceptions.Exit:
        return None
    except click.ClickException as error:
        return error.format_message()
    return None


def problem_of_ray(name: str, arguments: list[str]) -> str | None:
    from ray.scripts.scripts import cli as ray_cli

    command = ray_cli.commands.get(name)
    if command is None:
        return f"Ray has no command {name}"
    if not arguments:
        return None
    try:
        command.make_context(name, list(arguments))
    except click.exceptions.Exit:
        return None
    except click.ClickException as error:
        return error.format_message()
    return None


def problem_of_module(module: str, arguments: list[str]) -> str | None:
    if find_spec(module) is None:
        return f"no module {module}"
    if module == "dsnet.training" and len(arguments) > 1:
        options = {option for action in _parser()._actions for option in action.option_strings}
        return next((f"no option {word}" for word in arguments if word.startswith("--") and word not in options), None)
    return None


def problem_of_script(path: Path, arguments: list[str]) -> str | None:
    if not path.is_file():
        return f"no file {path.name}"
    known = set(re.findall(r'add_argument\("(--[a-z-]+)"', path.read_text(encoding="utf-8")))
    return next((f"no option {word}" for word in arguments if word.startswith("--") and word not in known), None)


def test_every_command_exists_with_its_options_and_arguments() -> None:
    named = [(block.place, words) for block in blocks("bash") for words in block.commands()]
    assert len(named) > 15
    assert {block.language for block in blocks(*LANGUAGES)} == set(LANGUAGES)
    assert not [
        f"{page.name}: ```{language}"
        for page in PAGES
        for language in re.findall(r"^```(\w+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        if language not in LANGUAGES
    ]
    assert [words for _, words in named if words[0] == "dsnet-orch" and len(words) < 3] == [["dsnet-orch", "ui"]]
    problems = [(place, " ".join(words), problem_of(words)) for place, words in [*named, *spans()]]
    assert [entry for entry in problems if entry[2] is not None] == []


def tracked_files() -> set[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout, so that nothing tells which files are tracked")
    return set(listed.stdout.splitlines())


def written(words: list[str]) -> set[str]:
    """Files and folders that a command writes because an option names them, and the sweep file that
    `init` names after its folder."""
    named = {value for option, value in pairwise(words) if option in MAKES}
    if words[:2] == ["dsnet-orch", "init"] and "--out" not in words:
        named |= {f"{Path(value).name}.yaml" for option, value in pairwise(words) if option == "--data"}
    return named


def missing_files(words: list[str], made: set[str]) -> list[str]:
    """Files that a command reads and that neither the repository holds nor an earlier command has
    made."""
    if words[0] in ON_A_CLUSTER:
        return []  # their files are looked up where their options are checked
    outputs = written(words)
    paths = [word.partition("=")[2] or word for word in words[1:] if not word.startswith(("-", "~", "http", "."))]
    named = [path for path in paths if re.search(r"\.(yaml|json|txt|html|tar|journal)$|/|trained$", path)]
    return [
        path
        for path in named
        if path not in outputs
        and not (path.partition("/")[0] != "runs" and (REPOSITORY / path).exists())
        and not any(path == known or path.startswith(f"{known}/") for known in (*made, *BROUGHT))
    ]


def test_every_file_is_there_or_made_by_an_earlier_command_and_none_is_overwritten() -> None:
    tracked, problems, made = tracked_files(), [], set[str]()
    for block in blocks("bash", "yaml", "python"):
        if block.language == "yaml":
            made |= {f"{name}.yaml" for name in re.findall(r"^name: (\w+)$", block.text, re.MULTILINE)}
            continue
        if block.language == "python":
            opened = re.findall(r'"(runs/[^"]+)"', block.text)
            problems += [(block.place, path) for path in opened if "/".join(path.split("/")[:2]) not in made]
            continue
        for words in block.commands():
            problems += [(block.place, path) for path in missing_files(words, made)]
            problems += [(block.place, f"overwrites {path}") for path in written(words) & tracked]
            made |= written(words)
            if words[:2] == ["make", "launch"]:
                made.add("runs/digits")
            if words[:2] == ["dsnet-orch", "launch"] and "/" not in words[2]:
                made.add(f"runs/{Path(words[2]).stem}")
    assert problems == []
    for page in PAGES:
        links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        assert [link for link in links if not (page.parent / link).exists()] == []


def test_figures_in_the_text_overwrite_nothing_and_need_nothing_more() -> None:
    """As in blocks: `make launch` installs neither kaleido nor a browser."""
    drawn = [
        value
        for words in [
            *(words for _, words in spans()),
            *(words for block in blocks("bash") for words in block.commands()),
        ]
        for option, value in pairwise(words)
        if option in ("--figure", "--routers-figure", "--speed-figure")
    ]
    assert drawn
    assert [value for value in drawn if value != "FILE" and not re.fullmatch(r"\w+\.(html|json)", value)] == []


def test_commands_about_own_images_say_where_they_are() -> None:
    own = [
        words
        for block in blocks("bash")
        for words in block.commands()
        if words[0] == "dsnet-orch" and words[1] in ("plan", "launch")
    ]
    made_by_init = {
        name
        for block in blocks("bash")
        for words in block.commands()
        if words[1:2] == ["init"]
        for name in written(words)
    }
    knows = ("examples/digits", *made_by_init)
    bare = [words for words in own if not words[2].startswith(knows) and "--data" not in words]
    assert bare == []
    assert sum("--data" in words for words in own) >= 5


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.place)
def test_every_yaml_block_is_valid(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "block.yaml"
    if block.text.startswith("- "):
        path.write_text(block.text, encoding="utf-8")
        assert read_points(path)
        return
    whole = block.text.startswith("version:")
    own = re.findall(r"^(\w+):", block.text, re.MULTILINE)
    base = [line for line in BASE.splitlines(keepends=True) if line.partition(":")[0] not in own]
    path.write_text(block.text if whole else "".join(base) + block.text, encoding="utf-8")
    loaded = load_config(path, known_models=family_names())
    assert loaded.config.name == ("mine" if whole else "base")
