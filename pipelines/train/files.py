"""Names of the files in a run's folder and in the model that it becomes."""

METRICS_FILE = "metrics.jsonl"  # one line a step
REFERENCE_FILE = "reference.json"  # of how many rows the reference's word is there
TENSORBOARD_FOLDER = "tensorboard"
MODEL_FOLDER = "model"  # the exported model, on its way
EXPORTED_FILE = "exported"  # there once that is complete
