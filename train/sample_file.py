"""A JSONL file of samples that survives a kill, with its settings and progress beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from hispec.data.documents import local_rows
from hispec.utils.files import DiskFullError, disk_is_full, write_json
from hispec.utils.schema import STRICT, Schema, read_json, validate
from hispec.utils.settings import differences

FORMAT = 1
_ADVICE = "remove it and its .meta.json, or name another output"


@dataclass
class Progress:
    """The progress of a file."""

    __pydantic_config__ = STRICT

    next: Annotated[int, Field(ge=0)] = 0
    """Number of the next sample; all before it were written or dropped."""
    rows: Annotated[int, Field(ge=0)] = 0
    bytes: Annotated[int, Field(ge=0)] = 0
    """Length of the file with these rows, in bytes."""
    tokens: int = 0
    """Tokens that were decoded, for dropped samples too."""
    seconds: float = 0.0
    dropped: dict[str, int] = field(default_factory=dict)


class Meta(Schema):
    """`OUTPUT.meta.json`."""

    format: int
    made_by: dict[str, Any]
    progress: dict[str, Any]


class SampleFile:
    """Rows in `path`; the settings that made them and the progress in `path`.meta.json.

    A group of rows counts once it is in the meta file, which is replaced as a whole. Rows that a
    killed run wrote of the next group are cut off, and the group is made again, the same.

    Args:
        made_by: everything that the rows depend on.

    Raises:
        ValueError: the file exists and has no meta file, was made with other settings, or was
            changed since.
    """

    def __init__(self, path: Path, made_by: Mapping[str, Any]) -> None:
        self.path = path
        self.meta = path.with_name(path.name + ".meta.json")
        self.made_by = json.loads(json.dumps(made_by))
        self.progress = Progress()
        self.cut = 0
        """Bytes of an unfinished group that a killed run left, which were cut off."""
        if self.meta.exists():
            self._go_on()
        elif path.exists():
            raise ValueError(
                f"{path} exists, and no {self.meta.name} says what made it: name another"
            )
        else:
            self._note()
            path.touch()

    def _go_on(self) -> None:
        meta = validate(Meta, read_json(self.meta), self.meta)
        if meta.format != FORMAT:
            raise ValueError(f"{self.meta}: format={meta.format!r} is not possible: {FORMAT}")
        there = meta.made_by
        if changed := differences(there, self.made_by, sorted({*there, *self.made_by})):
            raise ValueError(
                f"{self.path} was begun with other settings ({'; '.join(changed)}); {_ADVICE}"
            )
        self.progress = validate(Progress, meta.progress, f"{self.meta}: progress")
        self._cut_off()

    def _cut_off(self) -> None:
        """Cut off the rows of an unfinished group, and nothing else."""
        whole = self.progress.bytes
        with open(self.path, "ab") as file:
            size = file.tell()
            if size < whole:
                raise ValueError(
                    f"{self.path} has {size} bytes, {self.meta.name} says {whole}: it was changed "
                    f"since; {_ADVICE}"
                )
            for line in self.path.read_bytes()[whole:].split(b"\n")[:-1]:
                if not self._is_of_next_group(line):
                    raise ValueError(
                        f"{self.path} holds rows that this run did not write; {_ADVICE}"
                    )
            self.cut = size - whole
            file.truncate(whole)

    def _is_of_next_group(self, line: bytes) -> bool:
        try:
            return json.loads(line)["provenance"]["index"] >= self.progress.next
        except (ValueError, KeyError, TypeError):
            return False

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows so far.

        Raises:
            ValueError: the file does not hold the rows that were written.
        """
        count = 0
        for _, row in local_rows(self.path):
            count += 1
            yield row
        if count != self.progress.rows:
            raise ValueError(
                f"{self.path} has {count} rows, {self.meta.name} says {self.progress.rows}: it was "
                f"changed since; {_ADVICE}"
            )

    def append(self, rows: list[dict[str, Any]], progress: Progress) -> None:
        """Write the rows of a group one line at a time, then the progress, whose numbers of rows
        and bytes are filled in.

        Raises:
            DiskFullError: they do not fit; the groups before are kept.
        """
        lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
        try:
            with open(self.path, "ab") as file:
                for line in lines:
                    file.write(line)
                    file.flush()
                os.fsync(file.fileno())
                progress.bytes = file.tell()
        except OSError as error:
            if not disk_is_full(error):
                raise
            need = sum(map(len, lines))
            raise DiskFullError(self.path, f"{need:,} bytes more are needed") from error
        progress.rows = self.progress.rows + len(rows)
        self.progress = progress
        self._note()

    def _note(self) -> None:
        write_json(
            self.meta,
            {"format": FORMAT, "made_by": self.made_by, "progress": asdict(self.progress)},
        )
