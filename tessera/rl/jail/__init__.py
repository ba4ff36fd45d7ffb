"""Runs generated programs where they can reach nothing: no files, no network, no other process.

Linux's unprivileged namespaces, limits and a system-call filter; no container engine, no service.
`run` is all that others need. Where the kernel gives no isolation it refuses to run.
"""

from tessera.rl.jail.run import Ended, JailError, Limits, require_isolation, run

__all__ = ["Ended", "JailError", "Limits", "require_isolation", "run"]
