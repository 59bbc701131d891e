"""The command line and the entry points of Ray jobs: only wiring."""
