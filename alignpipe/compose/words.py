"""What a user types after `model=` and `data=` -> words that Hydra understands.

`model=` and `data=` take an option of their group, or a folder, a file or a hub id. What is no option becomes
two words, `data=file data.path='...'`, quoted for Hydra's grammar, to which `=`, `#`, `(` and letters outside
ASCII are errors. `stage.data=V` and `stages.X.data=V` become `....data.path='V'`.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from hydra.errors import HydraException

from alignpipe.errors import AlignpipeError, CheckpointError, ConfigError, DataError, did_you_mean, nearest

# Option that a path belongs to, and the error when there is nothing at it.
_GROUPS: dict[str, tuple[str, type[AlignpipeError]]] = {
    "model": ("pretrained", CheckpointError),
    "data": ("file", DataError),
}
_STAGE_DATA = re.compile(r"(stage|stages\.[^.=]+)\.(data|demonstrations|text_data|ptx_data)")
# Sections whose keys are the user's own: Hydra wants a sign that they are new.
_OPEN = re.compile(
    r"(gates|pipeline\.(from_round|round_overrides)|(.*\.)?reward\.models)(\..+)?|(.*\.)?mixture"
)
_TAKES_PATH = re.compile(
    r"(.*\.)?(path|policy|previous|reference|reward_model|selection_model|win_rate_against|templates|function|gate\.model|"
    r"chat_template|trust_remote_code|output_dir)"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".zip", ".yaml")


def rewrite(words: Iterable[str], options: Callable[[str], list[str]], *, multirun: bool) -> list[str]:
    """Turn each word into what Hydra takes.

    Args:
        words: as the user typed them, flags left out.
        options: names of the options of a group.
        multirun: commas separate the values of a sweep.

    Raises:
        ConfigError: a word that is neither an option nor a path; a sweep that mixes both.
        DataError: `data=` names a file that is not there.
        CheckpointError: `model=` names a folder that is not there.
    """
    rewritten = []
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in _GROUPS:
            rewritten += _group_words(key, value, options(key), multirun)
        elif equals and _STAGE_DATA.fullmatch(key):
            rewritten.append(_stage_data_word(key, value, multirun))
        elif equals and _OPEN.fullmatch(key.lstrip("+")):
            # A bound such as >=0.7 is not of Hydra's grammar without quotes.
            plain = key.lstrip("+")
            rewritten.append(f"++{plain}={value}" if parse(word) else f"++{plain}={quote(value)}")
        elif equals and _TAKES_PATH.fullmatch(key.lstrip("+")) and parse(word) is None:
            rewritten.append(f"{key}={quote(value)}")
        else:
            rewritten.append(word)
    return rewritten


def parse(word: str) -> Override | None:
    """A word by Hydra's grammar, None where it does not follow it."""
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def quote(value: str) -> str:
    """A text as a quoted string of Hydra's grammar; interpolations in it stay alive.

    >>> quote("my file (1).jsonl")
    "'my file (1).jsonl'"
    """
    # Backslashes are plain inside quotes, but for those right before a quote or the end.
    doubled = re.sub(r"(\\+)(?='|$)", r"\1\1", value)
    return "'" + doubled.replace("'", "\\'") + "'"


def _values(key: str, value: str, multirun: bool) -> list[str] | None:
    """The values of one word, unquoted; None for a sweep that only Hydra can unfold."""
    override = parse(f"{key}={value}")
    if override is None or Path(value).exists():
        split = multirun and override is None and not Path(value).exists()
        return value.split(",") if split else [value]
    if override.is_sweep_override():
        if not multirun and not override.is_choice_sweep():
            return [value]
        if not override.is_choice_sweep():
            return None
        choices = override.value()
        assert isinstance(choices, ChoiceSweep)
        return [_text(choice) for choice in choices.list] if multirun else [value]
    return [_text(override.value()) if value[:1] in ("'", '"') else value]


def _text(value: object) -> str:
    return str(value.text if isinstance(value, QuotedString) else value)


def _group_words(group: str, value: str, options: list[str], multirun: bool) -> list[str]:
    values = _values(group, value, multirun)
    if values is None or all(item in options for item in values):
        return [f"{group}={value}"]
    if not value:
        raise ConfigError(f"{group}= needs a value: one of {', '.join(options)}, a path or a hub id")
    chosen = [item for item in values if item in options]
    if chosen:
        raise ConfigError(f"{group}={value}: a sweep takes options ({', '.join(chosen)}) or paths, not both")
    option, missing = _GROUPS[group]
    for item in values:
        _check_path(group, item, options, missing)
    return [f"{group}={option}", f"{group}.path={','.join(quote(_home(item)) for item in values)}"]


def _stage_data_word(key: str, value: str, multirun: bool) -> str:
    values = _values(key, value, multirun)
    if values is None or not value:
        return f"{key}.path={value}"
    for item in values:
        if _is_path(item):
            _check_path(key, item, [], DataError)
    return f"{key}.path={','.join(quote(_home(item)) for item in values)}"


def _home(value: str) -> str:
    return str(Path(value).expanduser()) if value.startswith("~") else value


def _is_path(value: str) -> bool:
    """Whether a word means a place on this disk: it has a `/` or a suffix, and is not of a hub id's form."""
    if "/" not in value:
        return bool(Path(value).suffix)
    looks_like_file = value.endswith(_DATA_SUFFIXES) or Path(value).parts[0] in ("~", ".", "..")
    return looks_like_file or not _HUB_ID.fullmatch(value) or Path(Path(value).parts[0]).is_dir()


def _check_path(key: str, value: str, options: list[str], missing: type[AlignpipeError]) -> None:
    path = Path(_home(value))
    if "${" in value or path.exists():
        return
    if _is_path(value):
        siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(path.name, siblings)
        mend = f" Did you mean {path.parent / near}?" if near else ""
        raise missing(f"{key}={value}: there is no such file or folder, seen from {Path.cwd()}.{mend}")
    if "/" not in value:
        raise ConfigError(
            f"{key}={value}: no option, no path and no hub id (owner/name). {did_you_mean(value, options)}"
        )
