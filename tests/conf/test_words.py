"""What follows model= and data= reaches the configuration unchanged, whatever signs it holds."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from alignpipe.compose import compose
from alignpipe.compose.words import parse, quote, rewrite
from alignpipe.config import register
from alignpipe.errors import AlignpipeError, CheckpointError, ConfigError, DataError

OPTIONS = {"model": ["pretrained", "tiny"], "data": ["file", "toy"]}
ODD_NAMES = [
    "a=b.jsonl",
    "a#1.jsonl",
    "my file (1).jsonl",
    "한국어 자료.jsonl",
    "it's.jsonl",
    'say "hi".jsonl',
    "a,b.jsonl",
    "[x].jsonl",
    "{x}.jsonl",
    "a:b.jsonl",
    "~x.jsonl",
    "100%.jsonl",
    "x$y.jsonl",
    "back\\slash.jsonl",
    "end\\",
]


def _rewrite(*words: str, multirun: bool = False) -> list[str]:
    return rewrite(words, OPTIONS.__getitem__, multirun=multirun)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Make a file in the working folder."""
    monkeypatch.chdir(tmp_path)

    def make(name: str) -> Path:
        path = tmp_path / name
        path.write_text("{}\n", encoding="utf-8")
        return path

    return make


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_file_name_reaches_the_configuration(name: str, here: Callable[[str], Path]) -> None:
    path = here(name)
    composed = compose(["stage=sft", f"data={path}"])
    assert composed.config.data.path == str(path)
    assert composed.config.stage is not None
    assert composed.config.stage.data.path == str(path)


@given(
    st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="$"), min_size=1, max_size=30)
)
@settings(max_examples=200, deadline=None)
def test_quoted_text_is_read_back_unchanged(text: str) -> None:
    word = parse(f"key={quote(text)}")
    assert word is not None
    assert word.value() == text


def test_option_stays_as_it_is() -> None:
    assert _rewrite("model=tiny", "data=toy") == ["model=tiny", "data=toy"]


def test_hub_id_becomes_two_words() -> None:
    assert _rewrite("model=Qwen/Qwen3-0.6B") == ["model=pretrained", "model.path='Qwen/Qwen3-0.6B'"]


def test_folder_without_slash_is_a_path_when_it_is_there(here: Callable[[str], Path]) -> None:
    here("x").with_name("mymodel").mkdir()
    assert _rewrite("model=mymodel") == ["model=pretrained", "model.path='mymodel'"]


@pytest.mark.parametrize("key", ["stage.data", "stages.rm.data", "stages.rs_2.data", "stage.demonstrations"])
def test_data_of_a_stage_becomes_its_path(key: str, here: Callable[[str], Path]) -> None:
    here("hh (1).jsonl")
    assert _rewrite(f"{key}=hh (1).jsonl") == [f"{key}.path='hh (1).jsonl'"]
    assert _rewrite(f"{key}=collect") == [f"{key}.path='collect'"]
    with pytest.raises(DataError, match="no such file"):
        _rewrite(f"{key}=nothing.jsonl")


def test_path_typed_in_full_is_quoted_when_hydra_could_not_read_it(here: Callable[[str], Path]) -> None:
    composed = compose(["stage=sft", "data=file", "data.path=자료 (1)=x.jsonl", "stage.policy=./out #1/sft"])
    assert composed.config.data.path == "자료 (1)=x.jsonl"
    assert composed.config.stage is not None
    assert vars(composed.config.stage)["policy"] == "./out #1/sft"


@pytest.mark.parametrize(
    ("word", "error", "text"),
    [
        ("data=./mine.jsnl", DataError, "Did you mean mine.jsonl"),
        ("data=mine.jsnl", DataError, "Did you mean mine.jsonl"),
        ("data=/nowhere/x.jsonl", DataError, "no such file"),
        ("data=sub/x.jsonl", DataError, "no such file"),
        ("model=./nothing", CheckpointError, "no such file or folder"),
        ("model=a/b/c", CheckpointError, "no such file or folder"),
        ("model=tinny", ConfigError, "Did you mean tiny"),
        ("data=tyo", ConfigError, "Did you mean toy"),
        ("data=", ConfigError, "needs a value"),
    ],
)
def test_unknown_word_is_refused_by_its_kind(
    word: str, error: type[AlignpipeError], text: str, here: Callable[[str], Path]
) -> None:
    here("mine.jsonl")
    with pytest.raises(error, match=text) as caught:
        _rewrite(word)
    assert type(caught.value) is error


def test_sweep_over_paths_or_over_options_but_not_both(here: Callable[[str], Path]) -> None:
    here("a.jsonl")
    here("나.jsonl")
    assert _rewrite("data=a.jsonl,나.jsonl", multirun=True) == ["data=file", "data.path='a.jsonl','나.jsonl'"]
    assert _rewrite("model=tiny,pretrained", multirun=True) == ["model=tiny,pretrained"]
    with pytest.raises(ConfigError, match="not both"):
        _rewrite("data=toy,a.jsonl", multirun=True)


def test_interpolation_in_a_path_stays_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_DATA", "/somewhere")
    composed = compose(["stage=sft", "data=${oc.env:MY_DATA}/x.jsonl"])
    assert composed.config.data.path == "/somewhere/x.jsonl"
    assert "/somewhere" not in composed.yaml


def test_stage_alone_leaves_the_pipeline_out() -> None:
    composed = compose(["stage=sft"])
    assert composed.config.pipeline is None
    assert composed.config.stages == {}


def test_stage_beside_pipeline_is_refused() -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        compose(["stage=sft", "pipeline=zephyr_style"])


def test_kind_can_stand_twice_under_two_names() -> None:
    words = ["+stage@stages.rs_2=rs", "stages.rs_2.policy=rs", "stages.rs_2.reward_model=rm"]
    config = compose([*words, "pipeline.order=[sft,collect,rm,rs,rs_2]"]).config
    assert config.stages["rs_2"].kind == "rs"


def test_flags_stand_anywhere() -> None:
    folder = str(Path(__file__).parent)
    for words in (["--config-dir", folder, "stage=sft", "seed=3"], ["stage=sft", "-cd", folder, "seed=3"]):
        assert compose(words).config.seed == 3


def test_composing_twice_gives_the_same() -> None:
    first, second = compose(["stage=sft", "seed=3"]), compose(["stage=sft", "seed=3"])
    assert first.config == second.config
    assert first.yaml == second.yaml


def test_schema_is_copied_where_it_is_loaded_and_nowhere_else() -> None:
    register()
    store = ConfigStore.instance()
    assert deepcopy(store) is store
    first, second = (store.load("schema/sft.yaml").node for _ in range(2))
    first.epochs = 7
    assert OmegaConf.is_missing(second, "epochs")
    assert OmegaConf.is_missing(store.load("schema/sft.yaml").node, "epochs")
