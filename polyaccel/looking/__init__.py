"""Looking at a training while it runs: progress bars that know its speed, and traces of what host and devices do."""

from polyaccel.looking.instruments import instruments
from polyaccel.looking.meter import settle
from polyaccel.looking.profiling import Profile, profiling
from polyaccel.looking.progress import Progress

__all__ = ["Profile", "Progress", "instruments", "profiling", "settle"]
