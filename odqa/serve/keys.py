"""API keys: who may ask. On disk is the sha256 of each key and whose it is, never a key.

    keys.json    {"keys": [{"user": "alice", "sha256": "...", "made": "2026-11-24"}]}

A key is 256 random bits, so a fast hash without salt cannot be turned around; it is shown once, when it is made. The
file is read again when it has changed: keys can be made and revoked while a server runs.
"""

import hashlib
import json
import re
import secrets
import time
from pathlib import Path
from typing import Any

from odqa.artifacts import save_file
from odqa.errors import DataError

FILE = "keys.json"
LOCAL = "local"
"""The user of a server without keys."""
_PREFIX = "odqa-"
NAME = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,62}[a-z0-9])?")
"""Names of users and artifacts: parts of paths and of model names on any system."""


class Keys:
    """The keys of a server's folder. No file: no keys, and everybody is the user "local"."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / FILE
        self._stamp: tuple[int, int] | None = None
        self._users: dict[str, str] = {}

    @property
    def are_needed(self) -> bool:
        return self.file.is_file()

    def user_of(self, key: str) -> str | None:
        """Whose key it is; None: nobody's."""
        return self._load().get(_hash(key))

    def make(self, user: str) -> str:
        """A new key for a user, beside those they have. Raises DataError for a name that cannot be one."""
        if not NAME.fullmatch(user) or user == LOCAL:
            raise DataError(
                f"user {user!r}: expected 1 to 64 of a-z, 0-9, - and _, which begin and end with a letter or digit"
                f"{', other than local' if user == LOCAL else ''}."
            )
        key = _PREFIX + secrets.token_urlsafe(32)
        self._save([*self._records(), {"user": user, "sha256": _hash(key), "made": time.strftime("%Y-%m-%d")}])
        return key

    def revoke(self, user: str) -> int:
        """Take all keys of a user away; how many they had. Raises DataError for a user without any."""
        records = self._records()
        left = [record for record in records if record["user"] != user]
        if len(left) == len(records):
            known = sorted({record["user"] for record in records})
            raise DataError(
                f"user {user!r} has no key in {self.file}; there are keys of {', '.join(known) or 'nobody'}."
            )
        self._save(left)
        return len(records) - len(left)

    def _load(self) -> dict[str, str]:
        try:
            stat = self.file.stat()
        except FileNotFoundError:
            self._stamp, self._users = None, {}
            return self._users
        stamp = stat.st_mtime_ns, stat.st_ino
        if stamp != self._stamp:
            self._users = {record["sha256"]: record["user"] for record in self._records()}
            self._stamp = stamp
        return self._users

    def _records(self) -> list[dict[str, Any]]:
        if not self.file.is_file():
            return []
        try:
            records = json.loads(self.file.read_text(encoding="utf-8"))["keys"]
            if all(isinstance(record["user"], str) and isinstance(record["sha256"], str) for record in records):
                return list(records)
        except (ValueError, KeyError, TypeError):
            pass
        raise DataError(
            f'{self.file}: expected {{"keys": [{{"user", "sha256", "made"}}]}}. Restore it or make new keys.'
        )

    def _save(self, records: list[dict[str, Any]]) -> None:
        save_file(self.file, json.dumps({"keys": records}, indent=1) + "\n")
        self.file.chmod(0o600)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
