"""The public names: sorted, all there, and free until asked for."""

from __future__ import annotations

import tessera


def test_public_names_are_sorted_and_listed_once():
    assert tessera.__all__ == sorted(set(tessera.__all__))


def test_every_public_name_has_a_home_and_no_other_name_has():
    assert set(tessera.__all__) == set(tessera._HOMES)


def test_every_public_name_can_be_had():
    for name in tessera.__all__:
        assert getattr(tessera, name).__name__ == name


def test_dir_lists_the_public_names():
    assert {*tessera.__all__} <= {*dir(tessera)}


def test_version_is_the_installed_one():
    from importlib.metadata import version

    assert tessera.__version__ == version("tessera")
