"""How many cases of each fault are tried, and the table of what came of them."""

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from alignpipe import cli
from tests.faults.chain import WORDS, finish
from tests.faults.commands import kill_all
from tests.faults.table import Faults, added_up, as_text

ALL = "--all-faults"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(ALL, action="store_true", help="try every case of each fault, and print the table")


@pytest.fixture(scope="session")
def count(pytestconfig: pytest.Config) -> Callable[[int, int], int]:
    """How many cases to try: `count(few, all)`."""
    # The option is unknown where pytest was not told of this folder.
    every: bool = pytestconfig.getoption(ALL, default=False)
    return lambda few, all_of_them: all_of_them if every else few


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was let be."""
    return finish(tmp_path_factory.mktemp("undisturbed"), *WORDS).folder


@pytest.fixture(autouse=True)
def nobody_left() -> Iterator[None]:
    """End what a test has started and not waited for."""
    yield
    kill_all()


@pytest.fixture
def faults(request: pytest.FixtureRequest) -> Faults:
    """Takes the lines of the table."""
    return Faults(request.node.user_properties)


@pytest.fixture
def typed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Types `alignpipe LINE MORE...` in a folder, in this process; the exit code, and all that was printed."""

    def run(folder: Path, line: str, *more: str) -> tuple[int, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["alignpipe", *shlex.split(line), *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capfd.readouterr()
        return int(ended.value.code or 0), printed.out + printed.err

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table, and keep it."""
    config = terminalreporter.config
    reports = [
        report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])
    ]
    told = [
        value
        for report in reports
        if report.when == "call"
        for name, value in report.user_properties
        if name == "fault"
    ]
    if not told or not config.getoption(ALL, default=False):
        return
    lines = sorted(added_up(told), key=lambda line: line.fault)
    terminalreporter.section("faults")
    for text in as_text(lines):
        terminalreporter.write_line(text)
    file = config.rootpath / "outputs" / "faults.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps([asdict(line) for line in lines], indent=2) + "\n", encoding="utf-8")
