"""Checks of a completion: pure functions, the same for rewards and for evaluation.

Each returns an `Outcome`: right, wrong, or could-not-judge. They have no deadlines and may run long
on what a model writes (`9^{9^9}`); `rl/pool.py` runs them in processes that can be killed.
"""
