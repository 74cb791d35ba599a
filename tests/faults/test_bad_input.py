"""Whatever is wrong in words, files, data, models or on the machine is told in one line, and nothing is overwritten.

The numbers are those of a catalogue of 118 mistakes, of which those of one place stand together here; what a killed,
full or failing machine does is tried in the other files of this folder.
"""

import gzip
import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from alignpipe.artifact import sha256_file
from alignpipe.data import lines
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.models.saving import save_model
from alignpipe.pipeline.store import HOLDER, LOCK, Store
from tests.faults.table import Faults
from tests.project import SMALL

MAX_LINE = 300
ON_CPU = ("launch.device=cpu", *SMALL)
# How a line says what to do about it.
MEND = re.compile(
    r"; |[Dd]id you mean|must (be|hold)|expected|Known:|is not set|write |neede?[ds]|names no|List keys"
)


@dataclass(frozen=True)
class Case:
    """A mistake.

    Attributes:
        number: in the catalogue.
        typed: after `alignpipe`.
        told: what the line holds: the key or `file:line`, and what is right.
        code: that the shell gets.
        files: in the working folder.
        damage: done to the working folder first.
    """

    number: str
    typed: str
    told: str
    code: int = 2
    files: dict[str, str | bytes] = field(default_factory=dict)
    damage: Callable[[Path], None] = lambda _: None


def _row(**values: object) -> str:
    return json.dumps(values) + "\n"


def _long(number: int) -> str:
    return _row(prompt=f"{number} " * 300, completion="x")


GOOD = _row(prompt="Question?", completion="Answer.")
PAIR = _row(prompt="Question?", chosen="Yes.", rejected="No.")
PPO = "run stage=ppo stage.reward_model=rm"
RS = "run stage=rs stage.reward_model=rm"
OWN = "--config-dir conf"
EXPERIMENT = "# @package _global_\n"


def _yaml(number: str, text: str | bytes, told: str) -> Case:
    """A fault in a file of the user's own."""
    return Case(number, f"run stage=sft model=mine {OWN}", told, files={"conf/model/mine.yaml": text})


