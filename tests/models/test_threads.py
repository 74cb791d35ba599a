"""Small models get one thread, large ones all, and whoever says how many is heard."""

import pytest
import torch
from torch import nn

from alignpipe.models import threads


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "ALL_THREADS", 8)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("weights", "expected"), [(500, 1), (1999, 1), (3500, 3), (10**6, 8)])
def test_threads_grow_with_the_model_up_to_the_cores(monkeypatch, weights, expected):
    monkeypatch.setattr(threads, "WEIGHTS_PER_THREAD", 1000)
    threads.fit_threads(nn.Linear(weights, 1, bias=False))
    assert torch.get_num_threads() == expected


def test_what_the_environment_says_stays(monkeypatch):
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    threads.fit_threads(nn.Linear(1, 1))
    assert torch.get_num_threads() == 2
