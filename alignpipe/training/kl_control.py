"""How far a policy may go from its reference, and at what price (arXiv:1909.08593, section 2.2).

measured KL of a rollout -> go on or end; the price of KL in the next rollout
"""

from dataclasses import dataclass

from alignpipe.config import PPOConfig
from alignpipe.losses.ppo import adapt_kl_coef
from alignpipe.training.context import Context


@dataclass
class KLControl:
    """The price of KL, fixed or steered, and the budget.

    Attributes:
        config: of the stage.
        context: where a warning goes.
        coef: price of a nat now.
        warned: the user knows that the budget is spent.
    """

    config: PPOConfig
    context: Context
    coef: float
    warned: bool = False

    def spent(self, kl: float) -> bool:
        """Whether training ends here: the policy that sampled is over the budget, in nats a response."""
        budget = self.config.kl_budget
        if budget is None or kl <= budget:
            return False
        ends = self.config.on_kl_budget == "stop"
        if not self.warned:
            self.warned = True
            then = "training ends here, the policy stays as it is" if ends else "training goes on"
            self.context.progress.say(
                f"warning: {self.context.task.name}: KL to the reference, {kl:.3g} nats a response, passed "
                f"kl_budget={budget:g}; {then}"
            )
        return ends

    def adapt(self, kl: float, rollout: int) -> None:
        """Set the price for the next rollout; it stays while the policy does not learn."""
        config = self.config
        if config.kl_controller == "adaptive" and rollout >= config.value_pretrain_rollouts:
            responses = config.rollout_size * config.num_samples
            self.coef = adapt_kl_coef(self.coef, kl, config.target_kl, responses, config.kl_horizon)
