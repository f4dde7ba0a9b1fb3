"""What a check in the processes of an engine has found, stage by stage: one JSON line each, as soon as the stage is over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from polyaccel.errors import PolyaccelError

Report = Callable[[dict[str, Any]], None]


def writer(path: str) -> Report:
    """Appends findings to a file; what a crash leaves behind is what was found before it."""

    def report(finding: dict[str, Any]) -> None:
        with Path(path).open("a", encoding="utf-8") as file:
            print(json.dumps(finding), file=file, flush=True)

    return report


def good(stage: str, words: str) -> dict[str, Any]:
    """A stage that went well."""
    return {"stage": stage, "is_good": True, "words": words}


def bad(stage: str, error: BaseException) -> dict[str, Any]:
    """A stage that raised."""
    if isinstance(error, PolyaccelError):
        return {"stage": stage, "is_good": False, "words": error.message, "cure": error.hint or ""}
    text = str(error).strip()
    words = f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
    cure = "see `polyaccel env`, and reinstall the framework"
    if type(error) is ArithmeticError:  # raised by a check: the numbers are wrong
        words, cure = text, "do not train like this here, and report it with what `polyaccel env` prints"
    return {"stage": stage, "is_good": False, "words": words, "cure": cure}


def nobody(finding: dict[str, Any]) -> None:
    """For processes whose success is told by process 0."""