WORDS = [
    Case(
        "B1 in a file",
        f"run experiment=mine {OWN}",
        "mine.yaml:3: there is no key 'stages.ppo.learing_rate'. Did you mean stages.ppo.learning_rate?",
        files={"conf/experiment/mine.yaml": EXPERIMENT + "stages:\n  ppo: {learing_rate: 1}\n"},
    ),
    Case("B1", "run stage=sft stage.learing_rate=1", "Did you mean stage.learning_rate?"),
    Case("B2", "run +stages.ppo.foo=1", "there is no key 'stages.ppo.foo'"),
    Case(
        "B3", "run stage=sft stage.learning_rate=fast", "stage.learning_rate: expected a number, got 'fast'"
    ),
    Case("B4", "run stage=sft stage.learning_rate=0", "stage.learning_rate: must be more than 0"),
    Case("B5", "run stage=sft stage.learning_rate=-1", "stage.learning_rate: must be more than 0"),
    Case("B6", "run stage=sft stage.learning_rate=nan", "stage.learning_rate: must be a finite number"),
    Case("B7", "run stage=sft stage.learning_rate=inf", "stage.learning_rate: must be a finite number"),
    Case("B8", f"{PPO} stage.kl_coef=-0.1", "stage.kl_coef: must be at least 0"),
    Case("B9", "run stage=dpo stage.beta=0", "stage.beta: must be more than 0"),
    Case("B10 gamma", f"{PPO} stage.gamma=1.5", "stage.gamma: must be at most 1"),
    Case("B10 lambda", f"{PPO} stage.gae_lambda=-1", "stage.gae_lambda: must be at least 0"),
    Case("B10 clip", f"{PPO} stage.clip_range=0", "stage.clip_range: must be more than 0"),
    Case(
        "B10 temperature", "run stage=eval rollout.temperature=0", "rollout.temperature: must be more than 0"
    ),
    Case("B10 top p", "run stage=eval rollout.top_p=0", "there is no key 'rollout.top_p'"),
    Case("B11", "run stage=sft stage.warmup_ratio=1.5", "stage.warmup_ratio: must be at most 1"),
    Case("B12", "run stage=sft stage.batch_size=10 stage.micro_batch_size=4", "nearest: 8 or 12"),
    Case("B13", f"{RS} stage.num_samples=1", "stage.num_samples: must be at least 2"),
    Case("B14", f"{RS} stage.select=top_k stage.top_k=9", "stage.top_k: 9 responses a prompt are to be kept"),
    Case("B15", "run stage=sft stage.max_length=3", "raise max_length or set data.on_overflow=cut", 3),
    Case("B17 text", "run stage=sft seed=abc", "seed: expected a whole number, got 'abc'"),
    Case("B17 large", "run stage=sft seed=4294967296", "seed: must be at most 4294967295"),
    _yaml("B18", "path: no\n", "mine.yaml:1: YAML reads no as a truth value; quote it: 'no'"),
    _yaml("B19", "max_length: 010\n", "mine.yaml:1: YAML reads 010 as another number"),
    _yaml("B20", "path: x\nrevision: y\npath: z\n", "mine.yaml:3: the key 'path' stands in line 1 already"),
    _yaml("B21 bracket", "a: [1\nb: 2\n", "mine.yaml:2:2: not YAML"),
    _yaml("B21 tab", "a:\n\tb: 2\n", "mine.yaml:2:1: not YAML"),
    _yaml("B22", "path: !!python/object:os.system x\n", "mine.yaml:1: the tag"),
    _yaml(
        "B23 bomb",
        "a: &a [1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
        "d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d]\n",
        "mine.yaml: more than 10000 values",
    ),
    _yaml("B23 depth", "a: " + "[" * 5000, "mine.yaml: nested too deep"),
    _yaml("B23 size", "a: 1\n" * 300_000, "mine.yaml: more than 1,000,000 bytes"),
    _yaml("B24 empty", "", "mine.yaml: is empty"),
    _yaml("B24 list", "- a\n", "mine.yaml: must hold `key: value` lines"),
    Case("B25 key", "run stage=sft 'stage.learning_rate=${seeed}'", "Did you mean ${seed}?"),
    Case("B25 circle", "run stage=sft 'seed=${stage.seed}'", "seed"),
    Case(
        "B25 variable",
        "run stage=sft 'stage.policy=${oc.env:NOT_SET}'",
        "the environment variable NOT_SET is not",
    ),
    Case("B26", "run stage=rs", "stage.reward_model: is not set; name a reward model"),
    Case("B26 path", "run stage=sft data=file", "data.path: is empty; write data="),
    Case(
        "B27",
        f"run stage=mine {OWN}",
        "stage/mine.yaml: there is no option 'pppo' in the group 'stage'. Did you mean ppo?",
        files={"conf/stage/mine.yaml": "defaults: [pppo, _self_]\n"},
    ),
    _yaml("B28", "path: caf\xe9\n".encode("latin1"), "mine.yaml: not UTF-8 at byte 9"),
    _yaml("B29", "path: x\n_target_: os.system\n", "mine.yaml:2: _target_ is refused"),
    Case("B29 word", "run stage=sft +stage._target_=os.system", "a stage is chosen by its kind"),
    Case(
        "B30", "run stage=sft model.revision=hf_abcdefghijklmnopqrst", "model.revision: looks like a secret"
    ),
    *(
        Case(f"B31 {name}", f"run stage=sft run.name={name}", "run.name")
        for name in ("../x", "-rf", "''", "a" * 300, "CON", "con.txt", "a/b", ".")
    ),
    Case("B32", "run stage=sfft", "there is no option 'sfft' in the group 'stage'. Did you mean sft?"),
    Case(
        "B33",
        "run pipeline.order=[sft,colect]",
        "pipeline.order: there is no stage 'colect'. Did you mean collect?",
    ),
    Case(
        "B34",
        "run pipeline.order=[eval] stages.eval.policies=[ppo] stages.ppo.policy=rs stages.rs.policy=ppo",
        "a circle, ppo -> rs -> ppo",
    ),
    Case("B35", "run pipeline.order=[sft,sft]", "pipeline.order: sft stands in it twice"),
    Case("B36 policy", "run stages.ppo.policy=rm", "stages.ppo.policy: rm is made by a stage of kind rm"),
    Case(
        "B36 reward",
        "run stages.ppo.reward_model=sft",
        "stages.ppo.reward_model: sft is made by a stage of kind",
    ),
    Case(
        "B36 none", "run pipeline.order=[sft,ppo] stages.ppo.policy=sft", "add collect to pipeline.order", 4
    ),
    Case("B38", "run pipeline.order=[]", "pipeline.order: is empty; the stages of this pipeline are"),
    Case(
        "B39",
        "run stage=sft run.name=mine",
        "run.name: mine was run with other settings (sft: ",
        files={
            "outputs/runs/mine/run.json": json.dumps({"stages": [{"name": "sft", "kind": "sft", "key": "0"}]})
        },
    ),
    Case("B44", "run stage=sft trackers=[wnadb]", "trackers: there is no 'wnadb'. Did you mean wandb?"),
    Case("command", "rnu", "there is no command 'rnu'. Did you mean run?"),
    Case("flag", "ls --nosuch", "No such option"),
    Case("argument", "config search", "argument"),
]


