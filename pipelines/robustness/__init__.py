"""How much of its score a model loses when a task's prompt is written a little differently: attacks
on prompt templates, and the drop rate.
"""
