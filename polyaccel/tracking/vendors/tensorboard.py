"""TensorBoard event files, written by the tensorboard package itself: no torch, no tensorflow."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from polyaccel.errors import TrackerError
from polyaccel.tracking.png import to_png
from polyaccel.tracking.values import flatten
from polyaccel.tracking.vendors.adapter import Adapter, numbers, texts


class TensorBoardTracker(Adapter):
    """Events stand in `<run folder>/tensorboard`; `tensorboard --logdir runs` shows every run by its folder.

    Options are those of tensorboard's EventFileWriter (`flush_secs`, `max_queue_size`, `filename_suffix`). TensorBoard keeps numbers as
    float32; metrics.jsonl has them exactly.
    """

    name: ClassVar[str] = "tensorboard"
    requires_logging_directory: ClassVar[bool] = True
    package: ClassVar[str] = "tensorboard"
    requirement: ClassVar[str] = "tensorboard"

    def __init__(self, run_name: str, logging_dir: str, **options: Any) -> None:
        super().__init__(run_name, **options)
        self._folder = Path(logging_dir, "tensorboard")
        self._step = 0

    def start(self) -> None:
        """Open the event file."""
        self._vendor = Writer(self._folder, **{"flush_secs": 10, **self.options})

    @property
    def writer(self) -> Writer:
        """The event writer, with the methods of torch's SummaryWriter that need no torch."""
        writer: Writer = self._vendor
        return writer

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """The configuration as a text, and its flat plain values as TensorBoard's hyperparameters."""
        self.writer.add_text("config", f"```json\n{json.dumps(values, indent=1, default=str)}\n```", 0)
        flat = {name: value for name, value in flatten(values).items() if isinstance(value, (bool, int, float, str))}
        self.writer.add_hparams(flat)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Numbers as scalars, texts as texts; without a step they get the next one."""
        step = self._at(step)
        for name, number in numbers(values).items():
            self.writer.add_scalar(name, number, step, **kwargs)
        for name, text in texts(values).items():
            self.writer.add_text(name, text, step, **kwargs)

    def log_images(self, values: dict[str, list[Any]], step: int | None = None, **kwargs: Any) -> None:
        """Images, several of one name side by side."""
        step = self._at(step)
        for name, images in values.items():
            for index, image in enumerate(images):
                self.writer.add_image(name if len(images) == 1 else f"{name}/{index}", image, step, **kwargs)

    def log_table(
        self,
        table_name: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """A Markdown table among the texts."""
        rows = [columns or [], ["---"] * len(columns or []), *(data or [])]
        self.writer.add_text(
            table_name, "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in rows), self._at(step)
        )

    def finish(self) -> None:
        """Write what is left."""
        self.writer.close()

    def identity(self) -> dict[str, Any]:
        """The folder of the events."""
        return {"logdir": str(self._folder)}

    def _at(self, step: int | None) -> int:
        self._step = self._step + 1 if step is None else step
        return self._step


class Writer:
    """Writes events. Method names and arguments are those of torch's SummaryWriter."""

    def __init__(self, folder: Path, **options: Any) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.log_dir = str(folder)
        self._events = EventFileWriter(str(folder), **options)

    def add_scalar(
        self, tag: str, scalar_value: Any, global_step: int | None = None, walltime: float | None = None
    ) -> None:
        """One number."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(Summary(value=[Summary.Value(tag=tag, simple_value=float(scalar_value))]), global_step, walltime)

    def add_scalars(
        self,
        main_tag: str,
        tag_scalar_dict: Mapping[str, Any],
        global_step: int | None = None,
        walltime: float | None = None,
    ) -> None:
        """Several numbers below one name."""
        for tag, value in tag_scalar_dict.items():
            self.add_scalar(f"{main_tag}/{tag}", value, global_step, walltime)

    def add_text(
        self, tag: str, text_string: str, global_step: int | None = None, walltime: float | None = None
    ) -> None:
        """A text, shown as Markdown."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING
        from tensorboard.plugins.text.metadata import create_summary_metadata

        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype=DT_STRING, string_val=[text_string.encode()], tensor_shape=shape)
        metadata = create_summary_metadata(display_name=tag, description="")
        # Without the suffix TensorBoard would show a scalar and a text of one name as one thing; torch writes it too.
        value = Summary.Value(tag=f"{tag}/text_summary", metadata=metadata, tensor=tensor)
        self._add(Summary(value=[value]), global_step, walltime)

    def add_image(
        self,
        tag: str,
        img_tensor: Any,
        global_step: int | None = None,
        walltime: float | None = None,
        dataformats: str | None = None,
    ) -> None:
        """An image: a PNG file, a PIL image, or an array; its channels are where `dataformats` ("CHW", "HWC", "HW") says."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        if dataformats == "CHW":
            img_tensor = _host(img_tensor).transpose(1, 2, 0)
        png = to_png(img_tensor)
        width, height = struct.unpack(">II", png[16:24])
        channels = {0: 1, 4: 2, 2: 3, 6: 4}[png[25]]
        image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=png)
        self._add(Summary(value=[Summary.Value(tag=tag, image=image)]), global_step, walltime)

    def add_images(
        self,
        tag: str,
        img_tensor: Any,
        global_step: int | None = None,
        walltime: float | None = None,
        dataformats: str = "NCHW",
    ) -> None:
        """Images of one array, (count, channels, height, width) or (count, height, width, channels)."""
        for index, image in enumerate(_host(img_tensor)):
            self.add_image(f"{tag}/{index}", image, global_step, walltime, dataformats.removeprefix("N"))

    def add_hparams(self, hparam_dict: Mapping[str, Any], metric_dict: Mapping[str, Any] | None = None) -> None:
        """Hyperparameters for TensorBoard's own table, and final numbers beside them."""
        from tensorboard.plugins.hparams import summary_v2

        self._add(summary_v2.hparams_pb(dict(hparam_dict)), 0, None)
        for name, value in (metric_dict or {}).items():
            self.add_scalar(name, value)

    def flush(self) -> None:
        """Hand what is queued to the disk."""
        self._events.flush()

    def close(self) -> None:
        """Flush and close."""
        self._events.close()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("add_"):
            raise TrackerError(
                f"the TensorBoard writer has no {name}",
                f"write it with torch.utils.tensorboard.SummaryWriter({self.log_dir!r}), which adds to the same run",
            )
        raise AttributeError(name)

    def _add(self, summary: Any, step: int | None, walltime: float | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        event = Event(wall_time=time.time() if walltime is None else walltime, summary=summary)
        if step is not None:
            event.step = int(step)
        self._events.add_event(event)


def _host(array: Any) -> Any:
    return array.detach().cpu().numpy() if hasattr(array, "detach") else array.__array__()


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
