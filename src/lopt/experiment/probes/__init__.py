"""Probes: what happens inside of meta-training, one file each."""
