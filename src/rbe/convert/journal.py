"""The work folder of a long run: every finished piece on disk with its checksum, so that a killed run goes on.

journal.jsonl    first line: fingerprint of everything that decides the result; then one line a finished piece
pieces/          one safetensors file a piece
out/             the result while it is put together
"""

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rbe import shards
from rbe.errors import CorruptFile
from rbe.shards import Stored

_KIND = "rbe journal 1"


class Journal:
    """Finished pieces of one run, found again by the next one.

    Attributes:
        folder: the work folder.
        done: by name, what `add` was given.
        remark: why earlier work was not used; empty where it was, or where there was none.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.done: dict[str, dict[str, Any]] = {}
        self.remark = ""
        self._path = folder / "journal.jsonl"
        header = {"journal": _KIND, "fingerprint": fingerprint}
        lines = self._read()
        if lines and lines[0] == header:
            (folder / "pieces").mkdir(exist_ok=True)
            self._recover(lines[1:])
        else:
            if lines:
                self.remark = (
                    f"{folder} holds unfinished work on another source, another plan or other settings; started anew"
                )
            self.clear()
            (folder / "pieces").mkdir()
            shards.write_atomic(self._path, self._line(header))

    def _read(self) -> list[dict[str, Any]]:
        """The complete lines; a line that was being written when the run was killed does not count."""
        if not self._path.is_file():
            return []
        found: list[dict[str, Any]] = []
        for line in self._path.read_bytes().splitlines(keepends=True):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not line.endswith(b"\n") or not isinstance(value, dict):
                break
            found.append(value)
        return found or [{}]

    def _recover(self, lines: list[dict[str, Any]]) -> None:
        for record in lines:
            with contextlib.suppress(KeyError, TypeError, OSError):
                if shards.file_digest(self._piece(record["number"])) == record["sha256"]:
                    self.done[record["name"]] = record
        # What a kill left after the last complete line must not run into the next one.
        whole = [{"journal": _KIND, "fingerprint": self._read()[0]["fingerprint"]}, *self.done.values()]
        shards.write_atomic(self._path, b"".join(self._line(record) for record in whole))

    @staticmethod
    def _line(record: Mapping[str, Any]) -> bytes:
        return json.dumps(record, separators=(",", ":")).encode() + b"\n"

    def _piece(self, number: int) -> Path:
        return self.folder / "pieces" / f"{int(number):06d}.safetensors"

    def add(self, name: str, number: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Store a finished piece; once this returns it survives anything.

        Args:
            name, number: unique in the run, the same in every run.
            tensors: to be found again by `tensors`.
            record: anything that survives JSON; merged into what `done` holds.
        """
        path = self._piece(number)
        unfinished = path.with_suffix(".writing")
        digest, _ = shards.write(unfinished, [shards.outgoing(key, value) for key, value in tensors.items()], {})
        unfinished.replace(path)
        shards.flush_folder(path.parent)
        line = {**record, "name": name, "number": number, "sha256": digest}
        with self._path.open("ab") as file:
            shards.put(file, self._line(line))
            shards.flush(file)
        self.done[name] = line

    def tensors(self, name: str) -> dict[str, Stored]:
        """The tensors of a finished piece.

        Raises:
            CorruptFile: the piece was changed since.
        """
        path = self._piece(self.done[name]["number"])
        if shards.file_digest(path) != self.done[name]["sha256"]:
            raise CorruptFile(f"{path} ({name}) was changed since it was written; run again")
        return shards.read_header(path)[0]

    def clear(self) -> None:
        """Delete all work."""
        for name in ("journal.jsonl", "pieces", "out"):
            path = self.folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
