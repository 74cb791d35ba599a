"""A composition -> one YAML file that composes to it again, whatever conf/ and the user's own files become.

`alignpipe run --config-dir FOLDER --config-name NAME` runs it; further words change it.
"""

from omegaconf import OmegaConf

from alignpipe.compose.composition import built_in_folder


def rerun_yaml(yaml: str) -> str:
    """The text of the file, from `Composed.yaml`.

    Every value stands in it, interpolations alive, so that `seed=1` still reaches every stage.
    """
    built_in = OmegaConf.to_container(OmegaConf.load(built_in_folder() / "config.yaml"))
    assert isinstance(built_in, dict)
    made = OmegaConf.create(yaml)
    stages = {"stage": made.stage} if made.stage is not None else {}
    stages |= {f"stages.{name}": stage for name, stage in made.stages.items()}
    typed = [f"/schema/{stage.kind}@{at}" for at, stage in stages.items()]
    quiet = [item for item in built_in["defaults"] if str(item).startswith("{'override ")]
    head = {"defaults": ["schema/config@_here_", *typed, *quiet, "_self_"], "hydra": built_in["hydra"]}
    return OmegaConf.to_yaml(OmegaConf.create(head)) + yaml
