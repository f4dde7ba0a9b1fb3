"""Keeps secrets out of everything that is written: a value is hidden for its name, for being such a value elsewhere, or for its shape."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

HIDDEN = "[redacted]"
_SHORTEST = 6  # a shorter text is found in innocent places; it is still hidden under its own name
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_WORDS = frozenset(
    {"secret", "secrets", "password", "passwd", "passphrase", "credential", "credentials", "apikey"}
    | {"authorization", "bearer", "cookie", "cookies"}
)
_SECRET_PAIRS = frozenset(
    {("api", "key"), ("access", "key"), ("private", "key"), ("account", "key"), ("signing", "key"), ("license", "key")}
)
# What services hand out, recognised without a name.
_SHAPES = re.compile(
    r"hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[\w-]{20,}|xox[abprs]-[\w-]{10,}"
    r"|AKIA[A-Z0-9]{16}|wandb_v1_\w{20,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+"
)
_USER_IN_URL = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
_FLAG = re.compile(r"(--?[A-Za-z][\w.-]*)(?:=(.*))?", re.DOTALL)
_ASSIGNMENT = re.compile(r"([A-Za-z_][\w.-]*)=(.+)", re.DOTALL)


def is_secret(name: str, value: Any) -> bool:
    """Whether a value of that name must not be written.

    A "token" is a secret only as a text that could be one: `hf_token`, but neither `max_tokens=512` nor `pad_token="<pad>"`.
    """
    if value is None or value == "" or isinstance(value, (bool, Mapping, list, tuple)):
        return False
    words = [word.lower() for word in _WORDS.findall(name)]
    if _SECRET_WORDS.intersection(words) or _SECRET_PAIRS.intersection(pairwise(words)):
        return True
    if words[-1:] == ["token"] and isinstance(value, str):
        return len(value) >= 8 and not re.fullmatch(r"\W.*\W|.*\s.*", value, re.DOTALL)
    return False


class Redaction:
    """Hides secrets in texts and nested values. Secrets that it meets under a telling name are hidden everywhere from then on."""

    def __init__(self, environment: Mapping[str, str] = {}) -> None:
        self._values: list[str] = []
        self.learn(value for name, value in environment.items() if is_secret(name, value))

    def learn(self, values: Iterable[str]) -> None:
        """Hide these texts wherever they appear."""
        known = {*self._values, *(value for value in values if len(value) >= _SHORTEST)}
        self._values = sorted(known, key=len, reverse=True)  # a secret inside another one must not leave its rest

    def text(self, text: str) -> str:
        """The text without known secrets, well-known shapes of tokens, and user:password in addresses."""
        for secret in self._values:
            if secret in text:
                text = text.replace(secret, HIDDEN)
        return _USER_IN_URL.sub(HIDDEN, _SHAPES.sub(HIDDEN, text))

    def tree(self, value: Any, name: str = "") -> Any:
        """A nested value with secrets hidden, by the name of each part and by its text."""
        self._learn_from(value, name)
        return self._hide(value, name)

    def values(self, value: Any) -> Any:
        """A nested value with secrets hidden by their text alone: for metrics, whose names are the script's own words."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.values(item) for key, item in value.items()}
        return [self.values(item) for item in value] if isinstance(value, (list, tuple)) else value

    def arguments(self, argv: Iterable[str]) -> list[str]:
        """A command line, with the values of `--api-key x`, `--api-key=x` and `api_key=x` hidden."""
        argv = list(argv)
        hidden = list(argv)
        for position, argument in enumerate(argv):
            found = _FLAG.fullmatch(argument) or _ASSIGNMENT.fullmatch(argument)
            if found is None:
                continue
            name, value = found.groups()
            following = argv[position + 1] if position + 1 < len(argv) else ""
            if value is not None and is_secret(name, value):
                self.learn([value])
                hidden[position] = f"{name}={HIDDEN}"
            elif value is None and not following.startswith("-") and is_secret(name, following):
                self.learn([following])
                hidden[position + 1] = HIDDEN
        return [self.text(argument) for argument in hidden]

    def _learn_from(self, value: Any, name: str) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                self._learn_from(item, str(key))
        elif isinstance(value, (list, tuple)):
            for item in value:
                self._learn_from(item, name)
        elif isinstance(value, str):
            self.learn(found.partition(":")[2] for found in _USER_IN_URL.findall(value))
            if is_secret(name, value):
                self.learn([value])

    def _hide(self, value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            return {self.text(str(key)): self._hide(item, str(key)) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._hide(item, name) for item in value]
        if is_secret(name, value):
            return HIDDEN
        return self.text(value) if isinstance(value, str) else value