def _rows(number: str, content: str | bytes, told: str, stage: str = "sft") -> Case:
    """A fault in a file of rows."""
    return Case(number, f"run stage={stage} data=rows.jsonl", told, 3, {"rows.jsonl": content})


def _pairs(number: str, row: str, told: str) -> Case:
    """A fault in the second pair of a file."""
    return _rows(number, PAIR + row, told, "dpo")


def _talk(*roles: str) -> str:
    return _row(messages=[{"role": role, "content": "x"} for role in roles])


def _without_rights(folder: Path) -> None:
    # A file that even root cannot read.
    (folder / "rows.jsonl").symlink_to("/proc/self/mem")


ROWS = [
    Case("B45", "run stage=sft data=./rowz.jsonl", "Did you mean rows.jsonl?", 3, {"rows.jsonl": GOOD}),
    Case("B46", "run stage=sft data=./rows", "holds no data file; give a", 3, {"rows/x.md": "x"}),
    Case("B47", "run stage=sft data=rows.jsonl", "rows.jsonl cannot be read", 3, damage=_without_rights),
    Case("B47 device", "run stage=sft data=/dev/zero", "/dev/zero: no suffix; expected one of", 3),
    _rows("B48", "", "rows.jsonl is empty; expected at least one row"),
    _rows("B49", "\n \n", "rows.jsonl has no rows; expected at least one"),
    _rows("B50", GOOD * 2 + '{"prompt": \n' + GOOD, "rows.jsonl:3:12: broken JSON"),
    _rows("B51", GOOD * 2 + '{"prompt": "x', "rows.jsonl:3:12: broken JSON"),
    _rows("B52", GOOD + "[]\n" + GOOD, "rows.jsonl:2: is an array, expected an object"),
    _rows(
        "B53",
        _row(colour="red", shape="round"),
        "rows.jsonl:1: no known layout. It has the columns colour, shape",
    ),
    _rows(
        "B53 many",
        _row(**{f"column_{i}": 1 for i in range(90)}),
        "It has the columns column_0, column_1",
    ),
    _rows("B54", GOOD + _row(prompt="x", completion=None), "rows.jsonl:2: completion is null, expected text"),
    _rows(
        "B55", GOOD + _row(prompt="x", completion=5), "rows.jsonl:2: completion is a number, expected text"
    ),
    _pairs(
        "B55 long", _row(prompt="x", chosen="a", rejected="b", margin=10**400), "rows.jsonl:2: margin holds"
    ),
    _rows("B56", GOOD + _row(prompt="x", completion=" \n"), "rows.jsonl:2: completion is empty"),
    _rows("B57", GOOD.encode() * 3 + b'{"prompt": "caf\xe9"}\n', "rows.jsonl:4: not UTF-8 (byte"),
    _rows("B58", GOOD.encode("utf-16"), "rows.jsonl is UTF-16, expected UTF-8; convert it with iconv"),
    _rows("B59 NUL", GOOD + _row(prompt="\0", completion="x"), "rows.jsonl:2: prompt holds a NUL character"),
    _rows(
        "B59 half",
        GOOD + _row(prompt="\ud800", completion="x"),
        "rows.jsonl:2: prompt holds a lone surrogate",
    ),
    _rows(
        "B60", GOOD + '{"prompt": "x", "prompt": "y"}\n', "rows.jsonl:2: column 'prompt' stands there twice"
    ),
    _rows("B61", GOOD + '{"prompt": NaN}\n', "rows.jsonl:2: NaN is no JSON number; write null"),
    _pairs("B62", _row(prompt="x", chosen="a", rejected="a "), "rows.jsonl:2: chosen and rejected are equal"),
    Case(
        "B65",
        "run stage=sft data=rows.jsonl data.on_overflow=error stage.max_length=20",
        "raise max_length or set data.on_overflow=cut or drop",
        3,
        {"rows.jsonl": GOOD + _row(prompt="word " * 50, completion="x")},
    ),
    _rows(
        "B66",
        "".join(map(_long, range(9))),
        "raise max_length or set data.on_overflow=cut",
    ),
    Case(
        "B67",
        "run stage=dpo data=rows.jsonl data.on_overflow=cut stage.max_length=24",
        "max_length=24",
        3,
        {"rows.jsonl": _row(prompt="x", chosen="same " * 50 + "a", rejected="same " * 50 + "b")},
    ),
    Case(
        "B68",
        "run stage=eval stage.policies=[base] data=rows.jsonl data.shares={sft:0.99,preference:0,rl:0,eval:0.01}",
        "give more rows or change data.shares",
        3,
        {"rows.jsonl": GOOD},
    ),
    _rows("B70 role", _talk("user", "assistant") + _talk("tool"), "has role 'tool', expected"),
    _rows(
        "B70 twice",
        _talk("user", "assistant") + _talk("user", "user"),
        "rows.jsonl:2: messages: user after user",
    ),
    _rows(
        "B70 silent",
        _talk("user", "assistant") + _talk("user"),
        "rows.jsonl:2: the conversation ends with the user",
    ),
    _rows(
        "B70 first", _talk("user", "assistant") + _talk("assistant"), "assistant comes first, expected user"
    ),
    _rows("B74", GOOD * 2 + _row(prompt="x" * 9000, completion="y"), "rows.jsonl:3: longer than 5,000 bytes"),
    _rows("B75 CSV", "prompt,completion\na,b\n", "rows.jsonl:1:1: broken JSON"),
    _rows("B75 Parquet", b"PAR1" + bytes(90), "rows.jsonl is Parquet data; rename it to rows.parquet"),
    Case("B75 text", "run stage=sft data=rows.md", "suffix .md; expected one of", 3, {"rows.md": GOOD}),
    Case(
        "B76",
        "run stage=sft data=rows.jsonl.gz",
        "rows.jsonl.gz is a broken gzip file",
        3,
        {"rows.jsonl.gz": gzip.compress(GOOD.encode() * 99)[:-20]},
    ),
    Case(
        "kind", "run stage=rm data=rows.jsonl", "needs rankings; give it other data", 3, {"rows.jsonl": GOOD}
    ),
]


