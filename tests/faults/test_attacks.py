"""Files and words made to run code, or to write elsewhere: none of it happens, and each is refused in one line."""

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from alignpipe.artifact import read_manifest
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.models.saving import save_model
from tests.faults.table import Faults
from tests.project import SMALL

MARKER = "marker"
SECONDS = 1.0
SMALLEST = " ".join((*SMALL, "model.training.sft.max_steps=1", "model.training.sft.num_samples=2"))
OWN = "--config-dir conf"
EIGHT = "[{}]".format(",".join(["*{0}"] * 8))
BOMB = "a: &a [1,1,1,1,1,1,1,1]\n" + "".join(
    f"{new}: &{new} {EIGHT.format(old)}\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


class Payload:
    """What makes the marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self._marker}",)


@dataclass(frozen=True)
class Attack:
    """A file or words of an attacker.

    Attributes:
        name: in a few words.
        code: that the shell gets.
        told: why it is refused.
        typed: after `alignpipe`.
        files: in the working folder; `MARKER` in them is the file that must not come to be.
        prepare: done to the working folder.
    """

    name: str
    code: int
    told: str
    typed: str
    files: dict[str, str | Callable[[Path], bytes]]
    prepare: Callable[[Path], None] = lambda _: None


def _pickled(folder: Path) -> bytes:
    return pickle.dumps(Payload(folder / MARKER))


def _only_pickled(name: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        (folder / "model" / "model.safetensors").unlink()
        (folder / "model" / name).write_bytes(_pickled(folder))

    return prepare


def _with(**values: object) -> Callable[[Path], None]:
    """More keys in a model's configuration."""

    def prepare(folder: Path) -> None:
        path = folder / "model" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return prepare


def _with_index(shard: str) -> Callable[[Path], None]:
    """An index that names a file elsewhere, which is there."""

    def prepare(folder: Path) -> None:
        weights = folder / "model" / "model.safetensors"
        weights.rename(folder / "elsewhere.safetensors")
        index = {"weight_map": {"x": shard.format(folder)}}
        (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))

    return prepare


def _linked_run(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "outputs" / "runs").mkdir(parents=True)
    (folder / "outputs" / "runs" / "mine").symlink_to(folder / "elsewhere")


def _model(name: str, told: str, prepare: Callable[[Path], None], **files: str) -> Attack:
    placed: dict[str, str | Callable[[Path], bytes]] = {f"model/{file}": text for file, text in files.items()}
    return Attack(name, 4, told, "run stage=sft model=./model", placed, prepare)


def _yaml(name: str, told: str, text: str, more: str = "") -> Attack:
    typed = f"run stage=sft experiment=mine {OWN} {more}"
    return Attack(name, 2, told, typed, {"conf/experiment/mine.yaml": text, **IMPORTED})


def _words(name: str, words: str) -> Attack:
    return Attack(name, 2, NO_CODE, f"run stage=sft {words}", dict(IMPORTED))


def _nothing(_folder: Path) -> None:
    pass


