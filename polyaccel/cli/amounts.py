"""Numbers of bytes as people read them."""

from __future__ import annotations


def bytes_text(num_bytes: int) -> str:
    """In powers of 1024: "512 bytes", "1.5 GiB"."""
    size = float(num_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
