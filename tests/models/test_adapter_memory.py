"""What adapters are for: PPO's four models in less than half the memory."""

from pathlib import Path

import pytest

from benchmarks.lora_memory import measure


@pytest.mark.slow
def test_ppo_with_adapters_takes_less_than_half_the_memory_of_four_models(tmp_path: Path) -> None:
    found = measure(1, tmp_path)
    assert found["ratio"] < 0.5, found