IMPORTED: dict[str, str | Callable[[Path], bytes]] = {
    "evil.py": f"open('{MARKER}', 'w')\ndef run(*_, **__):\n    open('{MARKER}', 'w')\n"
}
CALLED = "{_target_: evil.run}"
DECODED = f"\"${{oc.decode:'{CALLED}'}}\""
NO_CODE = "no configuration names code"
CLIMBING = f"{{{{ cycler.__init__.__globals__.os.system('touch {MARKER}') }}}}"
ATTACKS = [
    _model("pickled .bin", "no safetensors weights", _only_pickled("pytorch_model.bin")),
    _model("pickled .pt", "no safetensors weights", _only_pickled("model.pt")),
    _model("a pickle called safetensors", "cut short or damaged", _only_pickled("model.safetensors")),
    _model("auto_map", "auto_map", _with(auto_map={"AutoModelForCausalLM": "evil.Model"})),
    _model("auto_map of a part", "auto_map", _with(text_config={"auto_map": {"AutoConfig": "evil.Config"}})),
    _model("internal attention", "code to be fetched", _with(_attn_implementation_internal="evil/kernel")),
    _model("attention of a repository", "code to be fetched", _with(attn_implementation="evil/kernel")),
    _model("attention of a part", "code to be fetched", _with(_attn_implementation={"text_config": "evil/kernel"})),
    _model("index that climbs", "outside of the folder", _with_index("../elsewhere.safetensors")),
    _model("index elsewhere", "outside of the folder", _with_index("{}/elsewhere.safetensors")),
    _model("template", "chat template refuses", _nothing, **{"chat_template.jinja": CLIMBING}),
    _model("adapter of another kind", "only LORA", _nothing, **{"adapter_config.json": '{"peft_type": "XLORA"}'}),
    Attack("pickled rows", 3, "suffix .pkl", "run stage=sft data=./rows.pkl", {"rows.pkl": _pickled}),
    Attack("pickled lines", 3, "rows.jsonl:1", "run stage=sft data=./rows.jsonl", {"rows.jsonl": _pickled}),
    Attack("script of a data set", 3, "no data file", "run stage=sft data=./rows", {"rows/x.py": IMPORTED["evil.py"]}),
    _words("_target_ as a word", "+stage._target_=evil.run"),
    _words("_target_ in a table", f"-m seed=1,2 '+hydra.callbacks.x={CALLED}'"),
    _words("_target_ by a table of its parent", f"-m seed=1,2 '+hydra={{callbacks: {{x: {CALLED}}}}}'"),
    _words("package searched", "hydra.searchpath=[pkg://evil]"),
    _words("search space", "-m seed=1,2 hydra/sweeper=optuna hydra.sweeper.custom_search_space=evil.run"),
    _yaml("_target_ in a file", NO_CODE, "# @package _global_\nseed: 1\n_target_: evil.run\n"),
    _yaml("callback by a resolver", NO_CODE, f"# @package hydra.callbacks\nx: {DECODED}\n",
          "-m seed=1,2 hydra/launcher=joblib"),
    _yaml("sampler by a resolver", NO_CODE, f"# @package hydra.sweeper\nstorage: {DECODED}\n",
          "-m seed=1,2 hydra/sweeper=optuna objective=sft.eval_loss"),
    _yaml("logging by a class", NO_CODE, "# @package hydra.job_logging\nhandlers: {x: {'()': evil.run}}\n",
          "-m seed=1,2 hydra/launcher=joblib"),
    _yaml("logging while it is shown", NO_CODE, "# @package hydra.hydra_logging\nhandlers: {x: {'()': evil.run}}\n",
          "--info config"),
    _yaml("tag", "the tag", f"# @package _global_\nseed: !!python/object/apply:os.system ['touch {MARKER}']\n"),
    _yaml("bomb", "more than 10000 values", BOMB),
    Attack("bomb in a folder of its own", 2, "more than 10000 values", f"run stage=sft experiment=mine {OWN}",
           {"conf/experiment/mine.yaml": "defaults: [/own/bomb]\n", "conf/own/bomb.yaml": BOMB}),
    Attack("bomb as the first file", 2, "more than 10000 values", f"run stage=sft {OWN} --config-name mine",
           {"conf/mine.yaml": BOMB}),
    Attack("package searched by the first file", 2, NO_CODE, f"run stage=sft {OWN} --config-name mine",
           {"conf/mine.yaml": "hydra: {searchpath: ['pkg://evil']}\n", **IMPORTED}),
    Attack("linked run", 2, "is a link to", "run stage=sft run.name=mine", {}, _linked_run),
]  # fmt: skip


@pytest.fixture
def folder(
    tmp_path: Path,
    make_llama: Callable[..., PreTrainedModel],
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[], Path]:
    """A new working folder with a whole model in it, whose modules Python would find."""
    save_model(make_llama(), tokenizer, tmp_path / "whole")

    def make() -> Path:
        made = tmp_path / str(time.monotonic_ns())
        shutil.copytree(tmp_path / "whole", made / "model")
        monkeypatch.syspath_prepend(made)
        return made

    return make


def test_nothing_of_an_attacker_is_run(
    folder: Callable[[], Path],
    typed: Callable[..., tuple[int, str]],
    count: Callable[[int, int], int],
    faults: Faults,
) -> None:
    tried = ATTACKS[:: count(3, 1)]
    wrong = {}
    for attack in tried:
        here = folder()
        for name, content in attack.files.items():
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            text = content.replace(MARKER, str(here / MARKER)) if isinstance(content, str) else content(here)
            (here / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        attack.prepare(here)
        began = time.monotonic()
        code, told = typed(here, f"{attack.typed} {SMALLEST}")
        seconds = time.monotonic() - began
        assert not (here / MARKER).exists(), attack.name
        assert not list((here / "elsewhere").glob("*")), attack.name
        if code != attack.code or attack.told not in told or ("bomb" in attack.name and seconds > SECONDS):
            wrong[attack.name] = f"{code} after {seconds:.1f} s: {told}"
    assert not wrong
    faults.tell("files and words of an attacker: nothing run", len(tried), len(tried))


def _with_own_code(model: Path, marker: Path) -> None:
    """Make a model one that comes with its own code."""
    (model / "modeling_own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(marker)!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    path = model / "config.json"
    own = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "own", "auto_map": own}))


def test_code_of_a_model_runs_for_the_one_that_is_named_and_is_recorded(
    folder: Callable[[], Path], typed: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = folder()
    marker = here / MARKER
    _with_own_code(here / "model", marker)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(here / "modules"))
    line = f"run stage=sft model=./model {SMALLEST}"
    for word, code in (("", 4), ("model.trust_remote_code=./other", 2), ("model.trust_remote_code=true", 2)):
        assert typed(here, f"{line} {word}")[0] == code
    assert not marker.exists()
    trusted = "model.trust_remote_code=./model"
    code, told = typed(here, f"{line} {trusted}")
    assert (code, marker.exists()) == (0, True), told
    (stage,) = (here / "outputs" / "stages").iterdir()
    manifest = read_manifest(stage)
    assert manifest is not None
    assert manifest.inputs["trust_remote_code"] == "./model"
    # What was made of it comes with the same code, and is opened by the same word alone.
    again = f"run stage=sft stage.policy=latest/sft {SMALLEST}"
    code, told = typed(here, f"{again} model=./model {trusted}")
    assert code == 0, told
    assert typed(here, again)[0] == 4
