"""How far a policy may go from its reference, and at what price (arXiv:1909.08593, section 2.2).

measured KL of a rollout -> go on or end; the price of KL in the next rollout
"""

from dataclasses import dataclass

from alignpipe.config import PPOConfig
from alignpipe.losses.ppo import adapt_kl_coef
from alignpipe.training.progress import StageProgress


@dataclass
class KLControl:
    """The price of KL, fixed or steered, and the budget.

    Attributes:
        config: of the stage.
        progress: where a warning goes.
        coef: price of a nat now.
    """

    config: PPOConfig
    progress: StageProgress
    coef: float

    def spent(self, kl: float) -> bool:
        """Whether training ends here: the policy that sampled is over the budget, in nats a response."""
        budget = self.config.kl_budget
        if budget is None or kl <= budget:
            return False
        told = f"KL to the reference passed kl_budget={budget:g} nats a response"
        if self.config.on_kl_budget == "warn":
            self.progress.warn(f"{told}; training goes on (on_kl_budget=warn)")
            return False
        self.progress.warn(f"{told} ({kl:.2f}); training ends here and the policy stays as it is")
        return True

    def adapt(self, kl: float, rollout: int) -> None:
        """Set the price for the next rollout; it stays while the policy does not learn."""
        config = self.config
        if config.kl_controller == "adaptive" and rollout >= config.value_pretrain_rollouts:
            responses = config.rollout_size * config.num_samples
            self.coef = adapt_kl_coef(self.coef, kl, config.target_kl, responses, config.kl_horizon)
