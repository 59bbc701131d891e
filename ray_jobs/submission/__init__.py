"""Commands as Ray jobs: packing, a look at the cluster, submission, and following to the end."""
