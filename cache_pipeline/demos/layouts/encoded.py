"""Decodes images that are stored as JPEG or PNG, one per step.

Pillow decodes them: it releases the GIL, so several threads decode at once.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# First bytes of a file → its format.
SIGNATURES = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG"}
LONGEST_SIGNATURE = max(map(len, SIGNATURES))
MODES = ("RGB", "RGBA", "L", "LA", "P")
"""Kinds of pixels that are read as rgb: alpha is dropped, grey gives three equal channels."""
MOST_SIDE = 16384
# What Pillow raises for damaged bytes.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, struct.error, zlib.error)


class Header(NamedTuple):
    """Format and size of an encoded image, in pixels."""

    format: str
    height: int
    width: int


def has_signature(data: bytes) -> bool:
    """Whether bytes begin as a JPEG or PNG file does."""
    return any(data.startswith(signature) for signature in SIGNATURES)


def read_header(data: bytes) -> Header | None:
    """Reads format and size without decoding; None if it is not an image that can be read as rgb."""
    from PIL import Image

    if not has_signature(data):
        return None
    try:
        with Image.open(io.BytesIO(data), formats=tuple(SIGNATURES.values())) as image:
            width, height = image.size
            known = image.mode in MODES and max(width, height) <= MOST_SIDE
            return Header(str(image.format), height, width) if known else None
    except (*DECODE_ERRORS, Image.DecompressionBombError):
        return None


def decode(data: bytes, out: NDArray[np.uint8], frame: int) -> None:
    """Decodes one image into ``out`` (H, W, 3), as ``Image.convert("RGB")`` of Pillow gives it.

    Args:
        data: the file's bytes; bytes after its end are ignored.
        frame: its number in the demo, for messages.

    Raises:
        ValueError: damaged bytes, or another size.
    """
    from PIL import Image

    header = read_header(data)
    if header is None:
        raise ValueError(f"frame {frame} is no JPEG or PNG image")
    if header[1:] != out.shape[:2]:
        raise ValueError(f"frame {frame} is {header.height}×{header.width}, not {out.shape[0]}×{out.shape[1]}")
    try:
        with Image.open(io.BytesIO(data), formats=(header.format,)) as image:
            out[:] = np.asarray(image.convert("RGB"))
    except DECODE_ERRORS as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"frame {frame} is a damaged {header.format} image: {reason}") from error


def decoder() -> str:
    """Returns the libraries that decode images, with their versions."""
    from PIL import __version__, features

    return f"Pillow {__version__} (libjpeg {features.version('jpg')}, zlib {features.version('zlib')})"
