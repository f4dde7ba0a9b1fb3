"""Where a progress bar is drawn: a terminal, a notebook, or, in a pipe or a log file, one plain line now and then."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import IO, Any, NamedTuple, Protocol

from polyaccel import jobs

REDRAW_S = 0.2
LINE_S = 30.0  # between two lines where nothing can be drawn over
_LEAST_BAR = 8  # columns that the bar itself keeps
_ROWS = 20  # as many bars at once are drawn; tqdm would ask the terminal, and draw none where it says 0
_NOTEBOOK = 110  # columns that fit into a cell


class Field(NamedTuple):
    """One piece of what stands behind the bar. Where the line is too short, the one of the lowest rank goes first."""

    text: str
    rank: int


class View(NamedTuple):
    """What is to be seen of a loop: `done` of `total` steps (None: nobody knows how many), and the fields behind it."""

    description: str
    done: int
    total: int | None
    fields: Sequence[Field]


class Display(Protocol):
    """A place where a bar is drawn, every `every_s` seconds and once more at its end."""

    every_s: float
    may_close_late: bool  # `close` may come when the device is done, from another thread: then the rates are complete

    def draw(self, view: View) -> None:
        """Show the present state."""
        ...

    def close(self, view: View) -> None:
        """Show the last state, and leave it there."""
        ...


def display_for(view: View) -> Display:
    """The place that this process has: standard error, as far as it can be drawn over, or the notebook's cell."""
    if is_notebook():
        return DrawnBar(view, width=None)
    file = sys.stderr
    if file is not None and hasattr(file, "isatty") and file.isatty():
        return DrawnBar(view, width=file)
    return PlainLines()


def print_above(*args: Any, **kwargs: Any) -> None:
    """print; where bars are drawn they make room for it, and are drawn again below."""
    tqdm = sys.modules.get("tqdm")  # not loaded: no bar was ever drawn
    if tqdm is None:
        print(*args, **kwargs)
        return
    with tqdm.tqdm.external_write_mode(file=kwargs.get("file")):
        print(*args, **kwargs)


def tqdm(*args: Any, main_process_only: bool = True, **kwargs: Any) -> Any:
    """tqdm's own bar, on the first process of every host alone: Accelerate's `utils.tqdm`. Raises ValueError for a bool in first place,
    which is where its older versions had `main_process_only`."""
    from tqdm.auto import tqdm as plain

    if args and isinstance(args[0], bool):
        raise ValueError(f"tqdm({args[0]}, ...): write tqdm(iterable, main_process_only={args[0]})")
    engine = jobs.current()
    is_hidden = main_process_only and engine is not None and not engine.topology.is_local_main_process
    return plain(*args, **{**kwargs, "disable": kwargs.get("disable", False) or is_hidden})


def is_notebook() -> bool:
    """Whether the cell of a notebook shows what this process prints."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def counted(view: View) -> str:
    """ "10/22", or "10" where nobody knows how many there are."""
    return f"{view.done}" if view.total is None else f"{view.done}/{view.total}"


def fitting(fields: Sequence[Field], width: int) -> str:
    """The fields in their order, as many of them as `width` columns hold."""
    kept = list(fields)
    while kept and sum(len(field.text) + 2 for field in kept) - 2 > width:
        kept.remove(min(kept, key=lambda field: field.rank))
    return ", ".join(field.text for field in kept)


class PlainLines:
    """One line every LINE_S seconds, and one at the end: for pipes, log files, and the prefixed output of several processes."""

    every_s = LINE_S
    may_close_late = True

    def draw(self, view: View) -> None:
        """Write a line."""
        text = ", ".join([counted(view), *(field.text for field in view.fields)])
        if sys.stderr is not None:  # pythonw and some daemons have none
            print(f"{view.description}: {text}" if view.description else text, file=sys.stderr, flush=True)

    def close(self, view: View) -> None:
        """Write the last line."""
        self.draw(view)


class DrawnBar:
    """tqdm's bar: several of them keep out of each other's way, and it knows notebooks. `width`: the terminal; None: a notebook."""

    every_s = REDRAW_S
    may_close_late = False

    def __init__(self, view: View, width: IO[str] | None) -> None:
        self._terminal = width
        if width is None:
            from tqdm.auto import tqdm
        else:
            from tqdm import tqdm
        # Nothing is left to tqdm's own clock: `draw` says when. A nested bar leaves no trace, the outermost one does.
        self._bar: Any = tqdm(
            total=view.total,
            desc=self._left(view),
            initial=view.done,
            file=width,
            leave=None,
            mininterval=0,
            miniters=1,
            ncols=self._columns(),
            nrows=_ROWS,
            bar_format=self._format(view),
        )

    def draw(self, view: View) -> None:
        """Draw over the last state."""
        bar = self._bar
        bar.n, bar.total, bar.ncols = view.done, view.total, self._columns()
        bar.set_description_str(self._left(view), refresh=False)
        bar.bar_format = self._format(view)
        bar.refresh()

    def close(self, view: View) -> None:
        """Draw the last state, and give the line free."""
        self.draw(view)
        self._bar.close()

    @staticmethod
    def _left(view: View) -> str:
        return f"{view.description}: " if view.description else ""

    def _columns(self) -> int | None:
        """Columns of the terminal, asked every time since windows are resized; 80 where it says 0, as some containers' do."""
        if self._terminal is None:
            return None
        try:
            return os.get_terminal_size(self._terminal.fileno()).columns or 80
        except (OSError, ValueError):
            return 80

    def _format(self, view: View) -> str:
        columns = self._columns() or _NOTEBOOK
        left = self._left(view)
        count = counted(view)
        if view.total is None:
            text = fitting(view.fields, columns - len(left) - len(count) - 3)
            return "{desc}" + _literal(f"{count}, {text}" if text else count)
        used = len(left) + len("100%|| ") + _LEAST_BAR + len(count) + 2
        text = fitting(view.fields, columns - used - 1)
        return "{desc}{percentage:3.0f}%|{bar}| " + _literal(f"{count}, {text}" if text else count)


def _literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


# -- numbers for people ----------------------------------------------------------------------------------------------------


def short(number: float) -> str:
    """Three digits and a unit of thousands: 787, 12.3, 45.6k, 312T."""
    if number != number or number in (float("inf"), float("-inf")):
        return str(number)
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= limit:
            return f"{_digits(number / (1e3 if unit == 'k' else limit))}{unit}"
    return _digits(number)


def _digits(number: float) -> str:
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"


def metric(number: float) -> str:
    """A logged number: four digits, as it is for whole numbers."""
    return str(number) if isinstance(number, int) else f"{number:.4g}"


def memory(used: int, limit: int | None) -> str:
    """Bytes in MiB or GiB, and of how many where that is known."""
    if limit is not None:
        return f"{used / 2**30:.1f}/{limit / 2**30:.0f} GiB"
    return f"{used / 2**30:.1f} GiB" if used >= 2**30 else f"{used / 2**20:.0f} MiB"


def clock(seconds: float) -> str:
    """1:02:03, 2:03, 0:04."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
