"""The stages by kind."""

from collections.abc import Callable
from typing import Any

from alignpipe.stages import collect, dpo, eval, ppo, rm, rs, sft

STAGES: dict[str, Callable[..., dict[str, Any]]] = {
    "sft": sft.run,
    "collect": collect.run,
    "rm": rm.run,
    "rs": rs.run,
    "ppo": ppo.run,
    "dpo": dpo.run,
    "eval": eval.run,
}
