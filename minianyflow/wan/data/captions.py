"""The captions file: which clips there are, and the text of each."""

import csv
import json
import os
from pathlib import Path
from typing import NamedTuple

from minianyflow.support.errors import InputError
from minianyflow.support.files import regular

MARK = "\ufeff"  # of byte order: files that were put one behind the other have it inside, too


class Clip(NamedTuple):
    """A line of the captions file."""

    file: str
    caption: str


def read_captions(file: str | Path, limit: int | None = None) -> list[Clip]:
    """The clips that a captions file names; at most `limit` of them.

    file: jsonl of {"file": ..., "caption": ...}, or csv with the columns file and caption; other columns are ignored.
    Raises InputError, with the line, for another form and for a video that comes twice.
    """
    path = regular(file)
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit}; expected at least 1")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = (line.replace(MARK, "") for line in file)
            rows = list(_csv_rows(path, lines) if path.suffix.lower() == ".csv" else _jsonl_rows(path, lines))
    except InputError:
        raise
    except (OSError, ValueError, csv.Error) as problem:
        raise InputError(f"captions {path} cannot be read ({problem}); expected jsonl or csv in UTF-8") from None
    first_lines, clips = {}, []
    for number, row in rows:
        name, caption = (row.get(column) for column in ("file", "caption"))
        if not isinstance(name, str) or not isinstance(caption, str) or not name:
            columns = ", ".join(map(repr, row)) or "nothing"
            raise InputError(f"line {number} of {path} has {columns}; expected texts named file and caption")
        name = os.path.normpath(name)
        if os.path.isabs(name) or "\0" in name or Path(name).parts[:1] in ((), ("..",)):
            raise InputError(f"{name} in line {number} of {path} is outside --videos; expected a file inside")
        if name in first_lines:
            raise InputError(f"{name} is in lines {first_lines[name]} and {number} of {path}; expected each file once")
        first_lines[name] = number
        clips.append(Clip(name, caption.strip()))
    if not clips:
        raise InputError(f"no clips in {path}; expected one line per clip, with file and caption")
    return clips[:limit]


def is_empty(text: str) -> bool:
    """Whether there is nothing to see in a text: its letters may be of width 0."""
    return not any(letter.isprintable() for letter in text.replace(" ", ""))


def _csv_rows(path, lines):
    reader, start = csv.DictReader(lines, strict=True), 2
    expected = "expected quotation marks round a caption with commas, and each doubled inside"
    try:
        names = reader.fieldnames or ()
        if not {"file", "caption"} <= {*names}:
            found = ", ".join(map(repr, names)) or "nothing"
            raise InputError(
                f"line 1 of {path} has {found}; expected the columns file and caption, with a comma between"
            )
        if twice := {name for name in names if names.count(name) > 1}:
            raise InputError(f"{path} has the column {min(twice)!r} more than once; expected one caption per file")
        for row in reader:
            if None in row:
                raise InputError(f"line {reader.line_num} of {path} has more fields than columns; {expected}")
            yield reader.line_num, row
            start = reader.line_num + 1
    except csv.Error as problem:
        raise InputError(f"the row that starts in line {start} of {path} is broken ({problem}); {expected}") from None


def _jsonl_rows(path, lines):
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line, object_pairs_hook=_once)
                if not isinstance(row, dict):
                    raise TypeError(f"a {type(row).__name__}")
                json.dumps(row, ensure_ascii=False).encode()  # a text that was cut to a length may end in half an emoji
            except (ValueError, TypeError) as problem:
                expected = 'expected {"file": ..., "caption": ...}; for a csv name the file .csv'
                raise InputError(f"line {number} of {path} is not a JSON object ({problem}); {expected}") from None
            yield number, row


def _once(pairs):
    """A JSON object. ValueError for a name that comes twice: json would keep its last value alone."""
    if len(row := dict(pairs)) < len(pairs):
        raise ValueError(f"a name comes twice among {', '.join(name for name, _ in pairs)}")
    return row
