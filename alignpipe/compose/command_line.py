"""A command line -> words for the configuration, and flags for Hydra, wherever they stand in it."""

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser

from alignpipe.errors import ConfigError

CONFIG_NAME = "config"
CONFIG_DIR_VARIABLE = "ALIGNPIPE_CONFIG_DIR"


@dataclass(frozen=True)
class Line:
    """A command line, flags and words apart.

    Attributes:
        words: `group=option` and `key=value`, as typed.
        flags: everything else that Hydra is given, in its own spelling.
        multirun: one run for each combination.
        folder: the user's own configuration folder.
    """

    words: list[str]
    flags: list[str] = field(default_factory=list)
    multirun: bool = False
    folder: Path | None = None

    @property
    def config_name(self) -> str:
        """Name of the file that is composed first."""
        return (
            self.flags[self.flags.index("--config-name") + 1]
            if "--config-name" in self.flags
            else CONFIG_NAME
        )


def read_line(argv: list[str]) -> Line:
    """Take a command line apart; flags may stand anywhere in it, also between words.

    Raises:
        ConfigError: a flag that Hydra does not have, or one that alignpipe does not take.
    """
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message}; flags: alignpipe run --help")

    parser.error = refuse  # type: ignore[method-assign]
    parsed = parser.parse_intermixed_args(argv)
    if parsed.config_path or parsed.experimental_rerun:
        flag = "--config-path" if parsed.config_path else "--experimental-rerun"
        raise ConfigError(f"{flag} is not taken; put your own YAML in a folder and name it with --config-dir")
    return Line(parsed.overrides, _flags(parsed), parsed.multirun, _user_folder(parsed.config_dir))


def _flags(parsed: argparse.Namespace) -> list[str]:
    given = vars(parsed)
    switches = ("help", "hydra_help", "resolve", "run", "multirun")
    valued = ("cfg", "package", "info", "config_name")
    flags = [f"--{name.replace('_', '-')}" for name in switches if given[name]]
    for name in valued:
        if given[name] is not None:
            flags += [f"--{name.replace('_', '-')}", given[name]]
    return flags


def _user_folder(flag: str | None) -> Path | None:
    name = flag or os.environ.get(CONFIG_DIR_VARIABLE)
    if not name:
        return None
    folder = Path(name).expanduser().resolve()
    if not folder.is_dir():
        origin = "--config-dir" if flag else f"${CONFIG_DIR_VARIABLE}"
        raise ConfigError(f"{origin}: there is no folder {folder}")
    return folder
