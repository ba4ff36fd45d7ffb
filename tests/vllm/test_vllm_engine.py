"""The engine over stock vLLM: what it does with its process, and that it says what ours says.

The first tests put a small script in vLLM's place; those marked `vllm` ask the real one
(`make interop`).
"""

from __future__ import annotations

import importlib.util
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tessera import dist
from tessera.generate.engine import (
    ClosedError,
    GenerationError,
    GenerationRequest,
    SamplingParams,
    Thinking,
)
from tessera.generate.torch_engine import TorchEngine
from tessera.model.checkpoint import save_model
from tessera.model.placement import ParallelConfig, Placement
from tessera.model.transformer import Transformer
from tessera.runs.files import RunError
from tessera.vllm.config import VLLMConfig
from tessera.vllm.engine import DiedError, Process, VLLMEngine, seed_of
from tessera.vllm.worker import checksum
from tests import tiny
from tests.export.interop import EQUAL, HETEROGENEOUS, PROMPTS, random_model
from tests.test_dist import run_ranks

VLLM = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
GREEDY = SamplingParams(max_tokens=16, temperature=0.0, logprobs=2)

# Answers as the worker does, and dies over a prompt that begins with 13, once where FILE is given.
STAND_IN = """
import json, os, sys, zlib
log = open(os.environ["STAND_IN_LOG"], "a")
for line in sys.stdin:
    asked = json.loads(line)
    print(asked["do"], file=log, flush=True)
    if asked["do"] in ("open", "load"):
        for name, told in asked["checksums"].items():
            data = open(os.path.join(asked["model"], name), "rb").read()
            assert zlib.crc32(data) == told
        answer = {"engine": "stand-in"}
    elif asked["do"] == "generate":
        for number, prompt, seed, sampling in asked["requests"]:
            ids, flag = asked["prompts"][prompt], os.environ["STAND_IN_LOG"] + ".12"
            print(number, file=log, flush=True)
            if ids[0] == 13 or (ids[0] == 12 and not os.path.exists(flag)):
                open(flag, "w").close()
                if len(ids) > 1:
                    print('{"number": 0, "completion": [[[[1, ', end="", flush=True)
                sys.exit("out of memory, say")
            said = [[ids[0], 2], [-0.5, -0.25], "stop", []]
            print(json.dumps({"number": number, "completion": said}), flush=True)
        answer = {}
    else:
        answer = {"error": "ValueError: no"}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The engine's process is the script above; its questions are logged in the returned file."""
    script, log = tmp_path / "worker.py", tmp_path / "log"
    script.write_text(STAND_IN)
    monkeypatch.setattr(Process.__init__, "__defaults__", (script,))
    monkeypatch.setenv("STAND_IN_LOG", str(log))
    return log


def group(directory: str, script: str) -> None:
    """Prints what a process says that runs vLLM together with others, on a model in training."""
    Process.__init__.__defaults__ = (Path(script),)
    with dist.processes():
        together = Placement(ParallelConfig(tensor=2), shards=False)
        module = Placement().load(directory)
        asked = VLLMEngine(module, VLLMConfig(python=sys.executable), batch=4, placement=together)
        with closing(asked):
            asked.sync(module, 3)
            found = asked.generate([[5, 6], [7], [8, 2]], GREEDY)
            files = sorted(asked._files)
            with pytest.raises(GenerationError, match="ValueError: no"):
                asked.score([[1, 2]])
    print([[[one.token_ids, one.version] for one in of_prompt] for of_prompt in found], files)


def test_the_first_of_a_tensor_group_runs_vllm_for_all(stand_in: Path, tmp_path: Path):
    save_model(random_model(), tmp_path / "model")
    code = "import sys; from tests.vllm.test_vllm_engine import group; group(*sys.argv[1:])"
    script = str(tmp_path / "worker.py")
    first, second = run_ranks(code, str(tmp_path / "model"), script)
    said = "[[[[5, 2], 3]], [[[7, 2], 3]], [[[8, 2], 3]]]"
    assert first == f"{said} ['model.safetensors']\n" and second == f"{said} []\n"
    assert stand_in.read_text().split().count("open") == 1


def engine(words=HETEROGENEOUS) -> VLLMEngine:
    return VLLMEngine(random_model(words), VLLMConfig(python=sys.executable))


