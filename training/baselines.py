"""What trains in seconds and needs no fine-tuned network: the figures any claim has to be read beside.

The three `..._baselines` fit on training rows, choose the regularisation on validation rows, and return functions from
a Part (of any test set) to predicted categories or to scores (of routing: the higher, the sooner to the strong model).
Frozen embeddings are the caller's; where the training Part has none, those baselines are left out. Without a training
row that has the label there are none at all.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin, clone
from sklearn.dummy import DummyClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from training.apgr import Floats, apgr, has_gap, oracle
from training.rows import Row

ENOUGH = 30  # validation rows to choose by; with fewer the first candidate is taken


@dataclass(frozen=True)
class Part:
    """Rows, and the frozen embedding of each [N, D] when there is one."""

    rows: Sequence[Row]
    embeddings: Floats | None = None

    def where(self, wanted: Callable[[Row], bool]) -> "Part":
        """The `wanted` rows alone."""
        kept = [i for i, row in enumerate(self.rows) if wanted(row)]
        return Part([self.rows[i] for i in kept], None if self.embeddings is None else self.embeddings[kept])


Features = Callable[[Part], Any]  # [N, F], sparse or dense
Predict = Callable[[Part], NDArray[np.str_]]  # the category of each row, [N]
Score = Callable[[Part], Floats]  # [N]
Fitted = TypeVar("Fitted")


def category_baselines(train: Part, validation: Part) -> dict[str, Predict]:
    """Ways to tell the category, by name, fitted on the rows that have one."""
    train, validation = train.where(_has_category), validation.where(_has_category)
    if not train.rows:
        return {}
    known = _categories(train)

    def fitted(features: Features, models: Sequence[ClassifierMixin]) -> Predict:
        inputs = features(train)
        predictions = [_predicts(features, clone(model).fit(inputs, known)) for model in models]
        return _best(predictions, lambda p: float((p(validation) == _categories(validation)).mean()), validation)

    length = make_pipeline(StandardScaler(), LogisticRegression())
    found = {
        "majority class": fitted(_log_length, [DummyClassifier()]),
        "prompt length": fitted(_log_length, [length]),
        "TF-IDF + linear SVM": fitted(_tfidf(train), [LinearSVC(C=c, random_state=0) for c in (1.0, 0.5, 2.0)]),
    }
    if train.embeddings is not None:
        models = [make_pipeline(StandardScaler(), LogisticRegression(C=c, tol=1e-3, max_iter=200)) for c in (0.01, 0.1)]
        found["frozen MiniLM + logistic regression"] = fitted(_embedding, models)
    return found


def complexity_baselines(train: Part, validation: Part) -> dict[str, Score]:
    """Ways to predict the complexity, by name, fitted by least squares on the rows that have one: not calibrated."""
    train, validation = (part.where(lambda row: row.complexity is not None) for part in (train, validation))
    if not train.rows:
        return {}
    wanted = np.array([row.complexity for row in train.rows], dtype=float)
    held = np.array([row.complexity for row in validation.rows], dtype=float)

    def fitted(features: Features) -> Score:
        inputs = features(train)
        scores = [_scores(features, Ridge(alpha, solver="lsqr").fit(inputs, wanted)) for alpha in (1.0, 10.0)]
        return _best(scores, lambda score: -float(np.square(score(validation) - held).mean()), validation)

    found = {"prompt length": _length, "TF-IDF + linear": fitted(_tfidf(train))}
    if train.embeddings is not None:
        found["frozen MiniLM + linear"] = fitted(_embedding)
    return found


def routing_baselines(train: Part, validation: Part, weak: str, strong: str) -> dict[str, Score]:
    """Ways to choose between two models, by name, fitted on the rows both were graded on.

    The linear ones either regress the gain or take P(strong right) - P(weak right) from two logistic regressions,
    whichever has the best APGR on the validation rows. "oracle" knows the grades, "category mean gain" the category.
    """
    train, validation = (
        part.where(lambda row: weak in row.correct and strong in row.correct) for part in (train, validation)
    )
    if not train.rows:
        return {}
    gain = oracle(*grades(train.rows, weak, strong))

    def fitted(features: Features) -> Score:
        inputs, (weak_right, strong_right) = features(train), grades(train.rows, weak, strong)
        scores = [_scores(features, Ridge(a, solver="lsqr").fit(inputs, gain)) for a in (10.0, 1.0, 3.0, 30.0)]
        if all(len(np.unique(right >= 0.5)) == 2 for right in (weak_right, strong_right)):
            for c in (1.0, 0.1):
                model = LogisticRegression(C=c, solver="liblinear", random_state=0)
                scores.append(
                    _differs(
                        features, clone(model).fit(inputs, weak_right >= 0.5), model.fit(inputs, strong_right >= 0.5)
                    )
                )
        return _best(scores, lambda score: _apgr(score, validation, weak, strong), validation)

    found: dict[str, Score] = {"random": lambda part: np.zeros(len(part.rows)), "prompt length": _length}
    found["category mean gain"] = _mean_gain(train, gain)
    found["TF-IDF + linear"] = fitted(_tfidf(train))
    if train.embeddings is not None:
        found["frozen MiniLM + linear"] = fitted(_standardised(train))
    return found | {"oracle": lambda part: oracle(*grades(part.rows, weak, strong))}


def grades(rows: Sequence[Row], weak: str, strong: str) -> tuple[Floats, Floats]:
    """What each model got on `rows`, which both were graded on: two [N]."""
    return tuple(np.array([row.correct[model] for row in rows], dtype=float) for model in (weak, strong))  # type: ignore[return-value]


def _best(candidates: Sequence[Fitted], value: Callable[[Fitted], float], validation: Part) -> Fitted:
    if len(candidates) == 1 or len(validation.rows) < ENOUGH:
        return candidates[0]
    return max(candidates, key=value)


def _apgr(score: Score, part: Part, weak: str, strong: str) -> float:
    """APGR on `part`; 0 for every score when there is no gap to tell them apart by."""
    known = grades(part.rows, weak, strong)
    return apgr(score(part), *known) if has_gap(*known) else 0.0


def _mean_gain(train: Part, gain: Floats) -> Score:
    by_category: defaultdict[str | None, list[float]] = defaultdict(list)
    for row, value in zip(train.rows, gain, strict=True):
        by_category[row.category].append(value)
    means = {category: float(np.mean(values)) for category, values in by_category.items()}
    return lambda part: np.array([means.get(row.category, float(gain.mean())) for row in part.rows])


def _predicts(features: Features, model: Any) -> Predict:
    return lambda part: model.predict(features(part))


def _scores(features: Features, model: Any) -> Score:
    return lambda part: model.predict(features(part))


def _differs(features: Features, weak: Any, strong: Any) -> Score:
    def score(part: Part) -> Floats:
        inputs = features(part)
        return strong.predict_proba(inputs)[:, 1] - weak.predict_proba(inputs)[:, 1]

    return score


def _tfidf(train: Part) -> Features:
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit([row.text for row in train.rows])
    return lambda part: words.transform([row.text for row in part.rows])


def _standardised(train: Part) -> Features:
    scaler = StandardScaler().fit(_embedding(train))
    return lambda part: scaler.transform(_embedding(part))


def _embedding(part: Part) -> Floats:
    if part.embeddings is None:
        raise ValueError("a baseline fitted on embeddings needs those of the rows it is asked about")
    return part.embeddings


def _length(part: Part) -> Floats:
    return np.array([len(row.text) for row in part.rows], dtype=float)


def _log_length(part: Part) -> Floats:
    return np.log1p(_length(part))[:, None]


def _has_category(row: Row) -> bool:
    return row.category is not None


def _categories(part: Part) -> NDArray[np.str_]:
    return np.array([row.category for row in part.rows])
