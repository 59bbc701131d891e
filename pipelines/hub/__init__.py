"""The Hugging Face hub: its names and cache, the requests to it, and commits that are fetched. What
a model needs of it is decided in `pipelines.checkpoints.hub`, and what a data set needs in
`pipelines.train.data.hub`.
"""
