"""What Hydra and OmegaConf raise -> one line: which key, what was expected, the nearest right word."""

import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    GrammarParseError,
    InterpolationKeyError,
    InterpolationResolutionError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
    ValidationError,
)

from alignpipe.compose.yaml_files import find_key
from alignpipe.config import KINDS
from alignpipe.errors import did_you_mean, nearest

Tree = dict[str, Any]
_KINDS = ", ".join(KINDS)


def one_line(error: BaseException, overrides: list[str], tree: Callable[[], Tree], files: list[Path]) -> str:
    """Say in one line what a failed composition wants.

    Args:
        error: from Hydra, OmegaConf or the YAML reader.
        overrides: the words that were composed.
        tree: gives the keys there are, as nested dictionaries.
        files: the user's own YAML files, searched for the line that a key stands in.
    """
    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    text = f"{error}\n{error.__cause__ or ''}"
    key = _key_of(error, text)
    if _is_unknown(error, text):
        own = _in_stage_file(text, key)
        if own is not None:
            return _at(key, overrides, files) + own
        return _at(key, overrides, files) + unknown_key(_typed_key(key, overrides), tree())
    structural = _structural(text, overrides)
    if structural:
        return structural
    if any(word.startswith(f"{key}.") and "{}" in text for word in overrides):
        return f"{key}: holds a value, there are no keys below it"
    if key:
        return _at(key, overrides, files) + f"{key}: {_complaint(error, text, tree)}"
    return " ".join(str(error).split("\n")[0].split())


def unknown_key(key: str, tree: Tree) -> str:
    """The line for a key that is not there.

    >>> unknown_key("seeed", {"seed": 0})
    "there is no key 'seeed'. Did you mean seed?"
    """
    head = key.split(".")[0]
    if head == "stage" and isinstance(tree.get("stages"), dict) and tree["stages"] and not tree.get("stage"):
        rest = key.removeprefix("stage").removeprefix(".")
        return (
            f"there is no key '{key}' in a pipeline, its stages stand by name: stages.NAME.{rest} "
            f"with NAME one of {', '.join(tree['stages'])}; or choose one stage with stage=KIND"
        )
    if head == "stages" and isinstance(tree.get("stage"), dict):
        rest = ".".join(key.split(".")[2:])
        return f"there is no key '{key}' when a stage runs alone: write stage.{rest}"
    if key in tree:
        return f"a file of {key}/ landed under the key '{key}'; its first line must be `# @package _global_`"
    found = suggest(key, tree)
    hint = f"Did you mean {' or '.join(found)}?" if found else "List keys: alignpipe config search WORD"
    return f"there is no key '{key}'. {hint}"


def suggest(key: str, tree: Tree) -> list[str]:
    """The keys most likely meant, best first, at most three."""
    parts = key.split(".")
    keys = list(_all_keys(tree, ""))
    ends = sorted((known for known in keys if known.endswith(f".{key}")), key=len)
    if ends:
        return ([known for known in ends if known.startswith("stage")] or ends)[:3]
    for prefix in ([], ["stages"], ["stage"]):
        node = tree
        for part in prefix:
            node = node.get(part) or {}
        fixed = _fix(parts, node, tree)
        if fixed:
            return [".".join(prefix + fixed)]
    leaf = nearest(parts[-1], {known.rsplit(".", 1)[-1] for known in keys})
    return sorted((known for known in keys if leaf and known.endswith(f".{leaf}")), key=len)[:3]


def _fix(parts: list[str], node: Any, tree: Tree) -> list[str] | None:
    """Mend a dotted key from its head on, one part at a time; None if some part is like nothing there."""
    if not parts:
        return []
    node = _followed(node, tree)
    if not isinstance(node, dict):
        return None
    head, *rest = parts
    for candidate in [head] if head in node else _close(head, node):
        fixed = _fix(rest, node[candidate], tree)
        if fixed is not None:
            return [candidate, *fixed]
    return None


