"""Which stages train adapters, and what those need of the machine: asked without torch, before the first stage.

Config, Graph -> adapter of each stage; MachineError
"""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from alignpipe.config import SHARDED, TINY, AdapterConfig, Config, OptimizerConfig
from alignpipe.errors import ConfigError, MachineError
from alignpipe.pipeline.graph import Graph, Node

ADAPTER = "adapter_config.json"
# There once the driver of an NVIDIA card is loaded, on Linux and in containers with a card.
DRIVER = Path("/dev/nvidiactl")


def stage_adapter(config: Config, node: Node) -> AdapterConfig:
    """What a stage trains: the run's adapter, but whole weights where the model is built from nothing.

    An adapter bends what weights have learnt, and those have learnt nothing; what the stage leaves is the base of
    all adapters after it.
    """
    policy = node.models.get("policy")
    built = isinstance(node.config, OptimizerConfig) and policy is not None and policy.path == TINY
    return replace(config.adapter, kind="none") if built else config.adapter


def check_adapters(config: Config, graph: Graph) -> list[str]:
    """Make sure that adapters can be read and trained here.

    Returns:
        Warnings: which stages train whole weights all the same.

    Raises:
        MachineError: peft is missing; for 4 bits, bitsandbytes or a CUDA device.
        ConfigError: 4 bits are asked of a model that has no files, or shared weights are to be cut over processes.
    """
    kind = config.adapter.kind
    paths = {ref.path: ref.name for node in graph for ref in node.models.values() if ref.path}
    read = [name for path, name in paths.items() if (Path(path) / ADAPTER).is_file()]
    if (kind != "none" or read) and find_spec("peft") is None:
        why = f"adapter={kind}" if kind != "none" else f"{read[0]}: has an adapter, which"
        raise MachineError(f"{why} needs peft, which is not installed; pip install 'alignpipe[lora]'")
    if kind != "none" and config.launch.strategy in SHARDED:
        raise ConfigError(
            f"launch.strategy: {config.launch.strategy} cuts every model's weights by itself, while adapters share "
            f"theirs; take launch=ddp, or adapter=none"
        )
    if kind == "qlora":
        _check_four_bits(config)
    return [
        f"{node.name}: {TINY} is built from nothing, so this stage trains whole weights; "
        f"they are the base of the adapters after it"
        for node in graph.order
        if stage_adapter(config, node).kind != kind
    ]


def _check_four_bits(config: Config) -> None:
    if find_spec("bitsandbytes") is None:
        raise MachineError(
            "adapter=qlora needs bitsandbytes, which is not installed; pip install 'alignpipe[qlora]', "
            "or take adapter=lora"
        )
    if config.launch.device not in ("auto", "cuda") or not DRIVER.exists():
        raise MachineError(
            "adapter=qlora needs a CUDA device, and this run has none; take adapter=lora, or a machine that has one"
        )
    if config.model.path == TINY:
        raise ConfigError(
            "adapter=qlora: cuts weights that lie in files to 4 bits, and model=tiny has none; take adapter=lora"
        )
