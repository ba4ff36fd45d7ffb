"""Commands that use a model: generate, eval, export, serve, chat."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from tessera.cli.common import (
    MODEL,
    Device,
    Dtype,
    Json,
    Model,
    Quiet,
    Switch,
    TemplateKwargs,
    checked_switch,
    choose,
    command,
    complain,
    computing,
    print_json,
    template_kwargs,
)

Seed = Annotated[int, typer.Option(min=0, help="Of the sampling.")]
Places = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[TASK=]PLACE",
        help="A directory of the tasks' files, a file, a dataset of the hub "
        '(ID[:SUBSET[:SPLIT]]), or "hub" for the task\'s own; may be repeated.',
    ),
]
TASKS = (
    "gsm8k, math500, aime24, gpqa, ifeval, humaneval, mbpp, bfcl_live, bfcl_multi_turn, mt_bench, "
    "arena_hard, judgebench, perplexity, needle@4096, calc@6, gym/NAME and more; several with "
    "commas."
)


@command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token every time.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this mass.")
    ] = 1.0,
    seed: Seed = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask through the model's chat template, as it stands.")
    ] = False,
    thinking: Annotated[
        str | None, typer.Option(help="on or off: --chat, with the reasoning switch said.")
    ] = None,
    switch: Switch = None,
    chat_template_kwargs: TemplateKwargs = "",
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Print the text a model goes on with after a prompt, or its answer to a question."""
    from tessera.data.chat import ChatEncoder
    from tessera.data.switch import require_switch
    from tessera.data.tokenizer import load_tokenizer
    from tessera.generate.engine import SamplingParams
    from tessera.generate.torch_engine import TorchEngine
    from tessera.model.placement import for_inference
    from tessera.model.source import resolve

    tokenizer = load_tokenizer(resolve(model))
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        stop_token_ids=tokenizer.eos_ids,
        seed=seed,
    )
    chat = chat or bool(thinking or switch or chat_template_kwargs)
    if not chat:
        ids = tokenizer.encode(prompt, bos=True, special=True)
    else:
        encoder = ChatEncoder.of(tokenizer, switch=checked_switch(switch), today=True)
        if thinking is not None:
            choose("--thinking", thinking, "on", "off")
            require_switch(encoder.switch, thinking, model)  # type: ignore[arg-type]
        mode, variables = thinking or encoder.default, template_kwargs(chat_template_kwargs)
        messages = [{"role": "user", "content": prompt}]
        ids = encoder.prompt(messages, mode, variables=variables)  # type: ignore[arg-type]
    with computing(device, dtype):
        placement = for_inference(model, dtype=dtype)  # type: ignore[arg-type]
        engine = TorchEngine(placement.load(model, frozen=True))
        completion = engine.generate([ids], params)[0][0]
    # Decoded together: a SentencePiece text's first space belongs to what stands before it.
    text = tokenizer.decode([*ids, *completion.token_ids]).removeprefix(tokenizer.decode(ids))
    if as_json:
        found: dict[str, Any] = {"prompt": prompt, "text": text}
        for key in ("finish_reason", "token_ids", "logprobs"):
            found[key] = getattr(completion, key)
        print_json(found)
    else:
        print(text if chat else prompt + text)


