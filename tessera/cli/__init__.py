"""The command line: one file for each group of commands, joined in `main.py`."""