def _edit(folder: Path, name: str, **values: object) -> None:
    path = folder / "model" / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _model(
    number: str, damage: Callable[[Path], None], told: str, typed: str = "run stage=sft model=./model"
) -> Case:
    """A fault in the folder of a model."""
    return Case(number, typed, told, 4, damage=damage)


def _cut(folder: Path) -> None:
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def _not_finite(folder: Path) -> None:
    weights = folder / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4:] = torch.tensor(float("nan")).numpy().tobytes()
    weights.write_bytes(content)


def _other_tokens(folder: Path) -> None:
    shutil.copytree(folder / "model", folder / "other")
    (folder / "other" / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")


MODELS = [
    _model("B84", lambda folder: None, "Did you mean model?", "run stage=sft model=./modle"),
    _model("B85", _cut, "model.safetensors: cut short or damaged"),
    _model("B85 later", _cut, "model.safetensors: cut short or damaged", "run stages.ppo.policy=./model"),
    _model(
        "B87",
        lambda folder: _edit(folder, "config.json", architectures=["LlamaForSequenceClassification"]),
        "a classifier with a scalar head; needed is a policy",
    ),
    _model("B88", lambda folder: _edit(folder, "config.json", num_hidden_layers=3), "missing weights: "),
    _model(
        "B88 shape",
        lambda folder: _edit(folder, "config.json", intermediate_size=48),
        "wrongly shaped weights: ",
    ),
    _model(
        "B89",
        _other_tokens,
        "has another tokenizer or chat template",
        "run stage=dpo model=./model stage.reference=./other",
    ),
    _model(
        "B91",
        lambda folder: (
            [
                _edit(folder, name, eos_token=None, eos_token_id=None)
                for name in (
                    "tokenizer_config.json",
                    "special_tokens_map.json",
                    "config.json",
                    "generation_config.json",
                )
            ]
            and None
        ),
        "no token ends a text; set eos_token",
    ),
    _model("B95", _not_finite, "holds NaN or infinity"),
    _model(
        "B96",
        lambda folder: (folder / "model/model.safetensors").rename(folder / "model/x.bin") and None,
        "no safetensors weights",
    ),
    _model(
        "B97", lambda folder: _edit(folder, "config.json", auto_map={"AutoModel": "evil.Model"}), "auto_map"
    ),
    _model(
        "B98",
        lambda folder: (folder / "model/alignpipe.json").write_text('{"format": 9}') and None,
        "is newer",
    ),
    _model(
        "B99",
        lambda folder: (folder / "model/alignpipe.json").write_text('{"format": "x"}') and None,
        "not a manifest",
    ),
    _model(
        "JSON",
        lambda folder: (folder / "model/config.json").write_text("[" * 9000) and None,
        "config.json: not JSON",
    ),
]


def _into_a_file(folder: Path) -> None:
    (folder / "taken").write_text("")


MACHINE = [
    Case(
        "B41",
        "run stage=sft launch.device=auto launch=ddp launch.num_processes=4",
        "launch.num_processes: 4 processes on a machine",
        5,
    ),
    Case("B44 absent", "run stage=sft trackers=[wandb]", "trackers: wandb is not installed; pip install", 5),
    Case("B106", "run stage=sft output_dir=/proc/outputs", "/proc/outputs: needs", 5),
    Case(
        "B107",
        "run stage=sft output_dir=taken",
        "output_dir: taken is a file; name a folder",
        damage=_into_a_file,
    ),
    Case("B117", "run stage=sft model=owner/absent", "owner/absent: the hub cannot be reached", 5),
    Case("B117 data", "run stage=sft data=owner/absent", "owner/absent: the hub cannot be reached", 5),
]
CASES = [*WORDS, *ROWS, *MODELS, *MACHINE]


@pytest.fixture
def complaint(
    tmp_path: Path,
    make_llama: Callable[..., PreTrainedModel],
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    typed: Callable[..., tuple[int, str]],
) -> Callable[[Case], str | None]:
    """What is wrong with how a mistake is told; None where nothing is."""
    save_model(make_llama(), tokenizer, tmp_path / "whole")
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 5000)
    monkeypatch.setattr("alignpipe.pipeline.plan.find_spec", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")

    def look(case: Case) -> str | None:
        folder = tmp_path / re.sub(r"\W", "_", case.number)[:12]
        shutil.copytree(tmp_path / "whole", folder / "model")
        for name, content in {
            "outputs/stages/sft-1/model": "kept",
            "outputs/runs/r/run.json": '{"stages": []}',
            **case.files,
        }.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        case.damage(folder)
        before = _kept(folder)
        monkeypatch.chdir(folder)
        command, _, words = case.typed.partition(" ")
        small = shlex.join(ON_CPU) if command == "run" else ""
        code, told = typed(folder, f"{command} {small} {words}")
        if code != case.code:
            return f"exit code {code}: {told}"
        *_, line = told.splitlines()
        if case.code != 4 and told.count("\n") != 1:
            return f"not one line: {told}"
        if (
            not line.startswith("error: ")
            or len(line) >= MAX_LINE
            or case.told not in line
            or not MEND.search(line)
        ):
            return f"told {len(line)} characters: {line}"
        after = _kept(folder)
        return (
            None
            if before.items() <= after.items() and (case.code == 4 or before == after)
            else f"touched: {line}"
        )

    return look


def _kept(folder: Path) -> dict[str, str]:
    """What no mistake may change: finished stages, and what is known of runs."""
    files = [path for name in ("stages", "runs") for path in (folder / "outputs" / name).rglob("*")]
    return {
        str(path): sha256_file(path) for path in files if path.is_file() and path.name not in (LOCK, HOLDER)
    }


@pytest.mark.parametrize("cases", [WORDS, ROWS, MODELS, MACHINE], ids=["words", "rows", "models", "machine"])
def test_bad_input_is_told_in_one_line(
    cases: list[Case],
    complaint: Callable[[Case], str | None],
    count: Callable[[int, int], int],
    faults: Faults,
) -> None:
    tried = cases[:: count(6, 1)]
    wrong = {case.number: found for case in tried if (found := complaint(case)) is not None}
    assert not wrong, "\n".join(f"{number}: {found}" for number, found in wrong.items())
    faults.tell("bad input: exit code, one line, mend", len(tried) - len(wrong), len(tried))


BASED = " ".join(
    f"stages.{name}=base" for name in ("collect.policy", "rm.policy", "ppo.policy", "ppo.reference")
)


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        ("model=./model model.max_length=999", "the model has 128 positions; longer max_length"),
        (f"pipeline.order=[sft,collect,rm,ppo] {BASED}", "sft: no later stage reads what it makes"),
        ("stage=sft data=rows.jsonl", "1 of 200 rows cannot be used (first "),
        (
            "stage=sft data=rows.jsonl stage.max_length=24",
            "of its rows are over max_length=24 and are dropped",
        ),
    ],
    ids=["B16", "B37", "bad row", "B65 dropped"],
)
def test_what_is_odd_but_allowed_is_said(
    words: str,
    warning: str,
    typed: Callable[..., tuple[int, str]],
    make_llama: Callable[..., PreTrainedModel],
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    save_model(make_llama(), tokenizer, tmp_path / "model")
    rows = [_row(prompt=f"{number} ?", completion="Yes. " * (1 + 9 * (number == 7))) for number in range(199)]
    (tmp_path / "rows.jsonl").write_text("".join([*rows, _row(prompt="x", completion="")]))
    code, told = typed(tmp_path, f"plan {shlex.join(SMALL)} {words}")
    assert code == 0, told
    assert warning in told


def test_data_that_changes_while_a_run_is_under_way_is_not_read(
    typed: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(_row(prompt=f"{number} ?", completion="Yes.") for number in range(99)))
    clear = Store.clear

    def change(store: Store, kind: str, key: str) -> Path | None:
        rows.write_text(rows.read_text().replace("Yes.", "No."))
        return clear(store, kind, key)

    # Between the first stage and the second.
    monkeypatch.setattr(Store, "clear", change)
    words = "pipeline.order=[sft,again] +stage@stages.again=sft stages.again.policy=sft data=rows.jsonl"
    more = (
        "stages.sft.max_steps=1 stages.again.max_steps=1 stages.sft.num_samples=0 stages.again.num_samples=0"
    )
    code, told = typed(tmp_path, f"run {shlex.join(ON_CPU)} {words} {more}")
    assert code == 3, told
    assert "has changed on the disk since this run was planned; run the same command again" in told
    assert len(list((tmp_path / "outputs" / "stages").iterdir())) == 1
