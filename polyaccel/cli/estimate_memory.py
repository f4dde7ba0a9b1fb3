"""`polyaccel estimate-memory`: what training and inference of a model need, from its shapes alone."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyaccel.estimates import Answer, InputShape, Question

PRECISIONS = ("float32", "bfloat16", "float16", "int8", "int4")
_EXAMPLES = """examples:
  polyaccel estimate-memory ./llama --batch-size 4 --sequence-length 2048
  polyaccel estimate-memory my_models:build --input B,3,224,224 --optimizer sgd:momentum=0.9
  polyaccel estimate-memory my_models:GPT --input B,S:int64 --precision bfloat16 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `estimate-memory`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a folder with a transformers config.json, such a file, or module:callable that makes a torch or flax module",
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="samples in a batch on one device (1)")
    parser.add_argument(
        "--sequence-length",
        type=int,
        metavar="N",
        help="tokens in a sample (512, or the model's limit where it is less)",
    )
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SHAPE[:DTYPE]",
        help="one input of the module, as in B,S:int64 or B,3,224,224; B is the batch size, S the sequence length",
    )
    parser.add_argument(
        "--optimizer",
        default="adamw",
        metavar="NAME[:KEY=VALUE,...]",
        help="a class of torch.optim, or a function of optax for flax (adamw)",
    )
    parser.add_argument(
        "--precision", action="append", choices=PRECISIONS, help="what to report; may be repeated (all of them)"
    )
    parser.add_argument("--framework", choices=("torch", "flax"), help="of a factory whose module uses both")
    parser.add_argument("--json", action="store_true", help="print it as JSON, in bytes")


def run(options: argparse.Namespace) -> int:
    """Print the table. Raises ConfigError for a model, input or optimizer that cannot be understood."""
    import json

    question, dialect = _question(options)
    answer = _ask(question, dialect)
    report = describe(answer, question, options.model)
    print(json.dumps(report, indent=2) if options.json else table(report))
    return 0


