"""A file system: one tree of directories and texts, and the shell's commands on where one stands.

A node is what the items give: {"type": "directory", "contents": {name: node}} or {"type": "file",
"content": text}. Commands take names in the current directory; only `find` takes a path. Where one
stands is no part of the state that is compared, for a task may end anywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any, NamedTuple

from tessera.eval.services.base import Refused, Service, offered

Node = dict[str, Any]
# A tree that is copied into itself doubles with each call, and one that nests ends Python's stack.
TEXT, NODES, DEPTH = 1 << 20, 1 << 10, 64  # characters, files and directories, levels
UNITS = {"l": "lines", "w": "words", "c": "characters"}


class Place(NamedTuple):
    """A name in a directory; depth: of the directory below the root."""

    directory: dict[str, Node]
    name: str
    depth: int


class Files(Service):
    defaults = {"root": {"workspace": {"type": "directory", "contents": {}}}}

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.data["_path"] = list(self.data["root"])[:1]

    def _at(self, path: list[str]) -> dict[str, Node]:
        """The contents of the directory at a path from the root. Raises Refused."""
        found: dict[str, Node] = self.data["root"]
        for name in path:
            node = found.get(name)
            if node is None or node["type"] != "directory":
                raise Refused(f"there is no directory {name!r}")
            found = node["contents"]
        return found

    @property
    def _here(self) -> dict[str, Node]:
        return self._at(self.data["_path"])

    def _node(self, name: str) -> Node:
        if name not in self._here:
            raise Refused(f"there is no {name!r} here")
        return self._here[name]

    def _text(self, name: str) -> str:
        node = self._node(name)
        if node["type"] != "file":
            raise Refused(f"{name!r} is a directory")
        return node["content"]

    @offered
    def pwd(self) -> Any:
        return {"current_working_directory": "/" + "/".join(self.data["_path"])}

    @offered
    def ls(self, a: bool = False) -> Any:
        return {"current_directory_content": [n for n in self._here if a or n[:1] != "."]}

    @offered
    def cd(self, folder: str) -> Any:
        path = self.data["_path"]
        if folder == "..":
            if len(path) < 2:
                raise Refused("this is the topmost directory")
            self.data["_path"] = path[:-1]
        elif folder != ".":
            self._at([*path, _name(folder)])
            self.data["_path"] = [*path, folder]
        return self.pwd()

    @offered
    def mkdir(self, dir_name: str) -> Any:
        self._new(dir_name, {"type": "directory", "contents": {}})

    @offered
    def touch(self, file_name: str) -> Any:
        self._new(file_name, {"type": "file", "content": ""})

    def _new(self, name: str, node: Node) -> None:
        if _name(name) in self._here:
            raise Refused(f"{name!r} exists already")
        self._put(Place(self._here, name, len(self.data["_path"])), node)

    def _put(self, place: Place, node: Node) -> None:
        """Adds a copy of a node. Raises Refused where it is too much."""
        text, nodes, depth = _extent({place.name: node})
        all_text, all_nodes, _ = _extent(self.data["root"])
        if text + all_text > TEXT or nodes + all_nodes > NODES:
            raise Refused("no space is left")
        if place.depth + depth > DEPTH:
            raise Refused("directories go no deeper")
        place.directory[place.name] = copy.deepcopy(node)

    @offered
    def echo(self, content: str, file_name: str | None = None) -> Any:
        if file_name is None:
            return {"terminal_output": content}
        if file_name in self._here:
            self._text(file_name)  # which refuses a directory
        place = Place(self._here, _name(file_name), len(self.data["_path"]))
        self._put(place, {"type": "file", "content": content})
        return {"terminal_output": None}

    @offered
    def cat(self, file_name: str) -> Any:
        return {"file_content": self._text(file_name)}

    @offered
    def grep(self, file_name: str, pattern: str) -> Any:
        """The pattern is a text to be found, not an expression: no pattern can hang a run."""
        lines = self._text(file_name).splitlines()
        return {"matching_lines": [line for line in lines if pattern in line]}

    @offered
    def sort(self, file_name: str) -> Any:
        return {"sorted_content": "\n".join(sorted(self._text(file_name).splitlines()))}

    @offered
    def tail(self, file_name: str, lines: int = 10) -> Any:
        if lines < 0:
            raise Refused("lines must not be negative")
        found = self._text(file_name).splitlines()
        return {"last_lines": "\n".join(found[max(0, len(found) - lines) :])}

    @offered
    def wc(self, file_name: str, mode: str = "l") -> Any:
        text = self._text(file_name)
        if mode not in UNITS:
            raise Refused(f"mode is one of {', '.join(UNITS)}")
        counts = {"l": len(text.splitlines()), "w": len(text.split()), "c": len(text)}
        return {"count": counts[mode], "type": UNITS[mode]}

    @offered
    def diff(self, file_name1: str, file_name2: str) -> Any:
        """Line against line by number, which is what the items' answers quote."""
        pairs = zip_longest(
            self._text(file_name1).splitlines(), self._text(file_name2).splitlines(), fillvalue=""
        )
        return {"diff_lines": "\n".join(f"- {a}\n+ {b}" for a, b in pairs if a != b)}

    @offered
    def du(self, human_readable: bool = False) -> Any:
        size = float(_extent(self._here)[0])
        if not human_readable:
            return {"disk_usage": f"{size:.0f} bytes"}
        units = iter(("B", "KB", "MB"))
        unit = next(units)
        while size >= 1024:
            size, unit = size / 1024, next(units)
        return {"disk_usage": f"{size:.2f} {unit}"}

    @offered
    def find(self, path: str = ".", name: str | None = None) -> Any:
        absolute = path.startswith("/")
        steps = [] if absolute else list(self.data["_path"])
        for step in path.split("/"):
            if step == "..":
                steps = steps[:-1]
            elif step not in ("", "."):
                steps.append(step)
        below = _walk(self._at(steps), path.rstrip("/"))
        return {"matches": [full for full, own in below if name is None or name in own]}

    @offered
    def rm(self, file_name: str) -> Any:
        self._node(file_name)
        del self._here[file_name]
        return {"result": f"{file_name!r} was removed"}

    @offered
    def rmdir(self, dir_name: str) -> Any:
        node = self._node(dir_name)
        if node["type"] != "directory":
            raise Refused(f"{dir_name!r} is no directory")
        if node["contents"]:
            raise Refused(f"{dir_name!r} is not empty")
        del self._here[dir_name]
        return {"result": f"{dir_name!r} was removed"}

    @offered
    def cp(self, source: str, destination: str) -> Any:
        node = self._node(source)
        self._put(self._target(source, destination), node)
        return {"result": f"{source!r} was copied to {destination!r}"}

    @offered
    def mv(self, source: str, destination: str) -> Any:
        node = self._node(source)
        self._put(self._target(source, destination), node)
        del self._here[source]
        return {"result": f"{source!r} was moved to {destination!r}"}

    def _target(self, source: str, destination: str) -> Place:
        """Where a source goes: into a directory of that name, else to that name here."""
        if source == _name(destination):
            raise Refused("source and destination are one")
        here = Place(self._here, destination, len(self.data["_path"]))
        there = self._here.get(destination)
        if there is None:
            return here
        if there["type"] == "directory":
            if source in there["contents"]:
                raise Refused(f"{destination!r} holds a {source!r} already")
            return Place(there["contents"], source, here.depth + 1)
        if self._here[source]["type"] == "directory":
            raise Refused(f"{destination!r} is a file")
        return here


def _name(name: str) -> str:
    """A name of something here; a path is none. Raises Refused."""
    if not name or "/" in name or name in (".", ".."):
        raise Refused(f"{name!r} is no name in this directory; paths are not taken")
    return name


def _walk(contents: Mapping[str, Node], path: str) -> Iterator[tuple[str, str]]:
    """(path, name) of everything below."""
    for name, node in contents.items():
        yield f"{path}/{name}", name
        if node["type"] == "directory":
            yield from _walk(node["contents"], f"{path}/{name}")


def _extent(contents: Mapping[str, Node]) -> tuple[int, int, int]:
    """(characters in all texts below, files and directories, levels)."""
    text, count, depth, level = 0, 0, 0, [contents]
    while level:
        nodes = [node for one in level for node in one.values()]
        text += sum(len(node.get("content", "")) for node in nodes)
        count += len(nodes)
        depth += 1
        level = [node["contents"] for node in nodes if node["type"] == "directory"]
    return text, count, depth
