"""Where rows come from: files (JSONL, CSV, Parquet), folders of them, data sets of the Hub; all are checked first.

Every format has the same fields, those of Row, and each may go by one of the names in NAMES. `correct` may also be JSON
in a string, or columns `correct.<model>`.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.rows import SPLITS, BadRows, Row, brief, parse, tenth

if TYPE_CHECKING:
    from datasets import Dataset

NAMES = {
    "text": ("text", "prompt", "question"),
    "category": ("category", "label", "intent"),
    **{name: (name,) for name in ("complexity", "correct", "template", "kind", "split", "source")},
}
SPLIT_NAMES = {
    **{name: name for name in SPLITS},
    **dict.fromkeys(("training",), "train"),
    **dict.fromkeys(("val", "valid", "dev", "development", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("testing",), "test"),
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.+ -]+)?", re.ASCII)

Names = Mapping[str, Sequence[str]]  # by field: what it may be called, in order of preference
Found = tuple[int, dict[str, Any] | str]  # line, and the fields found there or what is wrong; line 0 is all of the file


def read(sources: Sequence[str], columns: Mapping[str, str] | None = None) -> list[Row]:
    """Rows of all `sources`: paths of files or folders, or Hub ids, `owner/name` or `owner/name:config`.

    `columns` says by what name a field goes when NAMES does not, as in {"text": "utterance"}. Raises BadRows with every
    problem as `path:line: reason`; lines count from 1, those of a Parquet file or a Hub split are its rows.
    """
    if unknown := sorted(set(columns or {}) - set(NAMES)):
        raise BadRows([f"no such field: {name}; there are {', '.join(NAMES)}" for name in unknown])
    names = NAMES | {field: (column,) for field, column in (columns or {}).items()}
    rows: list[Row] = []
    problems: list[str] = []
    for source in sources:
        try:
            rows += _third_split(_read(source, names))
        except BadRows as error:
            problems += error.problems
    if problems:
        raise BadRows(problems)
    return rows


def _read(source: str, names: Names) -> list[Row]:
    path = Path(source)
    rows: list[Row] = []
    problems: list[str] = []
    for place, stem, found in _files(path, names) if path.exists() else _hub(source, names):
        for line, record in found:
            row = record if isinstance(record, str) else parse(_fields(record, names), stem)
            if isinstance(row, Row):
                rows.append(row)
            else:
                problems.append(f"{place}:{line}: {row}" if line else f"{place}: {row}")
    if problems or not rows:
        raise BadRows(problems or [f"{source}: holds no rows"])
    return rows


def _third_split(rows: list[Row]) -> list[Row]:
    """`rows` of one source; when all name a split but only two are named, `train` gives a tenth for the third."""
    named = {row.split for row in rows}
    if None in named or "train" not in named or len(named) != 2:
        return rows
    lacking = "validation" if "test" in named else "test"
    part = 7 + SPLITS.index(lacking)
    return [
        replace(row, split=lacking) if row.split == "train" and tenth(row.template or row.text) == part else row
        for row in rows
    ]


def _fields(record: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """`record` with its fields under their own names."""
    fields: dict[str, Any] = {}
    for field, known in names.items():
        for name in known:
            if record.get(name) not in (None, ""):
                fields[field] = record[name]
                break
    if isinstance(correct := fields.get("correct"), str):
        fields["correct"] = _object(correct)
    grades = {name[8:]: grade for name, grade in record.items() if name.startswith("correct.")}
    if grades and isinstance(correct := fields.get("correct", {}), dict):
        fields["correct"] = grades | correct
    if isinstance(part := fields.get("split"), str):
        fields["split"] = SPLIT_NAMES.get(part.strip().lower(), part)
    return fields


def _object(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # which is then said not to be an object


def _files(path: Path, names: Names) -> Iterator[tuple[Path, str, Iterator[Found]]]:
    """Each file of rows at `path`, in order of name: where it is, what its rows are called, what it holds."""
    files = [path]
    if path.is_dir() and not (files := [file for file in sorted(path.iterdir()) if _suffix(file)]):
        raise BadRows([f"{path}: the folder holds no file of rows ({', '.join(READERS)})"])
    for file in files:
        name = path.name if path.is_dir() else file.name[: len(file.name) - len(_suffix(file))]
        yield file, name, _found(file, names)


def _found(file: Path, names: Names) -> Iterator[Found]:
    try:
        yield from READERS[_suffix(file) or ".jsonl"](file, names)
    except (OSError, EOFError, zlib.error, ValueError) as error:  # what gzip, the decoder and pyarrow raise
        yield 0, f"cannot be read: {error}"


def _suffix(file: Path) -> str:
    return next((suffix for suffix in READERS if file.name.lower().endswith(suffix)), "")


def _jsonl(file: Path, names: Names) -> Iterator[Found]:
    content = gzip.decompress(file.read_bytes()) if file.name.lower().endswith(".gz") else file.read_bytes()
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if line.strip():
            yield number, _json(line)


def _json(line: bytes) -> dict[str, Any] | str:
    """The object on `line`, or what is wrong with it."""
    try:
        found = json.loads(line.decode())
    except UnicodeDecodeError:
        return f"not UTF-8: {brief(line)}"
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg}): {brief(line.decode())}"
    except (ValueError, RecursionError) as error:
        return f"not JSON that can be read ({error}): {brief(line.decode())}"
    return found if isinstance(found, dict) else f"not an object: {brief(found)}"


def _csv(file: Path, names: Names) -> Iterator[Found]:
    """The rows below the header; fields are parted by comma, semicolon or tab, whichever the header has most of."""
    content = file.read_bytes().decode("utf-8-sig")
    header = content.partition("\n")[0]
    csv.field_size_limit(2**31 - 1)  # else a long field would be a fault of the file, not of its row
    table = csv.DictReader(io.StringIO(content, newline=""), delimiter=max(",;\t", key=header.count), strict=True)
    try:
        columns = table.fieldnames or ()
        if problem := _lacking(columns, names):
            yield 1, problem
            return
        numbers = [name for name in columns if name in names["complexity"] or name.startswith("correct.")]
        for record in table:
            if None in record:
                yield table.line_num, "more fields than the header has"
            else:
                yield table.line_num, record | {name: _number(record[name]) for name in numbers}
    except csv.Error as error:
        yield table.line_num, f"not CSV ({error})"


def _number(text: str | None) -> float | str | None:
    """What a field of a CSV file says, as a number where it is one."""
    said = (text or "").strip().lower()
    if said in ("", "true", "false"):
        return {"true": 1.0, "false": 0.0}.get(said)
    try:
        return float(said)
    except ValueError:
        return text


def _parquet(file: Path, names: Names) -> Iterator[Found]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as table:
        schema = table.schema_arrow
        written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))  # by the library `datasets`
        features: dict[str, Any] = written.get("info", {}).get("features", {})
        labels = {name: feature for name, feature in features.items() if isinstance(feature, dict)}
        classes = {name: label["names"] for name, label in labels.items() if label.get("_type") == "ClassLabel"}
        batches = table.iter_batches(columns=_wanted(schema.names, names))
        yield from _table(schema.names, batches, classes, names)


def _hub(source: str, names: Names) -> Iterator[tuple[str, str, Iterator[Found]]]:
    """Each split of a data set of the Hub: what to call it, the data set's id, what it holds."""
    if not HUB_ID.fullmatch(source) or _suffix(Path(source)):
        raise BadRows([f"{source}: no such file or folder"])
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, _, config = source.partition(":")
    try:
        splits = load_dataset(name, config or None)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise BadRows([f"{source}: no such file or folder, and not to be had from the Hub: {error}"]) from error
    for said, part in splits.items():
        split = SPLIT_NAMES.get(said.lower()) if len(splits) > 1 else None  # a single split is parted like a file
        yield f"{source}/{said}", name, _hub_split(part, split, names)


