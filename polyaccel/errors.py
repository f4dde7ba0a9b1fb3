"""Every exception that polyaccel raises on purpose.

PolyaccelError
├── ConfigError             a value of the configuration is unknown or impossible
├── PlanError               the configuration does not fit the devices that are here
├── BackendNotFoundError    no backend of that name
├── BackendUnavailableError the backend exists, but what it needs is not installed or not here
├── UnsupportedError        the chosen backend cannot do this; the hint names the alternative
├── PrepareError            an object cannot be prepared or captured as it is
├── CheckpointError         a checkpoint cannot be written or read
├── CollectiveError         processes came to different collectives, with arrays that do not fit, or not at all
├── LaunchError             processes could not be started or could not find each other
├── NoBatchSizeError        not even one sample fits into memory
├── NotStartedError         something that needs an Accelerator was used before there was one
└── TrackerError            a tracker cannot be used

Each says the user's own name and value, why it cannot be, and after `hint:` the way out. Where Accelerate raises a built-in exception
for the same thing, it is a base of ours: a script that catches it goes on doing so. Exceptions of the frameworks pass
through untouched, with `add_note` where there is something to add.
"""

from __future__ import annotations

from collections.abc import Iterable


class PolyaccelError(Exception):
    """The base of all of them: `message` says what and why, `hint` says what to do next."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[type[PolyaccelError], tuple[str, str | None]]:
        return type(self), (self.message, self.hint)  # crosses process boundaries with its hint


class ConfigError(PolyaccelError, ValueError):
    """A value of the configuration is unknown or impossible. A ValueError too, as Accelerate's is."""


class PlanError(PolyaccelError):
    """The configuration does not fit the devices that are here."""


class BackendNotFoundError(PolyaccelError):
    """No installed backend has that name."""


class BackendUnavailableError(PolyaccelError):
    """The backend exists, but what it needs is not installed or not here."""


class UnsupportedError(PolyaccelError):
    """The chosen backend cannot do this."""


class PrepareError(PolyaccelError, ValueError, RuntimeError):
    """An object cannot be prepared or captured as it is."""


class CheckpointError(PolyaccelError, ValueError, RuntimeError):
    """A checkpoint cannot be written or read."""


class CollectiveError(PolyaccelError):
    """The processes of a job came to different collectives, with arrays that do not fit together, or some of them not at all."""


class LaunchError(PolyaccelError, RuntimeError):
    """Processes could not be started or could not find each other."""


class NoBatchSizeError(PolyaccelError, RuntimeError):
    """Not even one sample fits into memory."""


class NotStartedError(PolyaccelError, RuntimeError, ValueError):
    """Something that needs an Accelerator was used before there was one. Accelerate raises one or the other of the two bases."""


class TrackerError(PolyaccelError, ValueError):
    """A tracker cannot be used."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the known name closest to `name`, else the list of all known names."""
    import difflib  # only where something is wrong: it costs more than the rest of this file

    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names) or 'none'}"
