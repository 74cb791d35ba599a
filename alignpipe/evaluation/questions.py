"""What every policy of an evaluation gets: held-out prompts, loaded questions, text for perplexity.

configuration, data of the stage -> token ids, the same for all policies
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignpipe.config import TOY, EvalConfig
from alignpipe.data.counterfactuals import Template, Wording, questions, read_templates
from alignpipe.data.encoding import encode_demonstrations, encode_prompts, encode_texts
from alignpipe.data.examples import Example
from alignpipe.data.records import Demonstration, Message, Prompt, Text, prompt_text
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import DataError
from alignpipe.evaluation.prejudice import toy_templates
from alignpipe.evaluation.responses import Response
from alignpipe.toy.world import parse_prompt
from alignpipe.training.context import Context


@dataclass(frozen=True)
class Questions:
    """What is asked.

    Attributes:
        texts: N prompts as people read them.
        prompts: the same as token ids.
        judged: whether the gold judge knows them.
    """

    texts: list[str]
    prompts: Sequence[list[int]]
    judged: bool

    def examples(self, responses: Sequence[Sequence[Response]]) -> list[Example]:
        """N * K rows of prompt and response, those of a prompt side by side."""
        return [
            response.example(prompt)
            for prompt, row in zip(self.prompts, responses, strict=True)
            for response in row
        ]


@dataclass(frozen=True)
class Asked:
    """What every policy gets.

    Attributes:
        held_out: prompts of the evaluation share.
        templates: of loaded questions.
        wordings: those questions about every group.
        loaded: the same, as they are asked.
        text: held-out rows for perplexity.
    """

    held_out: Questions
    templates: list[Template]
    wordings: list[Wording]
    loaded: Questions
    text: Sequence[Example]


def gather(config: EvalConfig, context: Context, tokenizer: Tokenizer) -> Asked:
    """Read and encode all that the stage asks.

    Raises:
        DataError: the evaluation share has no prompt, or a template is too long.
    """
    records = context.records("data", config.data, Prompt)
    encoded = encode_prompts(records, tokenizer, config.max_prompt_length, "drop")
    prompts = encoded.examples[: config.num_prompts]
    if not prompts:
        raise DataError(
            f"{context.task.name}: no prompt in the evaluation share; add rows or raise data.shares.eval"
        )
    texts = [prompt_text(records[index]) for index in encoded.kept[: len(prompts)]]
    judged = config.judge == TOY or (config.judge == "auto" and context.task.data["data"].kind == TOY)
    if "templates" in context.task.data:
        templates = read_templates(Path(context.task.data["templates"].path), config.prejudice.groups)
    else:
        templates = toy_templates([prompt_text(record) for record in records]) if judged else []
    wordings = questions(templates)
    return Asked(
        Questions(texts, prompts, judged),
        templates,
        wordings,
        _as_questions(wordings, config, tokenizer, judged),
        _held_out_text(config, context, tokenizer),
    )


def _as_questions(
    wordings: list[Wording], config: EvalConfig, tokenizer: Tokenizer, judged: bool
) -> Questions:
    asked = [Prompt((Message("user", wording.prompt),)) for wording in wordings]
    prompts = encode_prompts(asked, tokenizer, config.max_prompt_length, "error").examples
    known = judged and all(parse_prompt(wording.prompt) is not None for wording in wordings)
    return Questions([wording.prompt for wording in wordings], prompts, known)


def _held_out_text(config: EvalConfig, context: Context, tokenizer: Tokenizer) -> Sequence[Example]:
    """The first rows of the evaluation share of `text_data`: demonstrations where it has them, else documents."""
    if "text_data" not in context.task.data:
        return []
    data = config.text_data
    found = _encoded_text(config, context, tokenizer)
    if not found and data.path != config.data.path:
        raise DataError(
            f"{context.task.name}: no row of {data.path} is in the evaluation share; add rows, or raise "
            f"text_data.shares.eval (and lower another, the four add up to 1)"
        )
    return found


def _encoded_text(config: EvalConfig, context: Context, tokenizer: Tokenizer) -> Sequence[Example]:
    data = config.text_data
    if data.format != "text" and "demonstrations" in context.record_types("text_data", data):
        shown = context.records("text_data", data, Demonstration)[: config.text_rows]
        return encode_demonstrations(shown, tokenizer, config.max_length, data.on_overflow).examples
    documents = context.records("text_data", data, Text)[: config.text_rows]
    return encode_texts(documents, tokenizer, config.max_length).examples
