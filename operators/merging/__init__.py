"""Offline merge methods: pure functions on tensors, and their table."""

from operators.merging.entry import merge_range, merge_tensor
from operators.merging.gathering import Gathering, begin_gathering
from operators.merging.method import Kept, MergeContext, MergeInput, Method
from operators.merging.mixup import mixup_lambda
from operators.merging.table import METHODS
from operators.parameters import Parameter

__all__ = [
    "METHODS",
    "Gathering",
    "Kept",
    "MergeContext",
    "MergeInput",
    "Method",
    "Parameter",
    "begin_gathering",
    "merge_range",
    "merge_tensor",
    "mixup_lambda",
]
