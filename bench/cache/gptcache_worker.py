"""GPTCache as it sets itself up for similar questions, behind JSON lines; runs in .venv-gptcache.

    python -P gptcache_worker.py FOLDER TEXTS.json VECTORS.npy

One line in, one line out: `{"get": text}` gives `{"answer": … or null, "seconds": …}`, `{"put": text, "answer": …}` and
`{"clear": true}` give `{}`. What differs from its defaults: embeddings are read from VECTORS instead of computed, and
nothing is evicted (its default keeps 1,000 entries). Nothing is installed, and no model is asked.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("gptcache", "faiss-cpu", "sqlalchemy")
NEVER = 10**9


class Looked:
    """An embedding function that looks the vectors up."""

    def __init__(self, texts: Path, vectors: Path) -> None:
        self._vectors = np.load(vectors)  # [N, D]
        self._row = {text: row for row, text in enumerate(json.loads(texts.read_text(encoding="utf-8")))}
        self.dimension: int = self._vectors.shape[1]

    def to_embeddings(self, text: str, **_: Any) -> np.ndarray:
        return self._vectors[self._row[text]]


def main() -> None:
    folder, texts, vectors = map(Path, sys.argv[1:])
    lines, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    forbid_installing()
    from gptcache import Cache
    from gptcache.adapter.api import get, init_similar_cache, put
    from gptcache.manager import manager_factory

    embedding = Looked(texts, vectors)
    manager = manager_factory(
        "sqlite,faiss",
        data_dir=str(folder),
        vector_params={"dimension": embedding.dimension},
        eviction_params={"max_size": NEVER},
    )
    cache = Cache()
    init_similar_cache(cache_obj=cache, embedding=embedding, data_manager=manager)

    def answered(request: dict[str, Any]) -> dict[str, Any]:
        if "get" in request:
            begun = time.perf_counter()
            answer = get(request["get"], cache_obj=cache)
            return {"answer": answer, "seconds": time.perf_counter() - begun}
        if "put" in request:
            put(request["put"], request["answer"], cache_obj=cache)
        else:
            forget(manager)
        return {}

    print(json.dumps({name: version(name) for name in PACKAGES}), file=lines, flush=True)
    for line in sys.stdin:
        print(json.dumps(answered(json.loads(line))), file=lines, flush=True)


def forget(manager: Any) -> None:
    """All entries, the way in which it evicts."""
    if ids := manager.s.get_ids(deleted=False):
        manager.eviction_manager.soft_evict(ids)
        manager.eviction_manager.delete()


def forbid_installing() -> None:
    """GPTCache runs pip for what it does not find."""
    from gptcache import utils

    def refuse(package: str, warn: bool = False) -> None:
        raise ModuleNotFoundError(f"{package} is not in .venv-gptcache")

    utils.prompt_install = refuse


if __name__ == "__main__":
    main()