@command("eval")
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help=f"{MODEL}; with --endpoint, its name there.")
    ],
    task: Annotated[list[str], typer.Option(help=TASKS)],
    data: Places = None,
    thinking: Annotated[
        str, typer.Option(help="on, off or both; a model without a switch is asked as it is.")
    ] = "both",
    switch: Switch = None,
    chat_template_kwargs: TemplateKwargs = "",
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many items.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Of each item; off is asked once.")] = 1,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, help="0.6 with reasoning on, 0 without a switch; off is greedy."),
    ] = None,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Where it is sampled.")] = 0.95,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of an answer; 32,768 for benchmarks.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Ask this server: http://…/v1.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(metavar="MODEL@URL", help="Who judges mt_bench and arena_hard.")
    ] = None,
    key_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="The API key of endpoint and judge.")
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where answers and verdicts are kept.")
    ] = Path("runs/eval"),
    rescore: Annotated[
        bool, typer.Option("--rescore", help="Judge the kept answers anew.")
    ] = False,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Ask a model the tasks' questions and print accuracy, tokens and obedience of each mode.

    The same command again asks only what is missing; more samples or items add to what is there.
    """
    from tessera import dist
    from tessera.eval.evaluate import EvalConfig, evaluate
    from tessera.model.source import resolve
    from tessera.runs.files import Lock
    from tessera.runs.recipe import validate

    table: dict[str, Any] = {
        "tasks": [name for names in task for name in names.split(",") if name],
        "data": _places(data or []),
        "thinking": thinking,
        "limit": limit,
        "max_tokens": max_tokens,
        **_samplings(temperature, top_p, samples),
        "switch": switch,
        "chat_template_kwargs": template_kwargs(chat_template_kwargs),
        "endpoint": endpoint and {"url": endpoint, "model": model, "key_file": key_file},
        "judge": judge and _judge(judge, key_file),
        "dtype": dtype,
    }
    config = validate(EvalConfig, table, "eval")
    folder = out / Path(model).name
    main = dist.is_main()  # of the processes that torchrun started, which share the questions
    with computing(device, dtype), Lock(folder) if main else nullcontext(), dist.processes():
        if rescore and main:
            (folder / "verdicts.jsonl").unlink(missing_ok=True)
        home = None if endpoint else resolve(model)
        rows, groups = evaluate(config, folder, home, seed, quiet=quiet)
    if not main:
        return
    if as_json:
        print_json({"eval": rows, "groups": groups})
    else:
        _print_tables(rows, groups)
        complain(f"The answers are in {folder / 'records.jsonl'}, the verdicts in verdicts.jsonl")


def _judge(given: str, key_file: str | None) -> dict[str, Any]:
    model, _, url = given.rpartition("@")
    return {"url": url, "model": model, "key_file": key_file}


def _samplings(temperature: float | None, top_p: float, samples: int) -> dict[str, Any]:
    """How a model is sampled with reasoning on, and how one without a switch; off is greedy."""
    drawn = {"top_p": top_p, "samples": samples}
    on = 0.6 if temperature is None else temperature
    return {
        "on": {"temperature": on, **drawn},
        "none": {"temperature": temperature or 0.0, **drawn},
    }


def _print_tables(rows: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    from tessera.table import VIEWS, render_table, terminal_width

    for name, found in (("eval", rows), ("eval_groups", groups)):
        if found:
            print(f"{render_table(found, None, VIEWS[name], terminal_width())}\n")


def _places(given: list[str]) -> dict[str, str] | str:
    """One place for all tasks, or one for each task that is named."""
    by_task = dict(one.split("=", 1) for one in given if "=" in one)
    for_all = [one for one in given if "=" not in one]
    if len(for_all) > 1 or (for_all and by_task):
        raise typer.BadParameter("--data: one place for all tasks, or TASK=PLACE for each")
    return for_all[0] if for_all else by_task or ""


@command()
def export(
    model: Model,
    out: Annotated[
        Path | None,
        typer.Argument(
            metavar="[OUT]",
            help="The directory to write. Without it nothing is written, and for every engine it "
            "is printed whether it loads the model, or which layers it refuses.",
        ),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            help="decilm (any mixture of layers, for vLLM), gguf (for llama.cpp), hf (stock "
            "Llama, Mistral or Qwen, for models whose layers are all equal), padded (any mixture "
            "as a plain Llama, with zeros), puzzletron or megatron (NVIDIA's tools), per_layer "
            "(transformers' per_layer_config, which nothing runs yet)."
        ),
    ] = "decilm",
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="Refuse unless this engine can load it, instead of the one the format is for; "
            "may be repeated. vllm, vllm-cpu, vllm-plugin, llama.cpp, sglang or "
            "transformers; none asks for no engine."
        ),
    ] = None,
    fp8: Annotated[
        bool,
        typer.Option("--fp8", help="Round the projections to FP8 (decilm, hf and padded)."),
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16, instead of the model's own.")
    ] = "",
    check: Annotated[bool, typer.Option(help="Read it back and compare with the source.")] = True,
    as_json: Json = False,
) -> None:
    """Write a model as a directory that stock serving engines load, or say which would."""
    if out is None:
        _print_engines(model, as_json)
        return
    from tessera.export.write import export_model

    if dtype:
        choose("--dtype", dtype, "float32", "bfloat16", "float16")
    engines = [] if engine == ["none"] else engine
    report = export_model(
        model,
        out,
        format,
        check=check,
        engines=engines,
        quantize="fp8" if fp8 else None,
        dtype=dtype or None,  # type: ignore[arg-type]
    )
    print_json(report.as_json()) if as_json else print("\n".join(report.lines()))


def _print_engines(model: str, as_json: bool) -> None:
    """Who can load a model, in which format, and what stands against it."""
    from tessera.export.engines import ENGINES, FORMATS, format_refusals, refusals
    from tessera.model.source import load_config, resolve

    config = load_config(resolve(model))
    formats = {form: format_refusals(config, form) for form in FORMATS}
    engines = {engine: refusals(config, engine) for engine in ENGINES}
    if as_json:
        print_json({"engines": engines, "formats": formats})
        return
    for title, found in (
        ("engines", {ENGINES[engine]: why for engine, why in engines.items()}),
        ("formats", formats),
    ):
        print(title)
        for name, reasons in found.items():
            print(f"  {name}: {'; '.join(reasons) or 'yes'}")


@command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Where to listen; others need a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any.")] = 8000,
    engine: Annotated[
        str, typer.Option(help="torch, or vllm for an exported directory.")
    ] = "torch",
    name: Annotated[str, typer.Option(help="What clients call it; the directory's name.")] = "",
    key_file: Annotated[
        str, typer.Option(metavar="FILE", help="API keys, one a line; or TESSERA_API_KEY.")
    ] = "",
    batch: Annotated[int, typer.Option(min=1, help="Samples decoded together.")] = 32,
    queue: Annotated[int, typer.Option(min=1, help="Samples that may wait; then 429.")] = 256,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds of a request.")] = 600.0,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="How long requests may go on after SIGTERM.")
    ] = 30.0,
    max_body_kib: Annotated[int, typer.Option(min=1, help="Of a request.")] = 1024,
    prefix_cache: Annotated[
        int, typer.Option(min=0, help="Tokens of prompts kept for those that begin alike.")
    ] = 0,
    int8: Annotated[bool, typer.Option("--int8", help="Weights in int8, on a CPU.")] = False,
    web: Annotated[bool, typer.Option("--web", help="A page to chat on, at /.")] = False,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Pages of this site may ask; again for more, or '*'."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="A name of this server beside localhost, or '*'."),
    ] = None,
    max_connections: Annotated[int, typer.Option(min=1, help="More are closed.")] = 1024,
    patience: Annotated[
        float, typer.Option(min=0.1, help="Seconds for a request to come, a piece to be read.")
    ] = 30.0,
    switch: Switch = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Serve a model with the OpenAI API: /v1/chat/completions, /v1/completions, /v1/models.

    A request says whether to think by chat_template_kwargs.enable_thinking, by reasoning_effort, by
    /think or /no_think at the end of its text, or in the words of the model's own switch. Where
    none does, the model's template stands. Loopback alone unless a key is given.
    """
    switch, allow_origin = checked_switch(switch), allow_origin or []
    allow_host = allow_host or []
    settings = dict(locals())
    del settings["model"], settings["engine"], settings["device"]
    _serve(model, engine, device, settings)


