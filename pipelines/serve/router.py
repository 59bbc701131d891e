"""Which replica a request goes to: one that has its weights, so that engines seldom change them.

It is about speed alone: a replica answers any request with the weights that the request is pinned
to (`turns.py`), wherever it lands.
"""

import time
from hashlib import blake2b
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

PATIENCE_S = 1.0  # for a place at a replica that has the weights, before any will do


class ByWeights(RequestRouter):
    """Of the replicas that have a request's weights, the one with the fewest requests; where none
    has them, always the same one for the same weights.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Lists of replicas; Serve takes from the first one where there is a place."""
        if pending_request is None:
            return [candidate_replicas]
        weights = pending_request.metadata.multiplexed_model_id
        first = having(candidate_replicas, weights)
        if time.time() - pending_request.created_at < PATIENCE_S:
            return [first]
        return [first, candidate_replicas]


def having(replicas: list[Any], weights: str) -> list[Any]:
    """Those that have the weights; else the one that is to get them."""
    found = [each for each in replicas if each.routing_stats.get("weights") == weights]
    return found or [max(replicas, key=lambda each: _place(weights, str(each.replica_id)))]


def _place(weights: str, replica: str) -> bytes:
    """A number that is the highest for another replica with other weights (rendezvous hashing)."""
    return blake2b(f"{weights}|{replica}".encode(), digest_size=8).digest()
