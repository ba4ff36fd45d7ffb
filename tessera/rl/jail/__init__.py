"""Runs generated programs where they can reach nothing: no files, no network, no process."""