def describe(answer: Answer, question: Question, model: str) -> dict[str, Any]:
    """The report as plain data, sizes in bytes."""
    from polyaccel.estimates import TRAINING_PRECISIONS

    held = sum(part.bytes for part in answer.parameters)
    buffers = sum(part.bytes for part in answer.buffers)
    batch = sum(_size(shape) for shape in answer.inputs)
    rows: dict[str, Any] = {}
    for precision in question.precisions:
        name, layer = answer.largest_layer_in(precision)
        row: dict[str, Any] = {
            "weights": answer.weights_in(precision),
            "largest_layer": {"name": name, "bytes": layer},
            "training": None,
        }
        if precision in TRAINING_PRECISIONS:
            parts: dict[str, int | None] = {
                "parameters": held,
                "buffers": buffers,
                "gradients": answer.trainable_bytes,
                "optimizer": answer.optimizer_bytes,
                "activations": answer.activations.get(precision),
                "batch": batch if answer.activations else None,
            }
            total = sum(size for size in parts.values() if size is not None)
            row["training"] = {**parts, "total": total, "is_complete": parts["activations"] is not None}
        rows[precision] = row
    return {
        "model": model,
        "dialect": answer.dialect,
        "parameters": sum(part.count for part in answer.parameters),
        "trainable": answer.trainable_count,
        "optimizer": question.optimizer,
        "batch_size": question.batch_size,
        "inputs": [{"shape": list(shape.shape), "dtype": shape.dtype} for shape in answer.inputs],
        "precisions": rows,
        "notes": answer.notes,
    }


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    from polyaccel.cli.amounts import bytes_text

    columns = ("precision", "weights", "largest layer", "gradients", "optimizer", "activations", "training")
    rows = [columns]
    for precision, row in report["precisions"].items():
        training = row["training"]
        cells = [precision, bytes_text(row["weights"]), bytes_text(row["largest_layer"]["bytes"])]
        if training is None:
            cells += ["-"] * 4
        else:
            activations = training["activations"]
            total = bytes_text(training["total"])
            cells += [bytes_text(training["gradients"]), bytes_text(training["optimizer"])]
            cells += ["?", f"{total} + ?"] if activations is None else [bytes_text(activations), total]
        rows.append(tuple(cells))
    widths = [max(len(row[at]) for row in rows) for at in range(len(columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    inputs = " and ".join(f"{item['dtype']}{item['shape']}" for item in report["inputs"]) or "no inputs"
    head = f"{report['model']}: {report['parameters']:,} parameters ({report['trainable']:,} trained), {inputs}"
    layers = {row["largest_layer"]["name"] for row in report["precisions"].values()}
    notes = [f"largest layer: {', '.join(sorted(layers))}", f"optimizer: {report['optimizer']}", *report["notes"]]
    return "\n".join([head, *lines, *notes])


def _size(shape: InputShape) -> int:
    import math

    sizes = {"64": 8, "32": 4, "16": 2, "t8": 1, "ol": 1}
    return math.prod(shape.shape) * sizes[shape.dtype[-2:]]


def _ask(question: Question, dialect: str) -> Answer:
    from polyaccel.registry import served_by

    estimator = served_by("torch" if dialect == "torch" else "jax", "estimator", "estimates no memory")
    answer: Answer = estimator.answer(question)
    return answer


def _question(options: argparse.Namespace) -> tuple[Question, str]:
    from pathlib import Path

    from polyaccel.errors import ConfigError
    from polyaccel.estimates import Question

    for name in ("batch_size", "sequence_length"):
        size = getattr(options, name)
        if size is not None and size < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {size}", "give a number of at least 1")
    name, settings = _optimizer(options.optimizer)
    inputs = tuple(_input(text, options.batch_size, options.sequence_length) for text in options.input)
    path = Path(options.model)
    config = path / "config.json" if path.is_dir() else path
    factory, dialect, folder = None, "torch", None
    if config.is_file() and config.suffix == ".json":
        folder = str(config.parent if config.name == "config.json" else config)
        if options.framework == "flax":
            raise ConfigError(
                "--framework flax with a transformers configuration", "leave it out: the model is torch's"
            )
    elif ":" in options.model:
        factory, dialect = _factory(options.model, options.framework)
    else:
        raise ConfigError(
            f"{options.model!r} is no folder with a config.json, no such file, and no module:callable",
            "give a local path; nothing is downloaded",
        )
    question = Question(
        factory=factory,
        config_folder=folder,
        inputs=inputs,
        batch_size=options.batch_size,
        sequence_length=options.sequence_length,
        optimizer=name,
        optimizer_settings=settings,
        precisions=tuple(options.precision or PRECISIONS),
    )
    return question, dialect


def _optimizer(text: str) -> tuple[str, dict[str, Any]]:
    from polyaccel.errors import ConfigError

    name, _, rest = text.partition(":")
    settings: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--optimizer {text}: {item!r} is no KEY=VALUE", "write it as in sgd:momentum=0.9")
        if value.lower() in ("true", "false"):
            settings[key] = value.lower() == "true"
        else:
            try:
                settings[key] = float(value)
            except ValueError as error:
                raise ConfigError(
                    f"--optimizer {text}: {value!r} of {key} is no number", "give a number, true or false"
                ) from error
    return name, settings


def _input(text: str, batch_size: int, sequence_length: int | None) -> InputShape:
    from polyaccel.errors import ConfigError
    from polyaccel.estimates import InputShape

    sizes, _, dtype = text.partition(":")
    dtype = dtype or "float32"
    known = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    if dtype not in known:
        raise ConfigError(f"--input {text}: {dtype!r} is no dtype", f"use one of {', '.join(known)}")
    if "S" in sizes.split(",") and sequence_length is None:
        raise ConfigError(f"--input {text} has S, and there is no --sequence-length", "give --sequence-length")
    names = {"B": batch_size, "S": sequence_length or 0}
    try:
        shape = tuple(names[size] if size in names else int(size) for size in sizes.split(","))
    except ValueError as error:
        raise ConfigError(f"--input {text}: a size is no number", "write it as in B,3,224,224 or B,S:int64") from error
    return InputShape(shape, dtype)


def _factory(text: str, framework: str | None) -> tuple[Any, str]:
    import os
    import sys
    from importlib import import_module

    from polyaccel.errors import ConfigError

    home, _, name = text.partition(":")
    sys.path.insert(0, os.getcwd())  # a script's own folder is importable for it, and a command's is not
    try:
        module = import_module(home)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{text}: {error}", "run the command where `import` finds the module") from error
    finally:
        sys.path.pop(0)
    factory = getattr(module, name, None)
    if not callable(factory):
        raise ConfigError(f"{home} has no callable {name!r}", "name a class or function that needs no arguments")
    return factory, framework or _framework(text, factory, module)


def _framework(text: str, factory: Any, module: Any) -> str:
    """By the class that it is, else by what its module has imported."""
    from polyaccel.errors import ConfigError

    if isinstance(factory, type):
        homes = {base.__module__.partition(".")[0] for base in factory.__mro__}
    else:
        homes = {
            str(getattr(v, "__module__", None) or getattr(v, "__name__", "")).partition(".")[0]
            for v in vars(module).values()
        }
    found = homes & {"torch", "flax"}
    if len(found) != 1:
        raise ConfigError(
            f"{text}: {'both frameworks are' if found else 'neither torch nor flax is'} used in its module",
            "say which with --framework torch or --framework flax",
        )
    return found.pop()
