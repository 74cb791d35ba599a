"""The rm stage with everything that YAML can turn on: a file of pairs, several heads, a benchmark."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from alignpipe.artifact import read_manifest
from alignpipe.config import RMConfig
from alignpipe.data.bootstrap import bootstrap_weights
from alignpipe.data.collate import collate
from alignpipe.data.examples import Example, RankedExample
from alignpipe.data.records import Message
from alignpipe.data.shares import share_of
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import AlignpipeError, ConfigError, DataError
from alignpipe.evaluation.rewards import read_normalizer
from alignpipe.losses.rm import kwise_losses
from alignpipe.models.loading import ModelSource
from alignpipe.models.scalar_head import load_scalar_model, score_head, sequence_head_scores
from alignpipe.stages.rm import ranking_losses
from tests.project import Project

DEGREES = ("significantly", "slightly", "negligibly")


def _write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _pairs(folder: Path) -> Path:
    rows = [
        {
            "prompt": f"How many is {n}?",
            "chosen": f"It is {n}. That is all.",
            "rejected": "No.",
            "margin": DEGREES[n % 3],
        }
        for n in range(40)
    ]
    return _write(folder / "pairs.jsonl", rows)


def _bench(folder: Path) -> Path:
    rows = [
        {"prompt": "How many?", "chosen": f"It is {n}.", "rejected": "No.", "subset": subset, "id": n}
        for n, subset in enumerate(["hep-go", "math-prm", "mine"])
    ]
    return _write(folder / "bench.jsonl", rows)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Project, Path]]:
    folder = tmp_path_factory.mktemp("rm")
    project = Project(folder / "outputs")
    run = project.run(
        "stage=rm",
        f"data='{_pairs(folder)}'",
        f"stage.benchmark='{_bench(folder)}'",
        "stage.num_heads=3",
        "stage.margin=column",
        "stage.label_smoothing=0.1",
        "stage.ties=half",
        "stage.centering=0.01",
        "stage.max_steps=2",
        "stage.stress_rows=4",
    )
    yield project, run / "rm"


def test_heads_are_labels_and_their_levels_stand_beside_them(trained: tuple[Project, Path]) -> None:
    _, folder = trained
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    assert plain.config.num_labels == 3
    normalizer = read_normalizer(folder)
    assert len(set(normalizer.head_means)) == 3
    assert sum(normalizer.head_means) / 3 == pytest.approx(normalizer.mean, abs=1e-5)
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.metrics["disagreement"] > 0


def test_a_head_that_did_not_draw_the_prompt_learns_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    # One prompt and no other, which the bootstrap gave to some heads alone; nothing is held out either.
    def weights(number: int) -> list[int]:
        prompt = tokenizer.encode_prompt((Message("user", f"How many is {number}?"),))
        return bootstrap_weights(prompt, 0, 3)

    shares = Project(tmp_path / "outputs").compose("stage=rm").config.data.shares
    number = next(
        n
        for n in range(99)
        if 0 in weights(n) and any(weights(n)) and share_of(f"How many is {n}?", shares) != "eval"
    )
    rows = [
        {"prompt": f"How many is {number}?", "chosen": f"It is {n}.", "rejected": "No."} for n in range(6)
    ]
    data = _write(tmp_path / "pairs.jsonl", rows)
    run = Project(tmp_path / "outputs").run(
        "stage=rm", f"data='{data}'", "stage.num_heads=3", "stage.max_steps=2", "stage.stress_rows=4"
    )
    model = load_scalar_model(ModelSource(str(run / "rm")), tokenizer, all_heads=True)
    start = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)) / 33**0.5
    moves = (score_head(model).weight.detach() - start).abs().amax(1)
    assert [bool(move > 1e-6) for move in moves] == [weight > 0 for weight in weights(number)]
    manifest = read_manifest(run / "rm")
    assert manifest is not None
    assert (manifest.metrics["accuracy"], manifest.metrics["stress"]) == (None, {})
    # No demonstration is in its share either, so the best responses set the scale.
    assert manifest.metrics["reward_std"] > 0
    assert math.isfinite(manifest.metrics["reward_mean"])


def test_stress_and_benchmark_stand_in_files_and_figures(trained: tuple[Project, Path]) -> None:
    _, folder = trained
    manifest = read_manifest(folder)
    assert manifest is not None
    stress = json.loads((folder / "stress.json").read_text())
    assert stress == manifest.metrics["stress"]
    assert {found["rows"] for name, found in stress.items() if name != "other_answer"} == {4}
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    assert logged["stress/cut_before_eos"] == stress["cut_before_eos"]["rate"]
    bench = json.loads((folder / "rewardbench.json").read_text())
    assert set(bench["sections"]) == {"Reasoning", "other"}
    assert manifest.metrics["rewardbench"] == {"score": bench["score"], **bench["sections"]}
    assert bench["score"] == pytest.approx(bench["sections"]["Reasoning"])
    assert manifest.metrics["length_accuracy"] == 1.0
    assert manifest.metrics["buckets"]["rank_gap"]["1-2"]["pairs"] == manifest.metrics["pairs"]


def test_the_benchmarks_content_is_in_the_key_and_its_place_is_not(
    trained: tuple[Project, Path], tmp_path: Path
) -> None:
    project, folder = trained
    data = folder.parents[2].parent / "pairs.jsonl"
    words = ("stage=rm", f"data='{data}'", "stage.max_steps=2")

    def key(bench: Path) -> str:
        return project.prepare("rm", *words, f"stage.benchmark='{bench}'").key

    first = key(_bench(tmp_path))
    (tmp_path / "bench.jsonl").rename(tmp_path / "other name.jsonl")
    assert key(tmp_path / "other name.jsonl") == first
    text = (tmp_path / "other name.jsonl").read_text()
    (tmp_path / "other name.jsonl").write_text(text.replace("It is 0.", "It is 9."))
    assert key(tmp_path / "other name.jsonl") != first


@pytest.mark.parametrize(
    ("words", "raised", "told"),
    [
        (("stage.benchmark=/nowhere/bench.jsonl",), DataError, "no data file /nowhere/bench.jsonl"),
        (("stage.benchmark='{folder}/pairs.jsonl'",), DataError, "pairs.jsonl:1: lacks subset"),
        (("stage.benchmark='{folder}'",), ConfigError, "stage.benchmark: .* is no file"),
        (
            ("data='{folder}/bench.jsonl'", "stage.margin=column"),
            DataError,
            "row 1 of those read has no margin",
        ),
        (("stage.margin=gold",), DataError, "row 1 of those read has no gold"),
        (("stage.loss=plackett_luce", "stage.ties=half"), ConfigError, r"stage.ties: is of pairs"),
        (("stage.loss=plackett",), ConfigError, "stage.loss: there is no 'plackett' here. .*plackett_luce"),
        (("stage.margin=colum",), ConfigError, "stage.margin: .*column"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_the_first_step(
    tmp_path: Path, words: tuple[str, ...], raised: type[AlignpipeError], told: str
) -> None:
    data = _pairs(tmp_path)
    _bench(tmp_path)
    given = [word.format(folder=tmp_path) for word in words]
    if not any(word.startswith("data=") for word in given):
        given.append(f"data='{data}'")
    with pytest.raises(raised, match=told) as caught:
        Project(tmp_path / "outputs").prepare("rm", "stage=rm", *given)
    assert "\n" not in str(caught.value)


def test_collect_has_no_column_of_margins(project: Project) -> None:
    with pytest.raises(ConfigError, match=r"stages.rm.margin: collect ranks .* take rank or gold"):
        project.prepare("rm", "stages.rm.margin=column")


@pytest.fixture
def rows(tokenizer: Tokenizer) -> list[RankedExample]:
    """Rankings of unlike sizes and lengths, with a tie."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for size in (4, 2, 3, 5):
        prompt = torch.randint(4, 600, (3 + size,), generator=generator).tolist()
        answers = [
            torch.randint(4, 600, (int(n),), generator=generator).tolist()
            for n in torch.randint(1, 9, (size,), generator=generator)
        ]
        examples = tuple(
            Example([*prompt, *answer, tokenizer.eos_id], [False] * len(prompt) + [True] * (len(answer) + 1))
            for answer in answers
        )
        ranks = tuple(float(rank) for rank in torch.randint(1, size + 1, (size - 1,), generator=generator))
        rows.append(RankedExample(examples, (*ranks, size + 1.0), None, len(prompt)))
    return rows