def _hub_split(part: "Dataset", split: str | None, names: Names) -> Iterator[Found]:
    """The rows of `part`, whose split is `split` unless they say otherwise."""
    classes = {name: feature.names for name, feature in part.features.items() if hasattr(feature, "names")}
    known = part.select_columns(_wanted(part.column_names, names)).with_format("arrow")
    for number, record in _table(part.column_names, known.iter(1000), classes, names):
        yield number, record if isinstance(record, str) else {"split": split} | record


def _table(
    header: Sequence[str], batches: Iterable[Any], classes: Mapping[str, Sequence[str]], names: Names
) -> Iterator[Found]:
    """The records of `batches`, tables of Arrow; numbers of classes are replaced by their names."""
    if problem := _lacking(header, names):
        yield 0, problem
        return
    records = (record for batch in batches for record in batch.to_pylist(maps_as_pydicts="strict"))
    for number, record in enumerate(records, start=1):
        for column, known in classes.items():
            if isinstance(label := record.get(column), int):
                record[column] = known[label] if 0 <= label < len(known) else None
        yield number, record


def _wanted(header: Sequence[str], names: Names) -> list[str]:
    known = {name for aliases in names.values() for name in aliases}
    return [name for name in header if name in known or name.startswith("correct.")]


def _lacking(header: Sequence[str], names: Names) -> str | None:
    """What keeps every row of a table with this `header` from being one."""
    columns = f"its columns are {', '.join(header)}"
    if not set(names["text"]) & set(header):
        return f"no column {' or '.join(names['text'])}; {columns}"
    labels = [*names["category"], *names["complexity"], *names["correct"]]
    if not set(labels) & set(header) and not any(name.startswith("correct.") for name in header):
        return f"no column {' or '.join(labels)}; {columns}"
    return None


READERS: dict[str, Callable[[Path, Names], Iterator[Found]]] = {
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
