"""Answers of a judge, kept in a file: for evaluations that run again, and for the same questions about one image."""

import sqlite3
from pathlib import Path
from threading import Lock


class AnswerCache:
    """
    Scores by key in a sqlite file. Several processes may share it.

    A cache that fails later (a full disk, a locked file) is one that knows nothing: it never ends a training.

    Args:
        path: of the file, created where there is none.

    Raises:
        ValueError: if the file can't be opened or is something else.
    """

    def __init__(self, path: str | Path):
        self._lock = Lock()
        try:
            self._database = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")  # an answer lost with the power can be asked again
            self._database.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, score REAL NOT NULL)")
        except sqlite3.Error as error:
            raise ValueError(
                f"cache={str(path)!r} can't be used: {error}. Name a file that is new, or a cache of a judge."
            ) from error

    def get(self, key: str) -> float | None:
        try:
            with self._lock:
                row = self._database.execute("SELECT score FROM answers WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error:
            return None
        return None if row is None else row[0]

    def put(self, key: str, score: float) -> None:
        try:
            with self._lock:
                self._database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, score))
        except sqlite3.Error:
            pass

    def close(self) -> None:
        self._database.close()
