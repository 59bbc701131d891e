"""The Hugging Face hub: its names and cache, and the requests to it. What a model needs of it is
decided in `pipelines.checkpoints.hub`.
"""
