"""The command as a user meets it: exit codes, one line on standard error, no wait for torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from alignpipe import __version__, cli
from alignpipe.errors import DataError

HEAVY = ("torch", "transformers", "accelerate")


def _call(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Call the entry point in this process; exit code, output, errors."""
    monkeypatch.setattr(sys, "argv", ["alignpipe", *argv])
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def _process(argv: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(cli.__file__).parents[1])
    variables = {**os.environ, "PYTHONPATH": root, **environment}
    command = [sys.executable, "-m", "alignpipe", *argv]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "argv",
    [
        ["plan", "stage=sft"],
        ["config", "show", "stage=sft"],
        ["status"],
        ["run", "stage=sft", "--cfg", "job"],
        ["run", "stage=nothing"],
        ["data", "check", "toy", "data.world.num_prompts=200"],
    ],
    ids=lambda argv: " ".join(argv),
)
def test_command_imports_no_torch(argv: list[str], tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['alignpipe', *{argv!r}]\n"
        "try:\n    runpy.run_module('alignpipe', run_name='__main__')\n"
        "finally:\n"
        f"    print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    root = str(Path(cli.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("argv", "code", "expected"),
    [
        (["run", "stage=sft", "stage.epohcs=3"], 2, "Did you mean stage.epochs?"),
        (["plan", "stage=sfft"], 2, "Did you mean sft?"),
        (["run", "stage=sft", "data=./nothing.jsonl"], 3, "there is no such file"),
        (["run", "stage=sft", "model=./nothing"], 4, "there is no such file or folder"),
        (["run", "stage=sft", "data=tyo"], 2, "Did you mean toy?"),
        (["rnu"], 2, "there is no command 'rnu'. Did you mean run?"),
        (["stage=sft"], 2, "Did you mean alignpipe run?"),
        (["status"], 2, "alignpipe run"),
        (["status", "nosuch"], 2, "nosuch"),
        (["config", "search", "nosuchword", "stage=sft"], 2, "no key and no meaning holds 'nosuchword'"),
        (["data", "check", "./nothing.jsonl"], 3, "there is no such file"),
        (["run", "stage=sft", "--nosuch"], 2, "--nosuch"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistake_gets_one_line_and_its_exit_code(
    argv: list[str],
    code: int,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found, out, err = _call(argv, monkeypatch, capsys)
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert expected in err
    assert list(tmp_path.iterdir()) == []


def test_alone_it_prints_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _call([], monkeypatch, capsys)
    assert code == 0
    for command in ("run", "plan", "status", "ls", "config", "data"):
        assert command in out


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _call(["--version"], monkeypatch, capsys) == (0, f"alignpipe {__version__}\n", "")


def test_help_of_run_names_groups_options_and_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = _call(["run", "--help"], monkeypatch, capsys)
    assert code == 0
    assert "stage: collect, dpo, eval, ppo, rm, rs, sft" in out
    assert "Exit codes" in out
    assert "schema" not in out


def test_hydras_own_looks_at_the_configuration_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, _ = _call(["run", "stage=sft", "--cfg", "job", "seed=5"], monkeypatch, capsys)
    values = yaml.safe_load(out)
    assert (code, values["seed"], values["stage"]["kind"]) == (0, 5, "sft")
    code, out, _ = _call(["run", "--info", "searchpath", "-cd", str(tmp_path)], monkeypatch, capsys)
    assert code == 0
    assert out.index(str(tmp_path)) < out.index("main")
    assert list(tmp_path.iterdir()) == []


def test_config_show_prints_values_that_read_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = _call(["config", "show", "stage=dpo", "stage.beta=0.25"], monkeypatch, capsys)
    values = yaml.safe_load(out)
    assert (values["stage"]["beta"], values["stage"]["data"]["path"]) == (0.25, "toy")
    assert "${" not in out


def test_config_search_tells_value_meaning_and_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["config", "search", "kl_coef", "stage=ppo", "stage.reward_model=rm", "stage.kl_coef=0.5"]
    _, out, _ = _call(words, monkeypatch, capsys)
    assert "stage.kl_coef=0.5\n    Price of one nat of KL" in out
    assert "(stage/ppo.yaml)" in out


def test_config_search_finds_the_meaning_of_a_stages_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = _call(["config", "search", "max_bad", "stage=sft"], monkeypatch, capsys)
    assert out.count("Share of rows that may be unusable") == 2


def test_listing_of_nothing_is_no_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = _call(["ls", "--json"], monkeypatch, capsys)
    assert (code, json.loads(out)) == (0, [])


def test_message_of_several_lines_is_told_in_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        raise DataError("first\nsecond [bold]x[/bold]")

    monkeypatch.setattr(cli, "app", fail)
    assert _call([], monkeypatch, capsys) == (3, "", "error: first second [bold]x[/bold]\n")


def test_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupt)
    assert _call([], monkeypatch, capsys) == (130, "", "")


def test_reader_that_goes_away_leaves_no_traceback(tmp_path: Path) -> None:
    command = f"{sys.executable} -m alignpipe config show | head -n 1"
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "seed: 0\n"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, cli.THREADS),
        ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_how_threads_wait_is_set_where_nobody_says_it(
    given: dict[str, str],
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Set before they are taken away, so that what the command sets is taken back as well.
    for name in cli.THREADS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    _call(["--version"], monkeypatch, capsys)
    assert {name: os.environ[name] for name in cli.THREADS if name in os.environ} == expected


def test_no_color_is_honoured(tmp_path: Path) -> None:
    done = _process(["--help"], tmp_path, NO_COLOR="1", FORCE_COLOR="")
    assert done.returncode == 0
    assert "\x1b[3" not in done.stdout


@pytest.mark.slow
def test_wheel_holds_conf_and_runs_from_it(tmp_path: Path) -> None:
    root = Path(cli.__file__).parents[1]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(root)]
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    if built.returncode and "hatchling" in built.stderr:
        pytest.skip("hatchling cannot be fetched to build the wheel")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    assert (site / "alignpipe" / "conf" / "stage" / "sft.yaml").is_file()
    done = subprocess.run(
        [sys.executable, "-m", "alignpipe", "run", "--info", "searchpath"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert str(site / "alignpipe" / "conf") in done.stdout
