"""Runs Triton's kernels in its interpreter (TRITON_INTERPRET=1) and saves what they give."""

import sys

import torch

from operators.kernels.triton_optimizer import TritonOptimizer
from tests.operators.optim.test_fast_paths import CASES, TINY, masks, steps, updates


def main(path: str) -> None:
    """Save parameters after each case, an update with its moments, and a share."""
    results = {
        name: {n: p.detach() for n, p in steps(TritonOptimizer(), options)[0].items()}
        for name, options in CASES.items()
    }
    results["masks"] = masks(TritonOptimizer())
    results["updates"] = updates(TritonOptimizer())
    results["unchanged"] = steps(TritonOptimizer(), TINY, 1)[1].unchanged_share()
    torch.save(results, path)


if __name__ == "__main__":
    main(sys.argv[1])