def _close(word: str, choices: Tree) -> list[str]:
    best = nearest(word, choices)
    # Words of two and three letters are far from everything by ratio.
    alike = difflib.get_close_matches(word, list(choices), n=3, cutoff=0.4)
    short = [choice for choice in alike if len(word) <= 4 and abs(len(choice) - len(word)) <= 1]
    return list(dict.fromkeys([*([best] if best else []), *short]))


def _followed(node: Any, tree: Tree) -> Any:
    """What an interpolation of a whole section points at."""
    match = re.fullmatch(r"\$\{([\w.]+)\}", node) if isinstance(node, str) else None
    if match is None:
        return node
    target: Any = tree
    for part in match[1].split("."):
        target = target.get(part) if isinstance(target, dict) else None
    return target


def _all_keys(node: Any, above: str) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{above}{key}"
            yield from _all_keys(value, f"{above}{key}.")


def _missing_option(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    where = re.match(r"In '([^']+)'", str(error))
    at = f"{where[1]}.yaml: " if where and where[1] != "config" else ""
    listed = re.findall(r"^\t([\w-]+)$", str(error), re.MULTILINE)
    options = sorted({*(error.options or []), *listed} or _options(group))
    if not group:
        return f"{at}there is no configuration file {option!r}. {did_you_mean(option, options)}"
    return f"{at}there is no option {option!r} in the group {group!r}. {did_you_mean(option, options)}"


def _options(group: str) -> set[str]:
    """The options of a group, where a composition is under way: Hydra lists them for words alone."""
    hydra = GlobalHydra.instance()
    return set(hydra.config_loader().get_group_options(group)) if hydra.is_initialized() else set()


def _key_of(error: BaseException, text: str) -> str:
    for item in (error, error.__cause__):
        if isinstance(item, OmegaConfBaseException) and item.full_key:
            return str(item.full_key)
    match = re.search(r"full_key: (\S+)", text) or re.search(r"Could not override '([^']+)'", text)
    return match[1] if match else ""


def _is_unknown(error: BaseException, text: str) -> bool:
    if "@" in text.split("\n")[0] or "does not support deletion" in text:
        return False
    causes = (error, error.__cause__)
    # Interpolation errors are key errors by class as well.
    if any(isinstance(item, InterpolationKeyError) for item in causes):
        return False
    if any(isinstance(item, ConfigAttributeError | ConfigKeyError) for item in causes):
        return True
    return (
        "ConfigKeyError raised" in text
        or "ConfigAttributeError raised" in text
        or "Unexpected type for root" in text
    )


def _in_stage_file(text: str, key: str) -> str | None:
    """An unknown key in a stage file of the user's own: its schema is known, its tree is not."""
    schema = re.search(r"object_type=(\w+)", text)
    where = re.match(r"In '(stage/[^']+)'", text)
    if schema is None or where is None:
        return None
    kinds = {kind.__name__: kind for kind in KINDS.values()}
    if schema[1] not in kinds:
        return f"begin the file with `defaults: [/schema/KIND@_here_, _self_]`, KIND one of {_KINDS}"
    above, _, leaf = key.rpartition(".")
    best = nearest(leaf, [spec.name for spec in fields(kinds[schema[1]])])
    return f"there is no key '{key}'. " + (f"Did you mean {above}.{best}?" if best else "")


def _typed_key(key: str, overrides: list[str]) -> str:
    """The key as the user typed it: OmegaConf names only the part up to where it gave up."""
    typed = [word.partition("=")[0].lstrip("+~") for word in overrides]
    for word in typed:
        if word == key or (key and word.startswith(f"{key}.")):
            return word
    stray = [word for word in typed if word.split(".")[0] in ("stage", "stages") and "." in word]
    return key or (stray[0] if stray else "")


def _structural(text: str, overrides: list[str]) -> str | None:
    """Errors that Hydra raises about the words themselves."""
    first = text.split("\n")[0]
    if match := re.search(r"Could not override '(\w+)@stages\.([\w-]+)'", first):
        return f"the pipeline has no stage {match[2]!r}; add one with +{match[1]}@stages.{match[2]}=KIND"
    if match := re.search(r"An item is already at '([^']+)'", first):
        return f"{match[1]}: is there already; write {match[1]}=VALUE without the +"
    if match := re.search(r"Could not delete.*'([^']+)'", first):
        return f"~{match[1]}: there is nothing of that name to take out"
    if match := re.search(r"Ambiguous value for argument '([^']+)'", first):
        key, _, value = match[1].partition("=")
        return f"{match[1]}: several values; sweep over them with -m, or write a list: {key}=[{value}]"
    if "Config group override must be" in first:
        return "a group takes the name of an option, for example data=toy or stage=sft"
    if match := re.search(r"Multiple values for (\S+?)\.", first):
        return f"{match[1]}: chosen twice; keep one of them"
    if "does not support deletion" in text:
        key = next((word for word in overrides if word.startswith("~") and "." in word), "~key")
        return f"{key}: keys cannot be taken out, only changed"
    return None


def _at(key: str, overrides: list[str], files: list[Path]) -> str:
    """`file:line: ` of a key that a user's file sets and no word does."""
    if any(word.lstrip("+~").partition("=")[0] in (key, _typed_key(key, overrides)) for word in overrides):
        return ""
    found = find_key(files, key) if key and files else None
    return f"{found[0]}:{found[1]}: " if found else ""


_EXPECTED = {
    "could not be converted to Float": "a number",
    "could not be converted to Integer": "a whole number",
    "could not be converted to Boolean": "true or false",
    "is not a ListConfig": "a list, [a,b]",
}


def _complaint(error: BaseException, text: str, tree: Callable[[], Tree]) -> str:
    if "MissingMandatoryValue" in text or isinstance(error, MissingMandatoryValue):
        return _missing_value(str(getattr(error, "full_key", "")))
    if isinstance(error, InterpolationToMissingValueError):
        return f"takes its value from a key that has none ({_quoted(text)}); set one of the two"
    if isinstance(error, InterpolationKeyError):
        name = _quoted(text)
        found = suggest(name, tree())
        return f"${{{name}}} names no key." + (f" Did you mean ${{{found[0]}}}?" if found else "")
    if match := re.search(r"Environment variable '([^']+)' not found", text):
        return f"the environment variable {match[1]} is not set; set it, or give the value here"
    value = re.search(r"Value '(.*?)' of type", text)
    for marker, expected in _EXPECTED.items():
        if marker in text:
            source = re.search(r"dereferencing interpolation '([^']+)'", text)
            origin = f", from {source[1]}" if source else ""
            return f"expected {expected}" + (f", got {value[1]!r}{origin}" if value else "")
    if "Recursive interpolation" in text:
        return "takes its value from itself, by way of others; give one of them a value"
    if isinstance(error, InterpolationResolutionError | UnsupportedInterpolationType | GrammarParseError):
        return " ".join(text.split("\n")[0].split())
    if re.search(r"is not a subclass of|Cannot assign|Merge error", text):
        return "is a section of keys, not a value; set one of the keys in it"
    cause = error.__cause__ if isinstance(error.__cause__, ValidationError) else error
    return " ".join(str(cause).split("\n")[0].split())


def _missing_value(key: str) -> str:
    if key.endswith("reward_model"):
        return (
            f"is not set; name a reward model: {key}=latest/rm (the newest one), RUN/rm or a folder; "
            f"or null, beside a function of your own (reward.function)"
        )
    return f"has no value; set it: {key}=VALUE"


def _quoted(text: str) -> str:
    match = re.search(r"'([^']+)'", text) or re.search(r"node (\S+)", text)
    return match[1].rstrip(".") if match else ""
