"""A hook for `ray.serve.llm`: the models lie on disk, so no node has to fetch them."""

from ray.llm._internal.common.callbacks.base import CallbackBase


class LocalFiles(CallbackBase):
    """Skips the step that downloads a model in a process of its own (10 s and more on a CPU)."""

    async def on_before_node_init(self) -> None:
        """Called by the engine before it would fetch the model."""
        self.ctx.run_init_node = False
