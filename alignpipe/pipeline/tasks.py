"""A stage of the plan -> the task that its processes read: every name a path, every path in the store."""

from alignpipe.config import Config
from alignpipe.pipeline.adapters import stage_adapter
from alignpipe.pipeline.graph import Node
from alignpipe.pipeline.keys import content_of
from alignpipe.pipeline.plan import Plan
from alignpipe.pipeline.references import ModelRef, is_trusted
from alignpipe.pipeline.store import Store
from alignpipe.task import DataInput, ModelInput, Task


def stage_task(node: Node, config: Config, plan: Plan, store: Store) -> Task:
    """What the processes of one stage are told.

    Args:
        node: the stage.
        config: of the run.
        plan: with the keys of all stages.
        store: where parents lie and the artifact goes.
    """
    return Task(
        name=node.name,
        kind=node.kind,
        key=node.key,
        work=store.work(node.kind, node.key),
        target=store.stage(node.kind, node.key),
        config=node.config,
        models={role: _model(ref, config, plan, store) for role, ref in node.models.items()},
        data={role: _data(role, node, plan, store) for role in node.data},
        functions=node.functions,
        chat_template=plan.chat_template,
        architecture=config.model.architecture,
        attn_implementation=config.model.attn_implementation,
        launch=config.launch,
        adapter=stage_adapter(config, node),
        compile=config.model.compile,
        kernels=config.model.kernels,
        trackers=list(config.trackers),
        run=plan.run,
        inputs=node.inputs,
    )


def _model(ref: ModelRef, config: Config, plan: Plan, store: Store) -> ModelInput:
    trusted = is_trusted(ref, config.model.trust_remote_code)
    if ref.stage is None:
        return ModelInput(ref.name, ref.path, ref.revision, ref.kind, ref.key, trusted)
    parent = plan.graph.nodes[ref.stage]
    path = str(store.stage(parent.kind, parent.key))
    return ModelInput(ref.name, path, None, parent.kind, parent.key, trusted)


def _data(role: str, node: Node, plan: Plan, store: Store) -> DataInput:
    ref = node.data[role]
    if ref.source is not None:
        return DataInput(ref.source.kind, ref.source.path, ref.share, content_of(node, role))
    parent = plan.graph.nodes[str(ref.stage)]
    return DataInput("collect", str(store.stage(parent.kind, parent.key)), ref.share, parent.key)
