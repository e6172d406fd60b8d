"""The host side: files, progress, plots, recipes, the command line.

Modules here are imported one by one, so that the command line answers before JAX is loaded.
"""
