"""Whole-model work: train, merge, evaluate, sweep, serve, report."""
