"""Runs: what they are made of, how they are trained, and the files that they leave."""
