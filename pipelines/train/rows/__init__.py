"""What rows say: their columns, their messages, the readers of published sets, and bad rows."""
