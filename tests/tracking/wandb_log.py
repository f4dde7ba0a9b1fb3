"""Reads a W&B offline file: blocks of LevelDB's log format that hold protocol buffers. wandb 0.31 has no reader of its own."""

import json
import struct
import time
import zlib

BLOCK, HEADER = 32768, 7


def records(path):
    """The records of a .wandb file, in order."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    magic, version = struct.unpack("<HB", data[4:7])
    assert (magic, version) == (0xBEE1, 0)
    position, part = 7, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:  # too short for another header: the rest of a block is zeros
            position += left
            continue
        checksum, size, kind = struct.unpack("<IHB", data[position : position + HEADER])
        content = data[position + HEADER : position + HEADER + size]
        if len(content) < size:
            return  # it is being written
        assert zlib.crc32(bytes([kind]) + content) == checksum
        position += HEADER + size
        part += content
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            yield record
            part = b""


def read(folder):
    """What the only offline run below `folder` holds: history rows, config, names of artifacts."""
    (path,) = folder.rglob("*.wandb")
    # `finish` returns before wandb's own process has written its last rows and, after them, that the run has ended.
    deadline = time.monotonic() + 30
    while not any(record.WhichOneof("record_type") == "exit" for record in records(path)):
        assert time.monotonic() < deadline, f"{path} does not end"
        time.sleep(0.1)
    rows, config, artifacts, run_id, project, entity = [], {}, [], None, None, None
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            rows.append(
                {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
            )
        elif kind == "run":
            run_id, project, entity = record.run.run_id, record.run.project, record.run.entity
            updates = record.run.config.update
            config.update({(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in updates})
        elif kind == "config":
            config.update(
                {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.config.update}
            )
        elif kind == "artifact":
            artifacts.append(record.artifact.name)
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            artifacts.append(record.request.log_artifact.artifact.name)
    return {"rows": rows, "config": config, "artifacts": artifacts, "id": run_id, "project": project, "entity": entity}
