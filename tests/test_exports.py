"""The public names: all there, and free until asked for."""

from __future__ import annotations

import tessera


def test_every_public_name_can_be_had():
    for name in tessera._HOMES:
        assert getattr(tessera, name).__name__ == name


def test_dir_lists_the_public_names():
    assert {*tessera._HOMES} <= {*dir(tessera)}


def test_version_is_the_installed_one():
    from importlib.metadata import version

    assert tessera.__version__ == version("tessera")
