"""How many rows a stage gets and how many are too long, read without torch.

node -> records of its share -> a sample of them encoded -> rows used, warnings
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignpipe.config import (
    TINY,
    UNPAIRED,
    CollectConfig,
    Config,
    DPOConfig,
    EvalConfig,
    PPOConfig,
    RMConfig,
    RSConfig,
    SelectionConfig,
    SFTConfig,
    num_selected,
)
from alignpipe.data.comparisons import ranked_pairs
from alignpipe.data.encoding import (
    Encoded,
    encode_demonstrations,
    encode_prompts,
    encode_rankings,
    encode_texts,
    encode_unpaired,
)
from alignpipe.data.examples import Example, RankedExample
from alignpipe.data.margins import check_margins
from alignpipe.data.mixture import read_portion, source_names
from alignpipe.data.records import Ranking, Record, RecordType
from alignpipe.data.selection import refusals
from alignpipe.data.sources import MIXTURE, RANKINGS, DataSource, Keep, read_parts, readable_types
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import ConfigError, DataError
from alignpipe.pipeline.graph import Graph, Node, wanted
from alignpipe.pipeline.heaviest import Length, mean_length
from alignpipe.pipeline.hub import model_folder
from alignpipe.pipeline.keys import content_of
from alignpipe.pipeline.references import DataRef
from alignpipe.pipeline.store import Store

# Enough for a share of 1 % to be seen, few enough for a plan to take seconds.
MAX_ENCODED = 2000


@dataclass
class Rows:
    """What a stage has to work on.

    Attributes:
        used: rows it trains on or samples from, pairs or labels for dpo; None where an earlier stage decides.
        warnings: one sentence each.
        longest: tokens of the longest row looked at, of the longest prompt where the stage samples; None if unread.
        items: tokens of the rows looked at, of each ranking the mean of its responses; none if unread.
        mean: tokens of a row, of one response's in rankings.
        mean_prompt: those of them that are not learnt.
        responses: of a prompt, at most; 0 where they are not ranked.
        share: rows of its share that fit, before the stage's own limit.
    """

    used: int | None = None
    warnings: list[str] = field(default_factory=list)
    longest: int | None = None
    items: tuple[Length, ...] = ()
    mean: float = 0.0
    mean_prompt: float = 0.0
    responses: int = 0
    share: int | None = None


def count_rows(node: Node, graph: Graph, config: Config, chat_template: str) -> Rows:
    """Read the data of a stage and count what is left of it.

    Raises:
        DataError: the data is broken, or no row is left.
    """
    ref = node.data["data"]
    if ref.source is None:
        return _of_collect(node, graph, config, chat_template)
    want, folder = _wanted(node, ref.source), Store(Path(config.output_dir).absolute()).rows
    found = read_parts(ref.source, want, Keep(folder, content_of(node, "data")))
    portion = read_portion(ref.source, found, ref.share)
    records, counts = portion.records, portion.rows_by_source()
    rows = Rows()
    for name, one in zip(source_names(ref.source), found, strict=True):
        if one.rejected:
            first = one.rejected[0]
            rows.warnings.append(
                f"{node.name}: {len(one.rejected)} of {one.num_rows} rows cannot be used "
                f"(first {first.file}:{first.line}: {first.reason})"
            )
        if name not in counts:
            raise DataError(
                f"{node.name}: none of the {len(one.records)} rows of {name} falls into its share "
                f"({ref.share}); give more rows or change data.shares"
            )
    if ref.source.kind == MIXTURE:
        parts = ", ".join(f"{count} of {name}" for name, count in counts.items())
        rows.warnings.append(f"{node.name}: an epoch mixes {parts}")
    if isinstance(node.config, RMConfig):
        check_margins((record for record in records if isinstance(record, Ranking)), node.config, node.name)
    tokenizer = base_tokenizer(config, chat_template)
    sample = records[:: max(1, len(records) // MAX_ENCODED)]
    examples, left, limit = _encoded(node, sample, tokenizer)
    total = len(sample)
    _measure(rows, examples)
    share_over = 1 - left / total if total else 0.0
    if share_over > 0:
        rows.warnings.append(
            f"{node.name}: about {share_over:.1%} of its rows are over {limit} and {_fate(ref)}; "
            f"see data.on_overflow and {limit.split('=')[0]}"
        )
    # Those that are cut stay.
    share_kept = 1.0 if ref.config.on_overflow == "cut" else 1 - share_over
    rows.share = round(_units(want, records, node) * share_kept)
    rows.used = _capped(node, rows.share)
    if isinstance(node.config, SFTConfig) and node.config.selection.is_on:
        rows.used = _selected(node, node.config.selection, want, records, tokenizer, rows.used)
    return rows


def judged_twice(graph: Graph, counted: Mapping[str, Rows]) -> list[str]:
    """A sentence for each monitor that must look at prompts which an eval stage asks too."""
    found = []
    for judge in graph.order:
        rows = counted[judge.name]
        if not isinstance(judge.config, EvalConfig) or rows.share is None or rows.used is None:
            continue
        for node in graph.order:
            if not isinstance(node.config, RSConfig | PPOConfig | DPOConfig):
                continue
            monitor, same = node.config.monitor, node.data["data"].name == judge.data["data"].name
            both = rows.used + min(monitor.num_prompts, rows.share) - rows.share
            if monitor.action != "none" and same and both > 0:
                found.append(
                    f"{node.name}: {both} of the prompts that its monitor looks at are asked by {judge.name} "
                    f"too, since the evaluation share has {rows.share}; lower num_prompts of one of the two"
                )
    return found


def _selected(
    node: Node,
    selection: SelectionConfig,
    want: RecordType,
    records: Sequence[Any],
    tokenizer: Tokenizer,
    used: int,
) -> int:
    """Rows that selection leaves, but for those that only a model can refuse.

    Raises:
        ConfigError: raw text is not selected from.
        DataError: no row is within the bounds.
    """
    if want != "demonstrations":
        raise ConfigError(f"{node.name}: selection takes demonstrations, its data is raw text; leave it out")
    lengths = [0] * len(records)
    if selection.min_tokens is not None or selection.max_tokens is not None:
        lengths = [len(tokenizer.encode_response(record.prompt, record.response)) for record in records]
    fit = sum(refusal is None for refusal in refusals(records, lengths, selection))
    if fit == 0:
        raise DataError(
            f"{node.name}: none of {len(records)} rows is within the bounds of selection; loosen them"
        )
    kept = max(1, round(selection.keep * used)) if selection.ranks else used
    return min(kept, max(1, round(used * fit / len(records))))


def base_tokenizer(config: Config, chat_template: str) -> Tokenizer:
    """The tokenizer of the base model, which every stage of a run shares."""
    if config.model.path == TINY:
        return Tokenizer.toy()
    return Tokenizer.load(model_folder(config.model.path, config.model.revision), chat_template)


def _wanted(node: Node, source: DataSource) -> RecordType:
    if source.config.format == "text":
        return "text"
    types = readable_types(source)
    return next(want for want in wanted(node.config) if want in types)


def _encoded(node: Node, records: Sequence[Any], tokenizer: Tokenizer) -> tuple[Sequence[Any], int, str]:
    """What the records become, how many of them fit, and the limit in words.

    Raises:
        DataError: none fits, or rows over length are an error by configuration.
    """
    config: Any = node.config
    policy = config.data.on_overflow
    want = _wanted(node, node.data["data"].source) if node.data["data"].source else "rankings"
    if want == "text":
        examples = encode_texts(records, tokenizer, config.max_length).examples
        return examples, len(records), f"max_length={config.max_length}"
    if want == "demonstrations":
        done: Encoded[Any] = encode_demonstrations(
            records, tokenizer, config.max_length, policy, config.loss_on
        )
        limit = f"max_length={config.max_length}"
    elif want == "rankings":
        done = encode_rankings(records, tokenizer, config.max_length, policy)
        limit = f"max_length={config.max_length}"
    elif want == "unpaired":
        done = encode_unpaired(records, tokenizer, config.max_length, policy)
        limit = f"max_length={config.max_length}"
    else:
        done = encode_prompts(records, tokenizer, config.max_prompt_length, policy)
        limit = f"max_prompt_length={config.max_prompt_length}"
    return done.examples, len(records) - (done.num_overflow or 0), limit


def _measure(rows: Rows, examples: Sequence[Any]) -> None:
    """Write down how long the examples are: rows, the responses of rankings, or prompts."""
    groups = [example.examples if isinstance(example, RankedExample) else [example] for example in examples]
    lengths = [[_length(item) for item in group] for group in groups]
    flat = [length for group in lengths for length in group]
    rows.items = tuple(map(mean_length, lengths))
    rows.longest = max((int(length.tokens) for length in flat), default=None)
    mean = mean_length(flat or [Length(0, 0)])
    rows.mean, rows.mean_prompt = mean.tokens, mean.tokens - mean.learnt
    if examples and isinstance(examples[0], RankedExample):
        rows.responses = max(len(group) for group in groups)


def _length(item: Any) -> Length:
    return Length(item.num_tokens, sum(item.mask)) if isinstance(item, Example) else Length(len(item), 0)


def _fate(ref: DataRef) -> str:
    return {"drop": "are dropped", "cut": "are cut", "error": "stop the run"}[ref.config.on_overflow]


def _units(want: RecordType, records: Sequence[Record], node: Node) -> int:
    """Training rows that some records make: dpo counts what it compares, the others records."""
    if not isinstance(node.config, DPOConfig) or want != "rankings":
        return len(records)
    return sum(_compared(record.ranks, node.config) for record in records if isinstance(record, Ranking))


def _compared(ranks: Sequence[float], config: DPOConfig) -> int:
    """Pairs of one ranking, or its responses once as winner and once as loser."""
    pairs = ranked_pairs(ranks, config.pairs)
    if config.loss not in UNPAIRED:
        return len(pairs)
    return len({won for won, _ in pairs}) + len({lost for _, lost in pairs})


def _of_collect(node: Node, graph: Graph, config: Config, chat_template: str) -> Rows:
    """Rankings that an earlier stage will make: a prompt each, those held out taken off, ties not yet known."""
    stage = graph.nodes[str(node.data["data"].stage)]
    asked = count_rows(stage, graph, config, chat_template)
    if asked.used is None or asked.longest is None or not isinstance(stage.config, CollectConfig):
        return Rows()
    rankings = asked.used + _carried(stage, graph, config, chat_template)
    kept = math.floor(rankings * (1 - node.config.data.shares.eval))
    if isinstance(node.config, DPOConfig):
        kept *= _compared(range(stage.config.num_samples), node.config)
    more = stage.config.max_response_length
    return Rows(
        kept,
        longest=asked.longest + more,
        items=tuple(Length(prompt.tokens + more, more) for prompt in asked.items),
        mean=asked.mean + more,
        mean_prompt=asked.mean,
        responses=stage.config.num_samples,
    )


def _carried(stage: Node, graph: Graph, config: Config, chat_template: str) -> int:
    """Rankings that a collect stage takes over from those before it."""
    ref = stage.models.get("previous")
    if ref is None:
        return 0
    if ref.stage is None:
        return (Path(ref.path) / RANKINGS).read_bytes().count(b"\n")
    before = graph.nodes[ref.stage]
    own = count_rows(before, graph, config, chat_template).used or 0
    return own + _carried(before, graph, config, chat_template)


def _capped(node: Node, rows: int) -> int:
    """Rows after the stage's own limit."""
    if not isinstance(node.config, RSConfig | CollectConfig | EvalConfig):
        return rows
    limit = node.config.num_prompts
    capped = rows if limit is None else min(rows, limit)
    if isinstance(node.config, RSConfig):
        # It trains on what it chooses and on the demonstrations it replays.
        return round(capped * num_selected(node.config) / (1 - node.config.replay))
    return capped
