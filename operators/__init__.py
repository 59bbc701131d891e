"""Mathematics on tensors and parameters: no files, no Ray, no global random state."""
