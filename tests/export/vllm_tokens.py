"""Run by vLLM's own environment: greedy tokens of an exported directory, as JSON.

    python vllm_tokens.py DIRECTORY PROMPTS_JSON NEW_TOKENS [PLUGIN]

Prints one line, `TOKENS [[ids], [log-probabilities]]` a prompt; vLLM prints much besides.
"""

import json
import os
import runpy
import sys

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def main(directory: str, prompts: str, new: str, plugin: str = "") -> None:
    import vllm  # pyright: ignore[reportMissingImports]

    if plugin:
        runpy.run_path(plugin)["register"]()

    llm = vllm.LLM(
        model=directory,
        trust_remote_code=True,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=8,
    )
    sampling = vllm.SamplingParams(
        max_tokens=int(new), temperature=0.0, logprobs=1, detokenize=False
    )
    asked = [{"prompt_token_ids": prompt} for prompt in json.loads(prompts)]
    answers = []
    for output in llm.generate(asked, sampling, use_tqdm=False):
        ids = list(output.outputs[0].token_ids)
        logprobs = [row[i].logprob for row, i in zip(output.outputs[0].logprobs, ids, strict=True)]
        answers.append([ids, logprobs])
    print("TOKENS", json.dumps(answers), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
