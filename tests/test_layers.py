"""Imports run one way; a test reads every import of the package and fails on any other edge."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "alignpipe"
# What everybody may use: words, errors, what a stage is told and what it leaves behind.
BASE = {
    "config",
    "errors",
    "artifact",
    "disk",
    "task",
    "signals",
    "objective",
    "gates",
    "checks",
    "secrets",
    "remote_code",
    "terminal",
}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "secrets": set(),
    "remote_code": {"errors"},
    "terminal": set(),
    "config": {"errors"},
    "checks": {"config", "errors"},
    "artifact": {"disk", "errors"},
    "disk": {"errors"},
    "signals": {"errors"},
    "objective": {"config", "errors"},
    "gates": {"config", "errors", "objective"},
    "task": {"artifact", "config", "errors"},
    "processes": {"errors"},
    "toy": set(),
    "losses": set(),
    "data": {"toy"} | BASE,
    "models": {"processes", "data", "losses", "toy"} | BASE,
    "rollout": {"processes", "models", "data", "losses"} | BASE,
    "training": {"processes", "models", "data", "losses"} | BASE,
    "evaluation": {"processes", "rollout", "training", "models", "data", "toy", "losses"} | BASE,
    "stages": {"processes", "evaluation", "rollout", "training", "models", "data", "toy", "losses"} | BASE,
    "worker": {"processes", "stages", "training"} | BASE,
    "launcher": {"artifact", "task"},
    "compose": {"data"} | BASE,
    "pipeline": {"data", "worker"} | BASE,
    "sweep": BASE,
    "job": {"compose", "pipeline", "sweep"} | BASE,
    "replay": {"compose", "pipeline", "training", "worker"} | BASE,
    "doctor": {"pipeline"} | BASE,
    "hydra_front": {"compose", "job", "sweep"} | BASE,
    "cli": {"compose", "doctor", "hydra_front", "pipeline", "data", "replay"} | BASE,
    "__main__": {"cli"},
    "__init__": set(),
}
# `python -m alignpipe plan` must not wait for them.
SLOW = {"torch", "transformers", "accelerate", "safetensors"}
QUICK = (
    "errors",
    "secrets",
    "remote_code",
    "terminal",
    "config",
    "checks",
    "artifact",
    "disk",
    "signals",
    "objective",
    "gates",
    "task",
    "toy",
    "data",
    "pipeline",
    "compose",
    "sweep",
    "job",
    "hydra_front",
    "cli",
)


def _modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """Dotted names that a module imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_only_what_its_layer_may(path: Path) -> None:
    unit = _unit(path)
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "alignpipe" and len(parts) > 1 and parts[1] != unit and parts[1] != "__version__":
            assert parts[1] in ALLOWED[unit], f"{unit} must not import {name}"


def test_stages_import_no_other_stage() -> None:
    for path in (PACKAGE / "stages").glob("*.py"):
        if path.name != "__init__.py":
            assert not any(name.startswith("alignpipe.stages") for name in _imports(path)), path


@pytest.mark.parametrize("unit", QUICK)
def test_planning_layer_names_no_slow_package(unit: str) -> None:
    for path in _modules():
        # Where tensors are made, torch is imported, and only stages import that.
        if _unit(path) == unit and path.relative_to(PACKAGE).as_posix() != "data/collate.py":
            slow = {name.split(".")[0] for name in _imports(path)} & SLOW
            assert not slow, f"{path} imports {slow}"


def test_files_have_telling_names() -> None:
    for path in _modules():
        assert path.stem not in ("utils", "helpers", "common", "misc"), path


# Where the function runs that the user names as a reward, in a file of his own.
USERS_CODE = "evaluation/reward_function.py"
# Builtins that run a text, and functions that run what a name leads to.
BUILTINS = {"exec", "eval", "__import__"}
LOADERS = {"import_module", "run_path", "run_module", "exec_module", "load_module", "spec_from_file_location"}


def _runs(path: Path) -> list[str]:
    """What a module calls to run code that it does not itself name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        # A fixed name, as of a package that not everybody has, is an import like any other.
        if isinstance(node, ast.Call) and not all(isinstance(value, ast.Constant) for value in node.args):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if name in LOADERS or (name in BUILTINS and isinstance(node.func, ast.Name)):
                found.append(name)
    return found


def test_only_the_users_reward_is_run_from_a_file_and_in_one_place() -> None:
    found = {path.relative_to(PACKAGE).as_posix(): _runs(path) for path in _modules()}
    assert {name: calls for name, calls in found.items() if calls} == {USERS_CODE: ["exec"]}


def test_no_process_but_a_stages_own_can_reach_the_users_reward() -> None:
    readers = {
        path.relative_to(PACKAGE).parts[0]
        for path in _modules()
        if "alignpipe.evaluation.reward_function.RewardFunction" in _imports(path)
    }
    assert readers == {"evaluation"}


# What makes objects of any class out of a file or a name.
MODULES = ("pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "hydra.utils")
CALLS = {
    "torch.load",
    "pandas.read_pickle",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "instantiate",
}


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_makes_no_object_of_a_class_that_a_file_names(path: Path) -> None:
    unsafe = {name for name in _imports(path) if f"{name}.".startswith(tuple(f"{one}." for one in MODULES))}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unsafe |= {name for node in ast.walk(tree) if (name := _called(node)).endswith(tuple(CALLS))}
    trusting = [
        word
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "weights_only", "allow_pickle")
        for word in [ast.unparse(node)]
        if word == f"{node.arg}=True"
    ]
    assert not unsafe and not trusting


def _called(node: ast.AST) -> str:
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def test_versions_with_known_holes_are_not_installed_beside_it() -> None:
    """Each closes a way by which a file ran code, such as CVE-2026-24747 of torch and CVE-2026-4372 of transformers."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    floors = dict(
        re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(project["project"]["dependencies"]), re.MULTILINE)
    )
    for package, safe in {"torch": (2, 10), "transformers": (5, 3), "hydra-core": (1, 3, 4)}.items():
        assert tuple(map(int, floors[package].split("."))) >= safe
