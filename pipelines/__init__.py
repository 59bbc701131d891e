"""Whole-model work: train, merge, evaluate, search, serve, report."""
