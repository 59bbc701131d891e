"""A hook for `ray.serve.llm`: the models are on disk, so no node has to download them."""

from ray.llm._internal.common.callbacks.base import CallbackBase


class LocalFiles(CallbackBase):
    """Skips the download of a model, which runs in a separate process (10 s or more on a CPU)."""

    async def on_before_node_init(self) -> None:
        """Called by the engine before the download."""
        self.ctx.run_init_node = False
