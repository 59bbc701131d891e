"""A hook for `ray.serve.llm`: the models are on disk, so no node has to download them."""

import asyncio

from ray.llm._internal.common.callbacks.base import CallbackBase

from pipelines.checkpoints.hub import bring
from pipelines.hub.offline import is_offline


class LocalFiles(CallbackBase):
    """Skips the download of a model, which runs in a separate process (10 s or more on a CPU). What
    this node lacks of a model of the hub is fetched here.
    """

    async def on_before_node_init(self) -> None:
        """Called by the engine before the download."""
        loading = self.llm_config.model_loading_config
        source = loading["model_source"] if isinstance(loading, dict) else loading.model_source
        await asyncio.to_thread(bring, [str(source)], offline=is_offline())
        self.ctx.run_init_node = False
