"""Which tasks there are. A new one is a `Task` in a file of this folder and a line here."""

from __future__ import annotations

from tessera.eval.task import EvalError, Task
from tessera.eval.tasks import judged, maths, multi_turn, procedural, programs, tools
from tessera.table import nearest

TASKS: dict[str, Task] = {
    task.name: task
    for tasks in (
        maths.TASKS,
        programs.TASKS,
        tools.TASKS,
        multi_turn.TASKS,
        judged.TASKS,
    )
    for task in tasks
}


def find(name: str) -> Task:
    """The task of that name, read or drawn. Raises EvalError naming the nearest one."""
    task = TASKS.get(name) or procedural.find(name)
    if task is None:
        drawn = ("calc@6", "sort", "compare", "needle@1024", "gym/NAME")
        raise EvalError(f'no task "{name}"; {nearest(name, [*TASKS, *drawn])}')
    return task
