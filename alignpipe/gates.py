"""What a stage must have come to before the next one starts: `gates: {rm: {gold_accuracy: ">=0.7"}}`.

Figures have the names of an objective, `STAGE.FIGURE`: those of a stage are looked at when it ends, those of a policy
(`ppo.gold.overall`) when the scorecard is there.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import ge, gt, le, lt
from typing import Any

from alignpipe.config import Config
from alignpipe.errors import ConfigError
from alignpipe.objective import STAGE_FIGURES, known_figures, read_figure, running_stages, why_no_figure

BOUND = re.compile(r"\s*(>=|<=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")
HOLDS = {">=": ge, "<=": le, ">": gt, "<": lt}


@dataclass(frozen=True)
class Gate:
    """One bound on one figure.

    Attributes:
        stage: whose figure it is.
        figure: its name within the stage.
        sign: `>=`, `<=`, `>` or `<`.
        limit: the number on its right.
        of_policy: the figure is known only from the scorecard; what a stage ends with itself is looked at there.
    """

    stage: str
    figure: str
    sign: str
    limit: float
    of_policy: bool = False

    @property
    def bound(self) -> str:
        """The bound as a user writes it."""
        return f"{self.sign}{self.limit:g}"

    def why_shut(self, figures: Mapping[str, Any]) -> str | None:
        """Why the next stage must not start, or None.

        Args:
            figures: of the stage, as its manifest or the scorecard holds them; a figure that is not there shuts too.
        """
        value = read_figure(figures, self.figure)
        if value is None:
            return (
                f"gate {self.stage}.{self.figure} {self.bound}: the stage ended without this figure; "
                f"it needs held-out rows"
            )
        if HOLDS[self.sign](value, self.limit):
            return None
        return f"gate {self.stage}.{self.figure} {self.bound}: it is {value:.4g}"


def find_gates(config: Config) -> list[Gate]:
    """Every gate of a configuration.

    Raises:
        ConfigError: a figure that no stage of this run has, or a bound that cannot be read.
    """
    known = set(known_figures(config))
    kinds = {name: section.kind for name, section in running_stages(config).items()}
    gates = []
    for stage, section in config.gates.items():
        for figure, bound in _leaves(section, f"gates.{stage}"):
            if f"{stage}.{figure}" not in known:
                raise ConfigError(f"gates.{stage}.{figure}: {why_no_figure(config, stage, figure)}")
            found = BOUND.fullmatch(bound) if isinstance(bound, str) else None
            if found is None:
                raise ConfigError(
                    f"gates.{stage}.{figure}: {bound!r} is no bound; write one of >= <= > < and a number, such as "
                    f'">=0.7", in quotes'
                )
            own = stage in kinds and figure in STAGE_FIGURES[kinds[stage]]
            gates.append(Gate(stage, figure, found[1], float(found[2]), of_policy=not own))
    return gates


def _leaves(section: Any, at: str) -> Iterator[tuple[str, Any]]:
    """Dotted names and bounds: `gates.ppo.gold.overall` on the command line makes a section in a section."""
    if not isinstance(section, Mapping):
        raise ConfigError(f'{at}: give figures and their bounds, such as {at}.accuracy: ">=0.7"')
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{rest}", bound) for rest, bound in _leaves(value, f"{at}.{name}"))
        else:
            yield str(name), value