def test_a_process_that_dies_is_started_again_with_the_last_weights(stand_in: Path):
    asked = engine()
    asked.sync(random_model(), 3)
    ((one,),) = asked.generate([[12, 1]], SamplingParams())
    assert (one.token_ids, one.logprobs, one.finish_reason, one.version) == (
        [12, 2],
        [-0.5, -0.25],
        "stop",
        3,
    )
    assert stand_in.read_text().split() == [
        "open",
        "load",
        "generate",
        "0",
        "open",
        "generate",
        "0",
    ]
    asked.close()


def test_only_what_is_missing_is_asked_again(stand_in: Path):
    requests = [GenerationRequest([n], SamplingParams(n=2), key=n, owner=n) for n in (1, 12, 3)]
    told: list[tuple[int, int]] = []
    with closing(engine()) as asked:
        found = list(asked.as_completed(requests, lambda *state: told.append(state)))
        assert [(one.owner, n, c.token_ids[0]) for one, n, c in found] == [
            (owner, n, owner) for owner in (1, 12, 3) for n in (0, 1)
        ]
        assert told == [(0, left) for left in (5, 4, 3, 2, 1, 0)]
    asked_for = stand_in.read_text().split("generate\n")[1:]
    assert asked_for == ["0\n1\n2\nopen\n", "2\n3\n4\n5\n"]


def test_what_is_left_unread_does_not_answer_the_next_question(stand_in: Path):
    with closing(engine()) as asked:
        completed = asked.as_completed([GenerationRequest([n], SamplingParams()) for n in (1, 2)])
        assert next(completed)[2].token_ids == [1, 2]
        completed.close()
        ((one,),) = asked.generate([[5]], SamplingParams())
        assert one.token_ids == [5, 2]


def test_a_process_that_dies_within_its_answer_has_died(stand_in: Path):
    with closing(engine()) as asked:
        ((one,),) = asked.generate([[12, 1]], SamplingParams())
        assert one.token_ids == [12, 2]
        with pytest.raises(DiedError, match="out of memory, say"):
            asked.generate([[13, 1]], SamplingParams())
    assert stand_in.read_text().split().count("open") == 3


def test_what_kills_it_twice_ends_the_run_with_its_last_words(stand_in: Path):
    asked = engine()
    with pytest.raises(DiedError, match=r"ended with code 1(.|\n)*out of memory, say"):
        asked.generate([[13]], SamplingParams())
    ((one,),) = asked.generate([[1]], SamplingParams())  # and the next question starts another
    assert one.token_ids == [1, 2]
    with pytest.raises(GenerationError, match="vLLM: ValueError: no"):
        asked.score([[1, 2]])
    asked.close()


def test_a_process_that_opens_no_model_is_ended(stand_in: Path, monkeypatch: pytest.MonkeyPatch):
    started: list[Process] = []

    def refused(self: Process, do: str, **keys: object) -> dict:
        started.append(self)
        raise GenerationError("vLLM: ValueError: no such head size")

    monkeypatch.setattr(Process, "ask", refused)
    with pytest.raises(GenerationError, match="no such head size"):
        engine()
    assert started[0].child.poll() is not None


def test_the_directory_in_memory_goes_with_the_engine(stand_in: Path):
    asked = engine(EQUAL)
    place = asked._place
    assert (place / "model" / "config.json").is_file()
    asked.close()
    assert not place.exists()
    with pytest.raises(ClosedError):
        asked.generate([[1]], SamplingParams())
    left = place.with_name("tessera-vllm-999999999-left")  # by a process that was killed
    left.mkdir()
    engine().close()
    assert not left.exists()


def test_what_vllm_cannot_do_is_said_before_it_is_started(stand_in: Path, tmp_path: Path):
    linear = tiny.model(tiny.config([("gqa-4", "swiglu-48"), ("linear", "swiglu-48")]))
    with pytest.raises(GenerationError, match="layer 1 .*vllm.plugin"):
        VLLMEngine(linear, VLLMConfig(python=sys.executable))
    with pytest.raises(RunError, match="nowhere/python"):
        VLLMEngine(random_model(), VLLMConfig(python="nowhere/python"))
    asked = engine()
    with pytest.raises(GenerationError, match="thinking"):
        asked.generate([[1]], SamplingParams(thinking=Thinking(4, ((1,),))))
    with pytest.raises(GenerationError, match="2 keys"):
        asked.generate([[1]], SamplingParams(), keys=[1, 2])
    with pytest.raises(GenerationError, match="weights"):
        asked.sync(random_model(EQUAL), 1)
    with pytest.raises(ValueError, match="max_num_seqs"):
        VLLMConfig(arguments={"max_num_seqs": 3})
    asked.close()
    assert stand_in.read_text().split() == ["open"]