def _turned(row: RankedExample) -> RankedExample:
    return RankedExample(row.examples[::-1], row.ranks[::-1], row.gold, row.prompt_length, row.margin)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("stage.loss=plackett_luce", "stage.centering=0.1"),
        ("stage.margin=rank", "stage.ties=half", "stage.label_smoothing=0.1"),
    ],
)
def test_batching_padding_and_order_change_no_loss_and_no_gradient(
    words: tuple[str, ...],
    make_llama: object,
    tokenizer: Tokenizer,
    rows: list[RankedExample],
    tmp_path: Path,
) -> None:
    config = Project(tmp_path / "outputs").compose("stage=rm", "stage.num_heads=2", *words).config.stage
    assert isinstance(config, RMConfig)
    make_llama(initializer_range=0.06).save_pretrained(tmp_path / "lm")  # type: ignore[operator]
    model = load_scalar_model(ModelSource(str(tmp_path / "lm")), tokenizer, seed=0, num_heads=2)

    def losses(batches: list[list[RankedExample]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses a prompt, and the gradient of their mean over all, one forward a batch."""
        model.zero_grad()
        found = []
        for batch in batches:
            examples = [example for row in batch for example in row.examples]
            scores = sequence_head_scores(model, collate(examples, pad_id))
            ranks = torch.tensor([rank for row in batch for rank in row.ranks])
            groups = torch.tensor([place for place, row in enumerate(batch) for _ in row.ranks])
            found.append(ranking_losses(config, scores, batch, ranks, groups).mean(1))
            (found[-1].sum() / len(rows)).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return torch.cat(found).detach(), gradient

    expected, gradient = losses([rows], tokenizer.pad_id)
    for found, other in (
        losses([[row] for row in rows], tokenizer.pad_id),
        losses([rows[:3], rows[3:]], 42),
        losses([[_turned(row) for row in rows]], tokenizer.pad_id),
    ):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(other, gradient, atol=1e-6, rtol=1e-5)
    turned, _ = losses([rows[::-1]], tokenizer.pad_id)
    torch.testing.assert_close(turned.flip(0), expected, atol=1e-6, rtol=1e-6)


def test_one_head_without_settings_is_the_k_wise_loss(rows: list[RankedExample], tmp_path: Path) -> None:
    config = Project(tmp_path / "outputs").compose("stage=rm").config.stage
    assert isinstance(config, RMConfig)
    scores = torch.randn(sum(len(row.ranks) for row in rows), 1)
    ranks = torch.tensor([rank for row in rows for rank in row.ranks])
    groups = torch.tensor([place for place, row in enumerate(rows) for _ in row.ranks])
    found = ranking_losses(config, scores, rows, ranks, groups)
    assert torch.equal(found[:, 0], kwise_losses(scores[:, 0], ranks, groups))
