"""Links lead somewhere, commands exist, and the blocks of README and guides do what they say.

A block of `sh` or `python` is run unless the line before it is `<!-- not run: REASON -->`; then at least its commands
must exist with their options. Blocks run in a folder with a small data set, `my-data.yaml`, and a study on it that is
finished, `my-study.yaml`.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

sys.path.append(str(Path(__file__).parents[1] / "search_tests"))
from tiny import ENVIRONMENT, make_study

from search.cli import app, main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(
    r"^(?P<mark><!-- not run: (?P<reason>[^\n]*) -->\n+)?```(?P<kind>sh|python)\n(?P<text>.*?)^```", re.M | re.S
)
LINK = re.compile(
    r"(?<!!)\[[^\]\n]*\]\((?P<target>[^)\s]+)\)|!\[[^\]\n]*\]\((?P<image>[^)\s]+)\)|src=\"(?P<source>[^\"]+)\""
)
HEADING = re.compile(r"^#+ +(.*)$", re.M)


@dataclass(frozen=True)
class Block:
    """Commands of a page."""

    page: Path
    line: int
    kind: str
    text: str
    reason: str | None
    """Why it is not run."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in BLOCK.finditer(text):
            line = text[: found.start("kind")].count("\n") + 1
            yield Block(page, line, found["kind"], found["text"], found["reason"])


BLOCKS = list(blocks())


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ---- links -----------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    names = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in HEADING.findall(text)]
    return {re.sub(r"[^\w\- ]", "", name).strip().replace(" ", "-") for name in names}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = [next(filter(None, found.groups())) for found in LINK.finditer(text)]
    broken = []
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("**/*.md")), ids=name_of)
def test_page_can_be_reached_from_the_readme(page: Path) -> None:
    seen, front = set(), [ROOT / "README.md"]
    while front:
        here = front.pop()
        seen.add(here)
        links = [found["target"] for found in LINK.finditer(here.read_text(encoding="utf-8")) if found["target"]]
        files = {(here.parent / link.partition("#")[0]).resolve() for link in links}
        front += [file for file in files - seen if file.suffix == ".md" and file.is_file()]
    assert page in seen


# ---- commands --------------------------------------------------------------------------------------------------------


def command_lines() -> Iterator[tuple[str, str]]:
    """Where, and what: every `yolosearch` command of the pages, in blocks and in the text."""
    for block in BLOCKS:
        for line in block.text.splitlines():
            if found := re.search(r"(?:^|&& |\$ |/bin/)(yolosearch .*)", line):
                yield str(block), found[1]
    for page in PAGES:
        if page.parent.name != "reference":
            for found in re.finditer(r"`(?:\.venv/bin/)?(yolosearch [^`\n]+)`", page.read_text(encoding="utf-8")):
                yield name_of(page), found[1]


def options_of(words: list[str]) -> set[str] | None:
    """The options of the command that some words begin; None if there is no such command."""
    command: Any = get_command(app)
    while words and getattr(command, "commands", None):
        if words[0].startswith("-"):
            break
        command = command.commands.get(words[0])
        if command is None:
            return None
        words = words[1:]
    own = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return {*own, "--help"}


@pytest.mark.parametrize(("place", "line"), sorted(set(command_lines())), ids=lambda value: str(value)[:60])
def test_command_in_a_document_exists_with_its_options(place: str, line: str) -> None:
    words = shlex.split(line.split(" | ")[0].split(" && ")[0], comments=True)[1:]
    options = options_of([word.strip("[]") for word in words])

    assert options is not None, f"{place}: no such command: {line}"
    used = {word.strip("[]").partition("=")[0] for word in words if word.strip("[]").startswith("-")}
    assert used - options - {"-"} == set(), f"{place}: {line}"


# ---- blocks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(sandbox: Path, block: Block) -> Iterator[Path]:
    """The sandbox, without the study file where the block makes one; it is there again afterwards."""
    file = sandbox / "my-study.yaml"
    text = file.read_text()
    if "yolosearch init" in block.text:
        file.unlink()
    yield sandbox
    file.write_text(text)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `my-data.yaml`, and the finished study `my-study.yaml` below `runs`."""
    folder = tmp_path_factory.mktemp("docs") / "sandbox"
    study = make_study(folder, tmp_path_factory.getbasetemp(), name="tiny", train={"epochs": 1}, trials=2)
    document = yaml.safe_load((folder / "data" / "digits.yaml").read_text())
    (folder / "my-data.yaml").write_text(yaml.safe_dump({**document, "path": str(folder / "data")}))
    text = study.file.read_text().replace("name: tiny", "name: my-study")
    (folder / "my-study.yaml").write_text(text.replace(str(study.data), "my-data.yaml"))
    words = [sys.executable, "-m", "search", "run", "my-study.yaml"]
    done = subprocess.run(words, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    return folder


def environment(folder: Path) -> dict[str, str]:
    own = {key: value for key, value in os.environ.items() if not key.startswith(("YOLOSEARCH_", "MLFLOW_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}"
    python_path = f"{ROOT}{os.pathsep}{own.get('PYTHONPATH', '')}"
    return {**own, **ENVIRONMENT, "PATH": path, "PYTHONPATH": python_path, "HOME": str(folder)}


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.reason is None], ids=str)
def test_block_runs(
    block: Block, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    for name in [name for name in os.environ if name.startswith(("YOLOSEARCH_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    if block.kind == "python":
        exec(compile(block.text, str(block), "exec"), {})
        return
    lines = [shlex.split(line, comments=True) for line in block.text.splitlines()]
    if all(words[0] == "yolosearch" and not {"|", "&&", ">"} & {*words} for words in lines if words):
        for words in filter(None, lines):
            run_here(words, monkeypatch)
        return
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        env=environment(place),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"


def run_here(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command in this process, which spares the imports."""
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code, words


def test_marked_blocks_say_why() -> None:
    reasons = [block.reason for block in BLOCKS if block.reason is not None]

    assert all(reason and len(reason) > 5 for reason in reasons)
    assert len(BLOCKS) - len(reasons) >= 5
