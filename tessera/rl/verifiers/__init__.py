"""Checks of a completion. They may run long (`9^{9^9}`); `rl/pool.py` can kill their process."""
