"""Recipes that come with lopt: each file defines `experiment(...) -> Experiment`."""