def test_seeds_of_neighbours_do_not_meet():
    seeds = {seed_of(seed, key) + n for seed in range(8) for key in range(64) for n in range(16)}
    assert len(seeds) == 8 * 64 * 16 and max(seeds) < 2**63


def test_a_file_that_is_not_what_was_written_is_not_loaded(tmp_path: Path):
    (tmp_path / "w").write_bytes(b"weights")
    questions = [
        {"do": "open", "model": str(tmp_path), "checksums": {"w": 1}, "arguments": {}},
        {"do": "load", "model": str(tmp_path), "checksums": {"w": checksum(tmp_path / "w")}},
    ]
    worker = Process(sys.executable, {"PYTHONPATH": str(_fake_vllm(tmp_path))})
    with pytest.raises(GenerationError, match="w has checksum .* 00000001 was written"):
        worker.ask(**questions[0])
    with pytest.raises(GenerationError, match="NoneType"):  # past the checksum: nothing is open
        worker.ask(**questions[1])
    worker.close()


def _fake_vllm(place: Path) -> Path:
    (place / "vllm.py").write_text("")
    return place


def real() -> VLLMConfig:
    if not VLLM.is_file() and not _importable():
        pytest.skip("needs vLLM's CPU build: make venv-vllm")
    return VLLMConfig(python=str(VLLM) if VLLM.is_file() else sys.executable)


def _importable() -> bool:
    return bool(importlib.util.find_spec("vllm"))


LINEAR = (("noop", "swiglu-256"), ("gqa-2", "linear"), ("linear", "swiglu-512"))
CASES = [
    *[(words, tied) for words in (HETEROGENEOUS, EQUAL) for tied in (False, True)],
    (LINEAR, False),
]


@pytest.mark.vllm
@pytest.mark.parametrize(("words", "tied"), CASES)
def test_vllm_says_what_our_engine_says_before_and_after_a_sync(words, tied: bool):
    module = random_model(words, tie_word_embeddings=tied)
    ours, settings = TorchEngine(module), real().model_copy(update={"plugin": words is LINEAR})
    with closing(VLLMEngine(module, settings, batch=8)) as theirs:
        assert_they_agree(module, theirs, ours)


def assert_they_agree(module: Transformer, theirs: VLLMEngine, ours: TorchEngine) -> None:
    for version in range(2):
        if version:
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
            for one in (theirs, ours):
                one.sync(module, version)
        pairs = zip(theirs.generate(PROMPTS, GREEDY), ours.generate(PROMPTS, GREEDY), strict=True)
        for (found,), (expected,) in pairs:
            assert found.token_ids == expected.token_ids
            assert found.version == version
            assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
            for row, other in zip(found.top_logprobs, expected.top_logprobs, strict=True):
                assert [i for i, _ in row] == [i for i, _ in other]
        for found, expected in zip(theirs.score(PROMPTS), ours.score(PROMPTS), strict=True):
            assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.vllm
def test_a_sample_of_vllm_follows_from_seed_and_key():
    params = SamplingParams(max_tokens=6, n=3, seed=2)
    with closing(VLLMEngine(random_model(), real(), batch=4)) as asked:
        together = asked.generate(PROMPTS, params, keys=[5, 6, 7, 8])
        ((alone),) = asked.generate(PROMPTS[1:2], params, keys=[6])
        stop = replace(params, stop_token_ids=(alone[0].token_ids[2],))
        ended = asked.generate(PROMPTS[1:2], stop, keys=[6])[0][0]
        # More than vLLM reads at once: a prompt cut in two has lost its seed on a CPU.
        many = asked.generate([list(range(1, 200))] * 64, params)
    assert len({one.token_ids[0] for of_prompt in many for one in of_prompt}) > 1
    assert [one.token_ids for one in together[1]] == [one.token_ids for one in alone]
    assert len({tuple(one.token_ids) for one in alone}) == 3
    assert ended.token_ids == alone[0].token_ids[:3] and ended.finish_reason == "stop"
    assert not asked._place.exists()
