"""What a model says about rows: IFD by hand, k-center against every choice, scores of the methods."""

from collections.abc import Callable
from itertools import combinations
from math import exp

import pytest
import torch
from transformers import PreTrainedModel

from alignpipe.data.encoding import encode_demonstrations
from alignpipe.data.examples import Example
from alignpipe.data.records import Demonstration, Message
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.evaluation.selection import answer_alone, instruction_following_difficulty, k_center
from alignpipe.rollout.score import sequence_embeddings, sequence_logprobs


def test_ifd_is_the_ratio_of_two_perplexities() -> None:
    given, alone = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([2.0, 2.0, 0.25])
    expected = [exp(1) / exp(2), 1.0, exp(0.5) / exp(0.25)]
    assert instruction_following_difficulty(given, alone).tolist() == pytest.approx(expected)


def test_ifd_of_a_model_agrees_with_cross_entropy(
    make_llama: Callable[..., PreTrainedModel], tokenizer: Tokenizer
) -> None:
    model = make_llama()
    record = Demonstration((Message("user", "What color is the sky?"), Message("assistant", "Blue.")))
    (row,) = encode_demonstrations([record], tokenizer, 100, "error", "last").examples
    short = answer_alone(row)
    assert short.ids[1:] == [token for token, learnt in zip(row.ids, row.mask, strict=True) if learnt]
    assert (short.ids[0], short.num_items) == (row.ids[0], row.num_items)
    means = []
    for one in (row, short):
        ids = torch.tensor([one.ids])
        labels = torch.tensor([[t if m else -100 for t, m in zip(one.ids, one.mask, strict=True)]])
        with torch.no_grad():
            means.append(model(input_ids=ids, labels=labels).loss.item())
    found = -sequence_logprobs(model, [row, short], tokenizer.pad_id) / row.num_items
    assert found.tolist() == pytest.approx(means, rel=1e-5)


def test_k_center_leaves_at_most_twice_the_least_radius() -> None:
    torch.manual_seed(0)
    points = torch.randn(14, 3)
    distances = torch.cdist(points, points)
    for count in (1, 2, 4):
        chosen = k_center(points, count, 0)
        assert len(set(chosen)) == count and chosen[0] == 0
        least = min(distances[list(c)].min(0).values.max() for c in combinations(range(14), count))
        assert distances[chosen].min(0).values.max() <= 2 * least + 1e-6
    assert sorted(k_center(points, 14, 3)) == list(range(14))


def test_k_center_takes_one_of_each_clump_first_and_no_point_twice() -> None:
    clumps = torch.tensor([[0.0, 0.0]] * 5 + [[9.0, 0.0]] * 5 + [[0.0, 9.0]] * 2)
    chosen = k_center(clumps, 5, 0)
    assert {index // 5 for index in chosen[:3]} == {0, 1, 2}
    assert len(set(chosen)) == 5


def test_embedding_of_a_row_is_the_mean_of_its_last_hidden_states_whatever_its_company(
    make_llama: Callable[..., PreTrainedModel],
) -> None:
    model = make_llama()
    rows = [Example(list(range(5, 5 + n)), [False] + [True] * (n - 1)) for n in (3, 9, 6)]
    found = sequence_embeddings(model, rows, 0)
    for row, embedding in zip(rows, found, strict=True):
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([row.ids])).last_hidden_state
        torch.testing.assert_close(embedding, hidden[0].mean(0), rtol=1e-5, atol=1e-6)
