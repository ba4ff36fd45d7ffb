"""TRL's side of training.py and rl.py, run by a Python that has TRL: one JSON line of figures.

    python trl_side.py sft MODEL WORK.json --dtype autocast --batch 1 --accum 8 --steps 3
    python trl_side.py grpo MODEL WORK.json --dtype autocast --batch 8 --steps 1

WORK.json holds `documents`, lists of token ids, and their `labels` (sft), or `prompts` and
`new`, how many tokens an answer has (grpo). dtype: float32; autocast, arithmetic in bfloat16 with
weights and moments in float32; bfloat16, weights and moments too.
"""

import argparse
import json
import resource
import tempfile
import time

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback


class Clock(TrainerCallback):
    def __init__(self):
        self.marks = []

    def mark(self, *args, **kwargs):
        self.marks.append((time.perf_counter(), time.process_time()))

    on_train_begin = on_step_end = mark


def settings(options, out):
    return dict(
        output_dir=out,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accum,
        max_steps=options.steps + 1,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        bf16=options.dtype == "autocast",
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def sft(options, work, model, tokenizer, clock, out):
    from trl import SFTConfig, SFTTrainer

    pairs = zip(work["documents"], work["labels"], strict=True)
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in pairs]
    counted = []

    class Counting(SFTTrainer):
        def training_step(self, model, inputs, *rest):
            counted.append((inputs["labels"] != -100).sum().item())
            return super().training_step(model, inputs, *rest)

    made = SFTConfig(
        **settings(options, out),
        max_length=work["length"],
        packing=True,
        packing_strategy="bfd",
    )
    data = Dataset.from_list(rows)
    one = Counting(model, made, train_dataset=data, processing_class=tokenizer, callbacks=[clock])
    one.train()
    return sum(counted[options.accum :]) / options.steps


def grpo(options, work, model, tokenizer, clock, out):
    from trl import GRPOConfig, GRPOTrainer

    group = work["prompts_per_step"] * work["samples"]
    options.accum = group // options.batch
    made = GRPOConfig(
        **settings(options, out),
        num_generations=work["samples"],
        max_completion_length=work["new"],
        steps_per_generation=options.accum,
        generation_kwargs={"min_new_tokens": work["new"]},
        temperature=1.0,
        beta=0.0,
    )
    made.gradient_accumulation_steps = options.accum

    def even(completions, **rest):
        return [sum(ord(c) % 2 == 0 for c in text) / max(1, len(text)) for text in completions]

    data = Dataset.from_list([{"prompt": prompt} for prompt in work["prompts"]])
    GRPOTrainer(model, even, made, data, processing_class=tokenizer, callbacks=[clock]).train()
    return group


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["sft", "grpo"])
    parser.add_argument("model")
    parser.add_argument("work")
    parser.add_argument("--dtype", choices=["float32", "autocast", "bfloat16"], default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--accum", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    disable_progress_bars()
    with open(options.work) as file:
        work = json.load(file)
    dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    tokenizer, clock = AutoTokenizer.from_pretrained(options.model), Clock()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with tempfile.TemporaryDirectory() as out:
        done = globals()[options.what](options, work, model, tokenizer, clock, out)
    first, last = clock.marks[1], clock.marks[-1]
    wall, cpu = ((b - a) / options.steps for a, b in zip(first, last, strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"done": done, "wall": wall, "cpu": cpu, "peak": peak}))


if __name__ == "__main__":
    main()