def _serve(model: str, engine: str, device: str | None, settings: dict[str, Any]) -> None:
    choose("--engine", engine, "torch", "vllm")
    try:
        from tessera.serve.app import ServeConfig, serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in (
            *("fastapi", "uvicorn", "starlette", "prometheus_client"),
        ):
            raise
        raise typer.BadParameter(
            f"serving needs {error.name}, which is not installed: pip install 'tessera[serve]'"
        ) from None
    with computing(device, settings["dtype"]):
        config = ServeConfig(**settings)
        if engine == "torch":
            serve(model, config)
            return
    for given, why in (
        (config.switch and "--switch", "renders the template itself"),
        (device and "--device", "computes on the kind of device that it was built for"),
    ):
        if given:
            raise typer.BadParameter(f"{given}: vLLM {why}; leave it out")
    from tessera.serve.vllm import command

    found = command(model, config)
    if found.note:
        complain(found.note)
    complain(" ".join(found.arguments))
    os.execvpe(found.arguments[0], found.arguments, {**os.environ, **found.environment})


@command()
def chat(
    model: Model,
    thinking: Annotated[
        str | None, typer.Option(help="on or off, to begin with; else as the model's template is.")
    ] = None,
    switch: Switch = None,
    chat_template_kwargs: TemplateKwargs = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 2048,
    thinking_budget: Annotated[
        int | None, typer.Option(min=0, help="Tokens after which a thought is closed.")
    ] = None,
    web: Annotated[bool, typer.Option("--web", help="A page, on and off side by side.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page.")] = 8000,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Talk to a model, in the terminal or with --web on a page of this machine."""
    if web:
        own = {"port": port, "web": True, "switch": checked_switch(switch), "dtype": dtype}
        _serve(model, "torch", device, own)
        return
    if thinking is not None:
        choose("--thinking", thinking, "on", "off")
    from tessera.serve import chat as terminal

    asking = terminal.Asking(
        thinking,  # type: ignore[arg-type]
        checked_switch(switch),
        template_kwargs(chat_template_kwargs),
        max_tokens,
        thinking_budget,
        dtype,  # type: ignore[arg-type]
    )
    with computing(device, dtype):
        terminal.chat(model, asking)
