"""Run by the Python of vLLM's environment: seconds a model takes through vLLM, as JSON.

    python vllm_driver.py JOB_JSON

The job is {model: directory, arguments: those of vllm.LLM, vocab_size, rounds, scenarios: a list of
{batch, prompt, new}}, and perhaps plugin: a file whose `register` is called before. vLLM prints
much; one line of it is the answer,

    SECONDS {version, device, clock, cache_tokens, seconds}

where seconds[scenario][round] is [of one new token, of all of them]. It imports nothing of tessera,
which that environment need not hold.
"""

# vllm is not installed here, and pyright takes this package for it.
# pyright: reportAttributeAccessIssue=false

import json
import os
import random
import runpy
import sys
import time

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def main(job: dict) -> dict:
    """The answer to a job: every scenario once a round, after a first round that warms up."""
    import torch
    import vllm  # pyright: ignore[reportMissingImports]

    if job.get("plugin"):
        runpy.run_path(job["plugin"])["register"]()
    llm = vllm.LLM(model=job["model"], **job["arguments"])
    seconds: list[list[tuple[float, float]]] = [[] for _ in job["scenarios"]]
    cuda = torch.cuda.is_available()
    # A CPU with one thread: the process's own seconds leave out what others took of a shared one.
    alone = not cuda and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    generator = random.Random(0)
    for number in range(job["rounds"] + 1):
        for found, scenario in zip(seconds, job["scenarios"], strict=True):
            prompts = [
                {"prompt_token_ids": generator.choices(range(job["vocab_size"]), k=length)}
                for length in [scenario["prompt"]] * scenario["batch"]
            ]
            pair = [_timed(vllm, llm, prompts, new, clock) for new in (1, scenario["new"])]
            if number:
                found.append((pair[0], pair[1]))
    cache = llm.llm_engine.vllm_config.cache_config
    return {
        "version": vllm.__version__,
        "cache_tokens": getattr(cache, "kv_cache_size_tokens", None),  # unknown to older ones
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "clock": "process" if alone else "wall",
        "seconds": seconds,
    }


def _timed(vllm, llm, prompts: list, new: int, clock) -> float:
    sampling = vllm.SamplingParams(
        max_tokens=new, temperature=0.0, ignore_eos=True, detokenize=False
    )
    begun = clock()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    spent = clock() - begun
    assert all(len(output.outputs[0].token_ids) == new for output in outputs), "cut short"
    return spent


if __name__ == "__main__":
    os.environ |= QUIET
    print("SECONDS", json.dumps(main(json.loads(sys.argv[1]))), flush=True)
