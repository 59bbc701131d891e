"""Names of the files in a run's folder and in its output."""

METRICS_FILE = "metrics.jsonl"  # one line per step
REFERENCE_FILE = "reference.json"  # progress: rows with reference log-probabilities
REMARK_FILE = "remark"  # a line that the first worker has for the user
TENSORBOARD_FOLDER = "tensorboard"
ADAPTER_FOLDER = "adapter"  # in an output that has the merged model, too
MODEL_FOLDER = "model"  # the exported model, perhaps incomplete
EXPORTED_FILE = "exported"  # exists when the exported model is complete
