"""What a person should look at before training on rows: small classes, duplicates, leaks, probable label errors."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import normalize

from training.rows import SPLITS, Row, Splits, labels, normalised

Floats = NDArray[np.float64]
Pair = tuple[int, int]
SMALL = 20  # rows of a category below which it is hardly learnt, and complexity not judged
ONE_SIDED = 0.9  # share of a category's rows on one side of complexity from which the category gives it away
NEAR = 0.8  # Jaccard similarity of two texts' sets of GRAM characters
GRAM = 5
HEAD = 2_000  # characters of a text that are compared
LAGS = 30  # of 47,000 real questions it finds 1,408 pairs, where 1,000 finds 1,410
FOLDS = 5


@dataclass(frozen=True)
class Finding:
    kind: str  # "small class", "duplicate", "contradiction", "near-duplicate", "leak", "dropped", "imbalance", "label"
    message: str  # with excerpts of at most 60 characters
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True)
class OutOfSample:
    """What models that did not train on `rows` say of them."""

    rows: Sequence[Row]  # N; those without a category are passed over
    labels: Sequence[str]  # L, sorted
    probabilities: Floats  # [N, L]


def review(splits: Splits, out_of_sample: OutOfSample | None = None) -> list[Finding]:
    """All findings, of the gravest kind first; those of a kind in order of weight."""
    rows = [*splits.train, *splits.validation, *splits.test]
    parts = np.repeat(np.arange(3), [len(splits.train), len(splits.validation), len(splits.test)])
    found = [*_template_leaks(splits), *_near_duplicates(rows, parts), *_duplicates(rows), *_classes(rows)]
    if splits.dropped:
        said = f"{len(splits.dropped)} rows: their texts, or nearly those, are in a split that is held out further"
        found.append(Finding("dropped", said, tuple(splits.dropped)))
    if out_of_sample:
        found += _label_errors(out_of_sample)
    order = ["leak", "contradiction", "label", "small class", "imbalance", "duplicate", "near-duplicate", "dropped"]
    return sorted(found, key=lambda finding: order.index(finding.kind))


def without_leaks(splits: Splits) -> Splits:
    """`splits` without the rows of train and validation that nearly repeat one that is held out further."""
    parts = (splits.test, splits.validation, splits.train)
    place = {row.text: i for i, part in enumerate(parts) for row in part}  # 0 is held out furthest
    texts = list(place)
    leaks: set[str] = set()
    for members, _ in _groups(near(texts), len(texts)):
        furthest = min(place[texts[i]] for i in members)
        leaks.update(texts[i] for i in members if place[texts[i]] > furthest)
    train, validation = ([row for row in part if row.text not in leaks] for part in (splits.train, splits.validation))
    dropped = [row for part in (splits.train, splits.validation) for row in part if row.text in leaks]
    return Splits(train, validation, splits.test, [*splits.dropped, *dropped])


def out_of_fold(rows: Sequence[Row], embed: Callable[[Sequence[str]], Floats], seed: int) -> OutOfSample:
    """Category probabilities of `rows` by logistic regressions on their embeddings [N, H], each row left out once.

    Rows of one text or template are left out together. Categories with too few of those are left out altogether.
    """
    keys = {row: row.template or normalised(row.text) for row in rows if row.category is not None}
    sizes = Counter(category for category, _ in {(row.category, key) for row, key in keys.items()})
    kept = [row for row in rows if row.category is not None and sizes[row.category] >= FOLDS]
    names = labels(kept)
    probabilities = np.zeros((len(kept), len(names)))
    if len(names) < 2:
        return OutOfSample([], [], np.zeros((0, 0)))
    embeddings, wanted = normalize(embed([row.text for row in kept])), np.array([row.category for row in kept])
    folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    for train, test in folds.split(embeddings, wanted, [keys[row] for row in kept]):
        model = LogisticRegression(C=10, max_iter=500).fit(embeddings[train], wanted[train])
        columns = np.searchsorted(names, model.classes_)
        probabilities[np.ix_(test, columns)] = model.predict_proba(embeddings[test])
    return OutOfSample(kept, names, probabilities)


def summary(findings: Sequence[Finding], shown: int = 5) -> str:
    """Lines for the terminal: each kind, how often, and the first `shown` of them."""
    by_kind: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        by_kind[finding.kind].append(finding)
    lines = [] if findings else ["review: nothing found"]
    for kind, found in by_kind.items():
        lines.append(f"review: {kind}, {len(found)} found")
        lines += [f"  {finding.message}" for finding in found[:shown]]
        lines += [f"  ... and {len(found) - shown} more"] if len(found) > shown else []
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """`findings` for a file."""
    said = [{"kind": f.kind, "message": f.message, "rows": [_brief(row) for row in f.rows]} for f in findings]
    return {"counts": dict(Counter(finding.kind for finding in findings)), "findings": said}


def _brief(row: Row) -> dict[str, Any]:
    return {"source": row.source, "text": _excerpt(row.text), "category": row.category, "complexity": row.complexity}


def _excerpt(text: str) -> str:
    """Text in one line of at most 60 characters, none of which a terminal obeys."""
    line = "".join(character if character.isprintable() else " " for character in text[:200])
    line = " ".join(line.split())
    return line if len(line) <= 60 else f"{line[:57]}..."


def _classes(rows: Sequence[Row]) -> Iterator[Finding]:
    """Categories that are too small, and those which nearly give the complexity away."""
    by_category: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.category is not None:
            by_category[row.category].append(row)
    for category, members in sorted(by_category.items()):
        if len(members) < SMALL:
            yield Finding("small class", f"{category}: {len(members)} rows; {SMALL} or more are needed", tuple(members))
        hard = [row.complexity >= 0.5 for row in members if row.complexity is not None]
        share = sum(hard) / max(len(hard), 1)
        if len(hard) >= SMALL and not 1 - ONE_SIDED < share < ONE_SIDED:
            yield Finding("imbalance", f"{category}: {share:.0%} of {len(hard)} rows have a complexity of 0.5 or more")


def _duplicates(rows: Sequence[Row]) -> Iterator[Finding]:
    """Rows of the same normalised text, and whether their labels agree."""
    by_text: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_text[normalised(row.text)].append(row)
    for same in by_text.values():
        if len(same) > 1:
            hard = {row.complexity >= 0.5 for row in same if row.complexity is not None}
            excerpt = f"{len(same)} times '{_excerpt(same[0].text)}'"
            if len(labels(same)) > 1 or len(hard) > 1:
                said = [*labels(same), *(["both easy and complex"] if len(hard) > 1 else [])]
                yield Finding("contradiction", f"{excerpt}: {', '.join(said)}", tuple(same))
            else:
                yield Finding("duplicate", excerpt, tuple(same))


def _template_leaks(splits: Splits) -> Iterator[Finding]:
    """Templates whose rows name different splits."""
    places: dict[str, dict[str, Row]] = defaultdict(dict)
    for name in SPLITS:
        for row in getattr(splits, name):
            if row.template:
                places[row.template].setdefault(name, row)
    for template, found in places.items():
        if len(found) > 1:
            said = f"template '{_excerpt(template)}' is in {' and '.join(found)}"
            yield Finding("leak", said, tuple(found.values()))


def _near_duplicates(rows: Sequence[Row], parts: NDArray[np.int64]) -> Iterator[Finding]:
    """Groups of similar texts; leaks when they lie in several splits. Rows made from one template may be similar."""
    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        first.setdefault(normalised(row.text), i)
    texts, where = list(first), np.array(list(first.values()), dtype=int)
    similar = {}
    for (a, b), similarity in near(texts).items():
        one, other = where[a], where[b]
        made = rows[one].template is not None and rows[one].template == rows[other].template
        if not (made and parts[one] == parts[other]):
            similar[a, b] = similarity
    for group, highest in _groups(similar, len(texts)):
        members = [int(where[i]) for i in group]
        names = list(dict.fromkeys(SPLITS[parts[i]] for i in members))
        one, other = _excerpt(rows[members[0]].text), _excerpt(rows[members[-1]].text)
        said = f"{len(members)} alike (up to {highest:.2f}) in {' and '.join(names)}: '{one}' / '{other}'"
        yield Finding("leak" if len(names) > 1 else "near-duplicate", said, tuple(rows[i] for i in members))


def near(texts: Sequence[str]) -> dict[Pair, float]:
    """Pairs of distinct `texts` whose sets of GRAM characters have a Jaccard similarity of NEAR or more, and that.

    By prefix filtering (Chaudhuri et al. 2006): such sets share one of the rarest grams of each. Of many texts that
    share one, each is compared with the LAGS after it, which connects them all.
    """
    if not texts:
        return {}
    grams = _grams(texts)  # [N, G], ones
    sizes, frequency = np.diff(grams.indptr), np.bincount(grams.indices)
    row = np.repeat(np.arange(len(texts)), sizes)
    order = np.lexsort((grams.indices, frequency[grams.indices], row))
    rank = np.arange(len(row)) - grams.indptr[row]
    rare = order[(rank <= sizes[row] - np.ceil(NEAR * sizes[row])) & (frequency[grams.indices[order]] > 1)]
    rare = rare[np.lexsort((row[rare], grams.indices[rare]))]
    pairs = []
    for lag in range(1, LAGS + 1):
        same = grams.indices[rare[lag:]] == grams.indices[rare[:-lag]]
        pairs.append(row[rare[:-lag][same]] * len(texts) + row[rare[lag:][same]])
    one, other = np.divmod(np.unique(np.concatenate(pairs)), len(texts))
    alike = np.minimum(sizes[one], sizes[other]) >= NEAR * np.maximum(sizes[one], sizes[other])
    one, other = one[alike], other[alike]
    found: dict[Pair, float] = {}
    for start in range(0, len(one), 50_000):
        a, b = one[start : start + 50_000], other[start : start + 50_000]
        shared = grams[a].multiply(grams[b]).sum(axis=1)
        similarity = shared / (sizes[a] + sizes[b] - shared)
        found |= {(int(a[i]), int(b[i])): float(similarity[i]) for i in np.flatnonzero(similarity >= NEAR)}
    return found


def _grams(texts: Sequence[str]) -> csr_array:
    """Which text holds which GRAM characters, in its first HEAD: ones [N, G]."""
    heads = [text[:HEAD].ljust(GRAM, "\0") for text in texts]
    points = np.frombuffer("".join(heads).encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    lengths = np.array([len(head) for head in heads])
    inside = np.ones(len(points), dtype=bool)
    for back in range(1, GRAM):
        inside[np.cumsum(lengths) - back] = False  # a gram that starts here would run into the next text
    hashed = np.zeros(len(points), dtype=np.uint64)
    for ahead in range(GRAM):
        hashed = hashed * np.uint64(0x9E3779B97F4A7C15) + np.roll(points, -ahead)
    known, gram = np.unique(hashed[inside], return_inverse=True)
    row = np.repeat(np.arange(len(texts)), lengths - GRAM + 1)
    grams = csr_array((np.ones(len(gram), dtype=np.int32), (row, gram)), shape=(len(texts), len(known)))
    grams.sum_duplicates()
    grams.data[:] = 1
    return grams


def _groups(similar: dict[Pair, float], size: int) -> Iterable[tuple[list[int], float]]:
    """The connected groups of `similar` pairs, and each one's highest similarity; most similar first."""
    pairs = np.array(list(similar), dtype=int).reshape(-1, 2)
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(size, size))
    _, group = connected_components(graph, directed=False)
    members: dict[int, set[int]] = defaultdict(set)
    highest: dict[int, float] = defaultdict(float)
    for (a, b), similarity in similar.items():
        members[group[a]] |= {a, b}
        highest[group[a]] = max(highest[group[a]], similarity)
    return sorted(((sorted(members[g]), highest[g]) for g in members), key=lambda found: -found[1])


def _label_errors(given: OutOfSample) -> list[Finding]:
    """Rows that are confidently of another category than theirs (Northcutt et al. 2021, confident learning).

    A category's threshold is its mean probability over the rows labelled with it; of the categories whose threshold a
    row reaches, the most probable is the one it is confidently of.
    """
    index = {label: i for i, label in enumerate(given.labels)}
    known = [i for i, row in enumerate(given.rows) if row.category in index]
    if not known:
        return []
    p, label = given.probabilities[known], np.array([index[str(given.rows[i].category)] for i in known])
    thresholds = np.array([p[label == j, j].mean() if (label == j).any() else np.inf for j in range(len(index))])
    confident = np.where(p >= thresholds, p, -1.0)
    better = confident.argmax(1)
    gain = p[np.arange(len(p)), better] - p[np.arange(len(p)), label]
    wrong = np.flatnonzero((confident.max(1) >= 0) & (better != label))
    found = []
    for i in wrong[np.argsort(-gain[wrong], kind="stable")]:
        row, other = given.rows[known[i]], given.labels[better[i]]
        said = f"'{_excerpt(row.text)}' is labelled {row.category}, {other} at {p[i, better[i]]:.2f}"
        found.append(Finding("label", said, (row,)))
    return found
