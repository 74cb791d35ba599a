"""The user's own function in a configuration, found and looked at, never run: that is for the stage's own process.

`FILE.py:NAME` -> file read, its names listed from the syntax tree -> path, name, hash; or one line with the mend
"""

import ast
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from alignpipe.errors import ConfigError, did_you_mean, nearest
from alignpipe.task import FunctionInput

# How every function is called, see evaluation/reward_function.py.
ARGUMENTS = ("prompts", "responses")


def find_function(key: str, text: str) -> FunctionInput:
    """Where a function of the user's lies.

    Args:
        key: of the configuration that names it.
        text: `FILE.py:NAME`, seen from the working folder.

    Raises:
        ConfigError: there is no such file, it is no Python, or holds no such function of two arguments.
    """
    file, colon, name = text.rpartition(":")
    if not colon or not file or not name.isidentifier():
        raise ConfigError(
            f"{key}: {text!r} names no function; write FILE.py:NAME, such as ./my_reward.py:score"
        )
    path = Path(file).expanduser().absolute()
    try:
        source = path.read_bytes()
    except OSError as error:
        siblings = [item.name for item in path.parent.glob("*.py")] if path.parent.is_dir() else []
        near = nearest(path.name, siblings)
        mend = f" Did you mean {Path(file).parent / near}:{name}?" if near else ""
        raise ConfigError(f"{key}: {path} cannot be read ({error.strerror}).{mend}") from error
    try:
        tree = ast.parse(source)
        compile(tree, str(path), "exec")
    except SyntaxError as error:
        raise ConfigError(f"{file}:{error.lineno or 1}: not Python: {error.msg}") from error
    except ValueError as error:
        raise ConfigError(f"{file}: not Python: {error}") from error
    known = list(_names(tree.body))
    if name not in known:
        raise ConfigError(
            f"{key}: {file} has no {name!r} at its top level. {did_you_mean(name, known)}".strip()
        )
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name and not _takes_two(node.args):
            raise ConfigError(
                f"{file}:{node.lineno}: it is called as {name}({', '.join(ARGUMENTS)}), two arguments"
            )
    return FunctionInput(text, str(path), name, hashlib.sha256(source).hexdigest())


def _names(body: Sequence[ast.stmt]) -> Iterator[str]:
    """What a file binds at its top level, also under an `if` or a `try`."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.If | ast.Try):
            yield from _names([*node.body, *node.orelse])
            for handler in getattr(node, "handlers", []):
                yield from _names(handler.body)


def _takes_two(arguments: ast.arguments) -> bool:
    places = len(arguments.posonlyargs) + len(arguments.args)
    needed = places - len(arguments.defaults)
    enough = places >= len(ARGUMENTS) or arguments.vararg is not None
    return needed <= len(ARGUMENTS) and enough and None not in arguments.kw_defaults
