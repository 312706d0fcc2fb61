"""The folders this package writes: complete ones only, in place by rename, each with a manifest written last.

Nothing here imports torch, so that asking what is missing costs no more than reading the files.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MODELS = ("embedder", "classifier", "verifier")
NEEDED = {
    "embedder": "dimension",
    "classifier": "difficulty",
    "verifier": "verification",
}  # keys that manifests of older forms lack
LEFTOVER = re.compile(r"-(\d+)(-replaced)?$")  # the end of a name that `_beside` made


def digest(*chunks: bytes) -> str:
    """First 16 hex digits of the SHA-256 over `chunks`, one after the other."""
    whole = hashlib.sha256()
    for chunk in chunks:
        whole.update(chunk)
    return whole.hexdigest()[:16]


def fingerprint(folder: Path) -> str:
    """Name the weights in `folder` by their bytes: the network's, then the tokeniser's."""
    return digest((folder / "model.onnx").read_bytes(), (folder / "tokenizer.json").read_bytes())


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of `folder`, or None when there is none: then the folder is not complete."""
    path = folder / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Complete `folder`; always the last file written to it."""
    write_json(folder / "manifest.json", manifest)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write the file `path` at once: a reader sees all of it, or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path, str(os.getpid()))
    beside.write_text(content, encoding="utf-8")
    os.replace(beside, path)


def missing(repository: Path) -> list[str]:
    """The models of `repository` that have no complete weights."""
    return [model for model in MODELS if not _complete(repository / model / "weights", NEEDED[model])]


def _complete(folder: Path, key: str) -> bool:
    if not all((folder / name).exists() for name in ("model.onnx", "tokenizer.json", "manifest.json")):
        return False
    try:
        manifest = read_manifest(folder)
    except json.JSONDecodeError:
        return False
    return isinstance(manifest, dict) and key in manifest and manifest.get("fingerprint") == fingerprint(folder)


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it takes the place of `folder` when the block ends without an error.

    A reader sees the old folder, none for an instant, or the new one; never half of one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent, folder.name)
    built, replaced = _beside(folder, str(os.getpid())), _beside(folder, f"{os.getpid()}-replaced")
    built.mkdir()
    try:
        yield built
        if folder.exists():
            folder.rename(replaced)
        built.rename(folder)
    finally:
        for leftover in (built, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}-{suffix}")


def sweep(parent: Path, name: str = "*") -> None:
    """Remove what killed processes left of folders called `name` in `parent`."""
    for leftover in parent.glob(f".{name}-*"):
        if found := LEFTOVER.search(leftover.name):
            pid = found[1]
            if leftover.is_dir() and (pid == str(os.getpid()) or not Path("/proc", pid).exists()):
                shutil.rmtree(leftover)
