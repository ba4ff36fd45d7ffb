"""What checks a completion: pure functions, the same for rewards and for evaluation.

Each returns an `Outcome`, which is right, wrong, or could-not-judge; none of them returns a zero
for a check that it could not make. They have no deadlines of their own and may run long on what a
model writes (`9^{9^9}`): `rl/pool.py` runs them in processes that can be killed.
"""
