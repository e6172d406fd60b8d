"""Data sets, tasks and tables by name and file."""
