"""Offline merge methods: pure functions on tensors, and the table of them."""

from operators.merging.merge import merge_tensor
from operators.merging.method import MergeInput, Method, Parameter
from operators.merging.table import METHODS

__all__ = ["METHODS", "MergeInput", "Method", "Parameter", "merge_tensor"]
