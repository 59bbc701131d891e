"""What runs inside vLLM's worker processes: `WeightLoader` is mixed into the worker's class."""

import pickle
from dataclasses import replace
from typing import Any

from pipelines.engines.weights import Inspection, MergeWeights
from pipelines.errors import InputError
from pipelines.merge.kept import Kept


class WeightLoader:
    """Lets a worker replace its model's weights by a stream that is made here, in the worker."""

    model_runner: Any  # the worker's
    poise_kept: Kept | None = None  # of the merges that came before

    def load_poise_weights(self, pickled: bytes) -> dict[str, str]:
        """Replace all weights in place.

        Args:
            pickled: `Weights`; plain bytes, so that vLLM need not trust pickles in its messages.

        Returns:
            the digest of what went in, and a line on what failed; one of them is empty.
        """
        weights = pickle.loads(pickled)
        if isinstance(weights, MergeWeights) and weights.kept is not None:
            if self.poise_kept is None or self.poise_kept.budget != weights.kept.budget:
                self.poise_kept = weights.kept
            weights = replace(weights, kept=self.poise_kept)
        inspection = Inspection(weights)
        try:
            self.model_runner.reload_weights(weights_iterator=inspection.stream())
            self._repack_heads()
        except (InputError, ValueError, RuntimeError, OSError, KeyError, AssertionError) as error:
            self._end_reload()
            return {"digest": "", "error": str(error).strip() or type(error).__name__}
        return {"digest": inspection.digest, "error": ""}

    def _repack_heads(self) -> None:
        """Make what heads compute with anew. On a CPU it is a packed copy of the weights, which a
        reload does not touch where the head is the embedding: it would go on with the old ones.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        for module in self.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)

    def _end_reload(self) -> None:
        """End a reload that failed, so that the next one begins from nothing. The model that is
        left is of no use.
        """
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        model = self.model_runner.get_model()
        end: Any = finalize_layerwise_reload  # without types
        end(model, self.model_runner.vllm_config.model_config)
