"""The language-model term of PPO-ptx, so that what pretraining or SFT gave is kept (arXiv:2203.02155, eq. 2).

demonstrations or texts -> rows -> for each policy update a term of its loss
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from alignpipe.config import PPOConfig
from alignpipe.data.collate import collate
from alignpipe.data.encoding import encode_demonstrations, encode_texts
from alignpipe.data.examples import Example
from alignpipe.data.order import batches
from alignpipe.data.records import Demonstration, Text
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.losses.sft import sft_loss
from alignpipe.models.forward import batch_logprobs
from alignpipe.training.context import Context
from alignpipe.training.loop import StepOutput, Term

ROLE = "ptx_data"


@dataclass(frozen=True)
class PtxLoss:
    """The rows that a policy goes on learning while it is optimized for reward; none at `ptx_coef=0`.

    Attributes:
        rows: demonstrations, or windows of text.
        policy: under training.
        config: coefficient, rows an update, seed.
        context: device.
        pad_id: fills batches.
    """

    rows: Sequence[Example]
    policy: PreTrainedModel
    config: PPOConfig
    context: Context
    pad_id: int

    @classmethod
    def load(
        cls, policy: PreTrainedModel, tokenizer: Tokenizer, config: PPOConfig, context: Context
    ) -> "PtxLoss":
        """Read and encode the rows.

        Raises:
            DataError: all of them are too long, or one is and that is an error.
        """
        rows = _encode(tokenizer, config, context) if config.ptx_coef else []
        return cls(rows, policy, config, context, tokenizer.pad_id)

    def terms(self, update: int) -> list[Term[Example]]:
        """The term of one policy update, in a list; its rows are decided by the seed and the number of the update."""
        if not self.rows:
            return []
        size = self.config.ptx_batch_size
        chosen = next(batches(self.config.seed, len(self.rows), size, start=update * size))
        rows = [self.rows[index] for index in chosen]
        return [Term(rows, self._loss_fn, self.config.ptx_coef, "ppo/ptx_loss")]

    def _loss_fn(self, micro: Sequence[Example]) -> StepOutput:
        batch = collate(micro, self.pad_id).to(self.context.device)
        return StepOutput(losses=sft_loss(batch_logprobs(self.policy, batch), batch.loss_mask[:, 1:]))


def _encode(tokenizer: Tokenizer, config: PPOConfig, context: Context) -> Sequence[Example]:
    """Demonstrations, or texts where there are none, no longer than a prompt with a response."""
    data, limit = config.ptx_data, config.max_prompt_length + config.max_response_length
    if data.format == "text" or "demonstrations" not in context.record_types(ROLE, data):
        return encode_texts(context.records(ROLE, data, Text), tokenizer, limit).examples
    records = context.records(ROLE, data, Demonstration)
    return encode_demonstrations(records, tokenizer, limit, data.on_overflow).examples
