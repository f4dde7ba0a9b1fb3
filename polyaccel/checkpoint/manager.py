"""The checkpoints of one Accelerator: where the next one goes, who writes it, and which one is loaded.

What all processes must do alike is agreed on the main thread, before anything is written or changed; a failure of one is raised on all.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

from polyaccel.checkpoint.background import Writer
from polyaccel.checkpoint.collect import collect
from polyaccel.checkpoint.lock import Lock, folder_holder, lock_folder
from polyaccel.checkpoint.names import MANIFEST, checkpoint_name, checkpoint_number
from polyaccel.checkpoint.newest import newest_checkpoint, next_number, numbered
from polyaccel.checkpoint.read import Saved, open_checkpoint
from polyaccel.checkpoint.restore import check, restore
from polyaccel.checkpoint.run import Run, check_registrable
from polyaccel.checkpoint.storage import is_url, open_folder
from polyaccel.checkpoint.sweep import enforce_limit, sweep
from polyaccel.checkpoint.write import abandon, begin_checkpoint, require_shared, work_folder, write_checkpoint
from polyaccel.config.project import ProjectConfiguration
from polyaccel.errors import CheckpointError, PolyaccelError

log = logging.getLogger("polyaccel.checkpoint")
Location = str | PathLike[str]
Hook = Callable[..., Any]


class RemovableHandle:
    """What a register_..._hook returns: `remove()` takes the hook back. A context manager that does so at its end."""

    def __init__(self, hooks: OrderedDict[int, Hook], key: int) -> None:
        self._hooks = hooks
        self._key = key

    def remove(self) -> None:
        """Take the hook back; nothing where that was done before."""
        self._hooks.pop(self._key, None)

    def __enter__(self) -> RemovableHandle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


@dataclass(frozen=True, slots=True)
class Job:
    """What the manager asks of the live job, beside the run itself.

    `share(value)` is process 0's value on all processes, `gather(value)` the values of all in process order: every process calls them.
    `facts()` describe the run for people; `weights(part)` is a model's state_dict, for hooks; `completed(path)` hears of every checkpoint
    that is whole, on the main process, possibly on another thread.
    """

    run: Callable[[tuple[Any, ...]], Run]
    share: Callable[[Any], Any]
    gather: Callable[[Any], list[Any]]
    facts: Callable[[], Mapping[str, Any]]
    weights: Callable[[Any], Any]
    completed: Callable[[str], None]


class Manager:
    """See the module. `process_index` and `num_processes` are this process's place in the job."""

    def __init__(self, project: ProjectConfiguration, job: Job, *, process_index: int, num_processes: int) -> None:
        self.registered: list[Any] = []
        self._project = project
        self._job = job
        self._process_index = process_index
        self._num_processes = num_processes
        self._writer = Writer()
        self._lock: Lock | None = None
        self._seen: set[str] = set()  # folders in which every process has seen what the main process has made
        self._save_hooks: OrderedDict[int, Hook] = OrderedDict()
        self._load_hooks: OrderedDict[int, Hook] = OrderedDict()
        self._num_hooks = 0

    # -- what takes part -----------------------------------------------------------------------------------------------

    def register(self, objects: tuple[Any, ...]) -> None:
        """Save these with the rest, in this order. Raises CheckpointError for those without a state."""
        check_registrable(objects)
        self.registered.extend([one for one in objects if not any(one is other for other in self.registered)])

    def add_save_hook(self, hook: Hook) -> RemovableHandle:
        """`hook(models, weights, folder)` runs before every save."""
        return self._add(self._save_hooks, hook)

    def add_load_hook(self, hook: Hook) -> RemovableHandle:
        """`hook(models, folder)` runs before every load."""
        return self._add(self._load_hooks, hook)

    def _add(self, hooks: OrderedDict[int, Hook], hook: Hook) -> RemovableHandle:
        self._num_hooks += 1
        hooks[self._num_hooks] = hook
        return RemovableHandle(hooks, self._num_hooks)

    # -- out -----------------------------------------------------------------------------------------------------------

    def save(self, output_dir: Location | None, *, blocking: bool) -> str:
        """Copy everything that the run remembers, write it in the background, and return where it will be. Every process calls it."""
        self._agreed(self._writer.wait)
        is_automatic = output_dir is None
        target, attempt = self._begin(output_dir)
        run = self._job.run(tuple(self.registered))
        iteration = self._project.iteration + is_automatic

        def read() -> Any:
            # A thread of one process that finds it out later can tell nobody: they would meet in that very folder.
            if os.path.dirname(target) not in self._seen:
                require_shared(target, attempt)
            left_out = self._run_save_hooks(run, work_folder(target, attempt))
            return collect(run, iteration=iteration, left_out=left_out)

        try:
            contents = self._agreed(read)
        except BaseException:
            if self._is_main:
                abandon(target, attempt)
            raise
        self._seen.add(os.path.dirname(target))
        facts = dict(self._job.facts())

        def write() -> None:
            write_checkpoint(
                target,
                contents,
                attempt=attempt,
                process_index=self._process_index,
                num_processes=self._num_processes,
                facts=facts,
                replace=not is_automatic and not is_url(target),
            )
            if self._is_main:
                self._job.completed(target)
                if is_automatic and self._project.total_limit is not None:
                    enforce_limit(self._folder(), self._project.total_limit)

        self._writer.submit(write)
        self._project.iteration = iteration
        if blocking:
            self._agreed(self._writer.wait)
        return target

    def _begin(self, output_dir: Location | None) -> tuple[str, str]:
        """The place of the checkpoint, claimed by the main process, and the attempt that all write."""

        def claim() -> tuple[str, str]:
            if self._num_processes > 1 and self._project.save_on_each_node:
                raise CheckpointError(
                    "save_on_each_node=True would write parts of one checkpoint to different disks",
                    "write to a file system that all hosts share, and leave save_on_each_node out",
                )
            run_id = self._project.run_id
            if output_dir is not None:
                target = _expanded(output_dir)
                return target, begin_checkpoint(target, replace=not is_url(target), run=run_id)
            folder = self._folder()
            if self._lock is None:
                self._lock = lock_folder(folder, run=run_id)
                sweep(folder)
            target = open_folder(folder).child(checkpoint_name(self._project.iteration)).url
            return target, begin_checkpoint(target, run=run_id)

        target, attempt = self._on_main(claim)
        return str(target), str(attempt)

    def _folder(self) -> str:
        if self._project.project_dir is None:
            raise CheckpointError(
                "save_state and load_state without a folder need a project_dir",
                "name the folder, or give Accelerator(project_dir=...): checkpoints then go to its folder 'checkpoints'",
            )
        return open_folder(_expanded(self._project.project_dir)).child("checkpoints").url

    def _run_save_hooks(self, run: Run, folder: str) -> set[str]:
        """The groups of models that hooks save themselves: those whose weights they have taken out of the list."""
        if not self._save_hooks:
            return set()
        models = [part.public for part in run.models]
        weights = [self._job.weights(part) for part in run.models]
        groups = {id(one): part.group for one, part in zip(weights, run.models, strict=True)}
        held = list(weights)  # keeps the ids valid
        for hook in list(self._save_hooks.values()):
            hook(models, weights, folder)
        kept = {id(one) for one in weights}
        return {groups[id(one)] for one in held if id(one) not in kept}

    # -- in ------------------------------------------------------------------------------------------------------------

    def load(self, input_dir: Location | None) -> str:
        """Make the run what it was when it was saved, and return from where. Every process calls it."""
        self._agreed(self._writer.wait)
        path = str(self._on_main(lambda: self._choose(input_dir)))
        run = self._job.run(tuple(self.registered))

        def open_and_check() -> tuple[Saved, set[str]]:
            # The main process has compared every byte with its checksum when it chose.
            saved = open_checkpoint(path, verify=False)
            left_out = self._run_load_hooks(run, path)
            check(saved, run, left_out=left_out)
            return saved, left_out

        saved, left_out = self._agreed(open_and_check)
        restarted = restore(saved, run, left_out=left_out)
        self._project.iteration = int(self._on_main(lambda: self._following(path, saved)))
        if self._is_main:
            log.info("continuing from %s%s", path, "".join(f"; {what}" for what in restarted))
            for what in restarted:
                log.warning("%s: %s", path, what)
        return path

    def _choose(self, input_dir: Location | None) -> str:
        if input_dir is not None:
            path = _expanded(input_dir)
            self._refuse_other_writer(open_folder(path).parent().url)
            open_checkpoint(path)
            return path
        folder = self._folder()
        self._refuse_other_writer(folder)
        saved, passed_over = newest_checkpoint(folder)
        for other, why in passed_over:
            log.warning("%s was passed over: %s", other, why)
        if saved is None:
            reason = f"; {len(passed_over)} were passed over: {passed_over[0][1]}" if passed_over else ""
            raise CheckpointError(
                f"there is no whole checkpoint in {folder}{reason}", "name the folder of one: load_state('path')"
            )
        return saved.path

    def _refuse_other_writer(self, folder: str) -> None:
        holder = None if is_url(folder) else folder_holder(folder)
        if holder is not None:
            raise CheckpointError(
                f"another run writes checkpoints into {folder} ({holder})",
                "stop it before continuing from its checkpoints, or load a copy of the checkpoint from another folder",
            )

    def _following(self, path: str, saved: Saved) -> int:
        """The number of the next automatic checkpoint: above all that are there, and above the loaded one."""
        iteration = int(saved.shared["iteration"])
        number = checkpoint_number(open_folder(path).name)
        iteration = max(iteration, 0 if number is None else number + 1)
        return iteration if self._project.project_dir is None else max(iteration, next_number(self._folder()))

    def _run_load_hooks(self, run: Run, folder: str) -> set[str]:
        """The groups of models that hooks load themselves: those that they have taken out of the list."""
        if not self._load_hooks:
            return set()
        models = [part.public for part in run.models]
        for hook in list(self._load_hooks.values()):
            hook(models, folder)
        return {part.group for part in run.models if not any(part.public is model for model in models)}

    def has_any(self) -> bool:
        """Whether the project has a checkpoint, be it broken; what a dead writer left behind is none. Every process calls it."""

        def look() -> bool:
            place = open_folder(self._folder())
            return any(MANIFEST in place.child(name).entries() for name in numbered(place.url))

        return bool(self._on_main(look))

    # -- the end -------------------------------------------------------------------------------------------------------

    def wait(self) -> None:
        """Return when nothing is being written. Raises what the last write failed with."""
        self._writer.wait()

    def close(self) -> None:
        """`wait`, and let other runs write into the folder."""
        try:
            self._writer.wait()
        finally:
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    # -- between processes ---------------------------------------------------------------------------------------------

    @property
    def _is_main(self) -> bool:
        return self._process_index == 0

    def _on_main(self, work: Callable[[], Any]) -> Any:
        """What `work` gives on the main process, on all; its error is raised on all."""
        result: Any = None
        error: Exception | None = None
        if self._is_main:
            try:
                result = work()
            except Exception as caught:  # noqa: BLE001 - raised below, where every process does the same
                error = caught
        said = self._job.share(None if error is None else _in_words(error)) if self._num_processes > 1 else None
        if error is not None:
            raise error
        if said is not None:
            raise CheckpointError(f"process 0: {said[0]}", said[1])
        return self._job.share(result) if self._num_processes > 1 else result

    def _agreed(self, work: Callable[[], Any]) -> Any:
        """`work` on every process; where one fails, all raise."""
        result: Any = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:  # noqa: BLE001 - raised below, where every process does the same
            error = caught
        all_said = self._job.gather(None if error is None else _in_words(error)) if self._num_processes > 1 else []
        if error is not None:
            raise error
        for index, said in enumerate(all_said):
            if said is not None:
                raise CheckpointError(f"process {index}: {said[0]}", said[1])
        return result


def _in_words(error: Exception) -> tuple[str, str | None]:
    if isinstance(error, PolyaccelError):
        return error.message, error.hint
    return f"{type(error).__name__}: {error}", None


def _expanded(location: Location) -> str:
    text = fspath(location)
    return text if is_url(text) else os.path.expanduser(text)
