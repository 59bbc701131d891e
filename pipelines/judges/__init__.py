"""Answers judged by a language model: at an OpenAI-compatible endpoint, or in a local engine."""
