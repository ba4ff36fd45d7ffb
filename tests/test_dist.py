from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tessera import dist
from tessera.devices import DeviceError
from tessera.runs.files import SharedJournal
from tessera.runs.run import is_done, read_json

ROOT = Path(__file__).parents[1]


def run_ranks(code: str, *words: str, world: int = 2) -> list[str]:
    """What each of `world` processes prints, started as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *words],
            env={**os.environ, **shared, "RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * world
    return printed


def test_one_process_is_a_no_op():
    value = torch.tensor([1.0, 2.0])
    with dist.processes():
        assert dist.sum(value) is value and dist.max(value) is value
        assert dist.broadcast("x") == "x" and dist.gather("x") == ["x"]
        dist.barrier()
    assert (dist.rank(), dist.world(), dist.is_main()) == (0, 1, True)


def test_sums_journals_and_the_timeout_are_the_same_everywhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    code = (
        "import sys; from pathlib import Path; import torch; from tessera import dist\n"
        "from tessera.runs.files import SharedJournal\n"
        "with dist.processes():\n"
        "    mine = torch.tensor([dist.rank() + 1.0, -dist.rank()])\n"
        "    print(dist.sum(mine).tolist(), dist.max(mine).tolist(), mine.tolist()[0],\n"
        "          dist.broadcast(dist.rank()), dist.gather(dist.rank()))\n"
        "    groups = [None, *dist.mesh((1, 2), ('shard', 'tensor')).get_all_groups()]\n"
        "    groups[0] = torch.distributed.group.WORLD\n"
        "    every = (g._get_backend(torch.device('cpu')).options._timeout for g in groups)\n"
        "    print(*(int(one.total_seconds()) for one in every))\n"
        "    for step in (1, 2):\n"
        "        with SharedJournal(Path(sys.argv[1])) as rows:\n"
        "            print(sorted(rows))\n"
        "            rows.add(f'{dist.rank()}{step}', {'step': step})\n"
        "            rows.add('same', {'step': step})\n"
        "        dist.barrier()\n"
    )
    monkeypatch.setenv("TESSERA_TIMEOUT", "3")
    first, second = run_ranks(code, str(tmp_path / "rows.jsonl"))
    alike = "180 180 180\n[]\n['01', '11', 'same']\n"
    assert first == "[3.0, -1.0] [2.0, 0.0] 1.0 0 [0, 1]\n" + alike
    assert second == "[3.0, -1.0] [2.0, 0.0] 2.0 0 [0, 1]\n" + alike
    with SharedJournal(tmp_path / "rows.jsonl") as rows:  # which nobody has collected
        assert sorted(rows) == ["01", "02", "11", "12", "same"] and len(rows) == 5
        assert rows.get("12")["step"] == 2
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
    monkeypatch.setenv("TESSERA_TIMEOUT", "soon")
    with pytest.raises(DeviceError, match="no number of minutes above 0; the default is 120"):
        dist.timeout()


def test_a_recipe_in_two_processes_is_written_once(tmp_path: Path):
    code = (
        "import sys; from tessera.runs import recipe; from tests.pipeline_stages import *\n"
        "steps = run_recipe(recipe.loads(sys.argv[2]), sys.argv[1], quiet=True, stages=STAGES)\n"
        "print([step.action for step in steps])\n"
    )
    text = 'name = "r"\n[data]\n[parent]\n[child]\n'
    assert run_ranks(code, str(tmp_path), text) == ["['run', 'run', 'run']\n"] * 2
    assert all(is_done(tmp_path / "r" / name) for name in ("data", "parent", "child"))
    assert read_json(tmp_path / "r" / "child", "value") == 3
    assert run_ranks(code, str(tmp_path), text) == ["['skip', 'skip', 'skip']\n"] * 2
