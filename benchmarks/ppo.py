"""A whole PPO step against PPOTrainer of TRL 1.9.0, the last that has one: `python -m benchmarks.ppo`.

16 prompts, one response of 64 tokens each, four epochs of one minibatch over them, policy and value model.
"""

import sys

from benchmarks.case import Case, Side
from benchmarks.runner import main

EPOCHS = 4
CASES = (
    Case(
        name="ppo",
        ours=Side("alignpipe", "benchmarks.ours:ppo"),
        peers=(Side("PPOTrainer 1.9.0", "benchmarks.peers:ppo", path="trl-1.9.0"),),
        targets={"S": 2.0},
        # Sampling, log-probs of policy and reference, reward and value; then two models in every epoch.
        flops=2 * 5 + 2 * 6 * EPOCHS,
        settings={"rollout_size": 16, "response_length": 64, "epochs": EPOCHS},
        max_memory=0.6,
    ),
)

if __name__ == "__main__":
    sys.exit(main(CASES))
