"""The `alignpipe` command: run, plan, status, ls, verify, clean, doctor, config, data.

Each command imports what it needs inside itself, so that none but a stage that really runs waits for torch.
Words -> exit code, one line on standard error when it is not 0.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from alignpipe import __version__
from alignpipe.errors import AlignpipeError, ConfigError, MachineError, as_line, did_you_mean
from alignpipe.secrets import hide_secrets
from alignpipe.terminal import Terminal

WORDS = {"ignore_unknown_options": True, "allow_extra_args": True}
RunName = Annotated[str | None, typer.Argument(help="Name, or the beginning of one; the newest if left out.")]
OutputDir = Annotated[Path, typer.Option("--output-dir", "-o", help="Folder of the runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

# Read as torch loads. Threads that wait by spinning are many times slower once anything else runs; those that sleep at
# once wake up too late for a small model's next operation. So they spin for some 10 us first (docs/performance.md).
THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}

# A flag or argument that typer itself refuses, whichever click it brings along.
MisusedCommand: Any = typer.BadParameter.__base__

app = typer.Typer(
    help="From a base language model to an aligned one: SFT, reward model, rejection sampling, PPO, DPO.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Look at the configuration.", no_args_is_help=True)
data_app = typer.Typer(help="Look at data.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")


def main() -> None:
    """Entry point: run a command and turn what a user can cause into one line and an exit code."""
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in THREADS.items():
            os.environ.setdefault(name, value)
    try:
        _check_command(sys.argv[1:])
        sys.exit(app(standalone_mode=False))
    except AlignpipeError as error:
        _tell(str(error))
        sys.exit(error.exit_code)
    except MisusedCommand as error:
        _tell(f"{error.format_message().rstrip('.')}; what there is: alignpipe --help")
        sys.exit(ConfigError.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader went away; what is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _tell(message: str) -> None:
    Terminal(stderr=True).print(f"error: {as_line(hide_secrets(message))}", markup=False, soft_wrap=True)


def _check_command(argv: list[str]) -> None:
    commands = ["run", "plan", "status", "ls", "verify", "clean", "doctor", "config", "data"]
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        hint = "Did you mean alignpipe run?" if "=" in argv[0] else did_you_mean(argv[0], commands)
        raise ConfigError(f"there is no command {argv[0]!r}. {hint}")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"alignpipe {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _without_command(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(context_settings=WORDS, add_help_option=False)
def run(context: typer.Context) -> None:
    """Run a pipeline or one stage; what is finished is reused. `alignpipe run --help` tells the words."""
    from alignpipe.compose.command_line import read_line
    from alignpipe.compose.composition import compose

    argv = list(context.args)
    line = read_line(argv)
    if {"--help", "--hydra-help", "--info", "--cfg"} & set(line.flags):
        from alignpipe.hydra_front import show

        typer.echo(show(line, argv), nl=False)
    elif line.multirun:
        from alignpipe.hydra_front import sweep

        raise typer.Exit(sweep(line, Terminal()))
    else:
        composed = compose(argv)
        from alignpipe.pipeline import runner

        runner.run(composed.config, argv, composed.yaml)


@app.command(context_settings=WORDS)
def plan(context: typer.Context) -> None:
    """Say what `run` with the same words would do, and do nothing."""
    from alignpipe.compose.composition import compose
    from alignpipe.pipeline.plan import make_plan
    from alignpipe.pipeline.plan_table import print_plan

    print_plan(make_plan(compose(list(context.args)).config, bare=True), Terminal())


@app.command()
def status(
    run: RunName = None,
    as_json: AsJson = False,
    output_dir: OutputDir = Path("outputs"),
) -> None:
    """Say how each stage of a run stands."""
    from alignpipe.pipeline.status import print_status, run_status

    found = run_status(output_dir, run)
    if as_json:
        _print_json(found)
    else:
        print_status(found, Terminal())


@app.command("ls")
def list_all(as_json: AsJson = False, output_dir: OutputDir = Path("outputs")) -> None:
    """List the runs, newest first."""
    from alignpipe.pipeline.status import list_runs, print_runs

    runs = list_runs(output_dir)
    if as_json:
        _print_json(runs)
    else:
        print_runs(runs, Terminal())


@app.command()
def verify(
    run: RunName = None,
    stage: Annotated[str | None, typer.Option(help="Do this stage again, alone.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to do again, from the first.")] = 10,
    output_dir: OutputDir = Path("outputs"),
) -> None:
    """Do the beginning of a run's finished stages again and compare: the same bits, or the same figures to 1e-5."""
    from alignpipe.replay import check_promise, print_replays, replay

    found = replay(output_dir, run, stage, steps, Terminal(stderr=True))
    print_replays(found, Terminal())
    check_promise(found)


@app.command()
def clean(
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without this nothing is removed.")] = False,
    as_json: AsJson = False,
    output_dir: OutputDir = Path("outputs"),
) -> None:
    """Say what no run points to any more; with --yes, remove it."""
    from alignpipe.pipeline import clean as cleaning

    found = cleaning.leftovers(output_dir)
    if yes:
        cleaning.clean(found)
    if as_json:
        _print_json(cleaning.as_json(found))
    else:
        cleaning.print_leftovers(found, Terminal(), removed=yes)


@app.command()
def doctor(output_dir: OutputDir = Path("outputs")) -> None:
    """Look at what this machine gives a run: versions, devices, processes, disk, locks, the hub."""
    from alignpipe.doctor import examine, print_findings

    found = examine(output_dir)
    print_findings(found, Terminal())
    if bad := [finding.name for finding in found if finding.state == "bad"]:
        raise MachineError(f"{', '.join(bad)}: a run cannot rely on this machine; see the mends above")


@config_app.command("show", context_settings=WORDS)
def show_config(context: typer.Context) -> None:
    """Print the configuration that the words make, every value filled in."""
    from alignpipe.compose.composition import compose

    typer.echo(compose(list(context.args)).resolved_yaml, nl=False)


@config_app.command("search", context_settings=WORDS)
def search_config(
    context: typer.Context, word: Annotated[str, typer.Argument(help="Part of a key or of its meaning.")]
) -> None:
    """List the keys that a word stands in, with value, meaning and file; more words compose as in `run`."""
    from alignpipe.compose.composition import compose
    from alignpipe.compose.key_search import search

    found = search(word, compose(list(context.args)))
    if not found:
        raise ConfigError(f"no key and no meaning holds {word!r}; alignpipe config show prints all keys")
    for item in found:
        typer.echo(f"{item.key}={json.dumps(item.value, ensure_ascii=False)}")
        typer.echo(f"    {item.comment} ({item.file})" if item.comment else f"    ({item.file or 'schema'})")


@data_app.command("check", context_settings=WORDS)
def check_data(
    context: typer.Context,
    path: Annotated[str, typer.Argument(help="toy, a file, or a hub id.")],
    as_json: AsJson = False,
) -> None:
    """Read a data set and say what it is, what it suits, which rows are bad; data.KEY=VALUE as in `run`."""
    from alignpipe.compose.command_line import read_line
    from alignpipe.compose.composition import compose
    from alignpipe.data.check import check_data, print_report

    argv = list(context.args)
    word = [] if any(item.startswith("data=") for item in read_line(argv).words) else [f"data={path}"]
    config = compose([*word, *argv]).config
    report = check_data(config.data)
    if as_json:
        _print_json(report)
    else:
        print_report(report, Terminal())


def _print_json(value: Any) -> None:
    # Half a character, which a file may hold, comes out as JSON spells it.
    text = json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
    typer.echo(text)
