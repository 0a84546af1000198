"""Reader of the official Python batches of CIFAR-10 and CIFAR-100, in a folder or an archive.

The batches are pickles from the internet, and unpickling can run any code. They are therefore read
by a restricted unpickler: the names that an array needs are replaced by the stand-ins below, and
all others are refused. The stand-ins keep their arguments as plain values, so that not even numpy's
unpickling code sees the contents before they are checked.
"""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int64, UInt8

from dsnet.data.decoding import read_regular_file
from dsnet.data.labels import check_labels
from dsnet.errors import DataError
from dsnet.wording import size as size_text

IMAGE_SIZE = 32
MAX_MEMBER_BYTES = 2**28
"""Largest batch in an archive, 256 MiB; CIFAR-100's training batch has 155 MB."""
MAX_ARCHIVE_BYTES = 2**29
"""Largest content of an archive, 512 MiB: more is no CIFAR, and may be made to fill the memory."""
_CHANNELS = 3
_BROKEN_PICKLE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
    struct.error,
)

Split = tuple[UInt8[np.ndarray, "_images 3 size size"], Int64[np.ndarray, " _images"]]
"""Pixels uint8 [N, 3, size, size] and labels int64 [N]."""


@dataclass(frozen=True, kw_only=True)
class BatchLayout:
    """Names of the files of a data set, and of the entries in them."""

    title: str
    """The data set's name for people."""
    archive: str
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str
    """Entry of a batch with its labels."""
    names: str
    """Entry of the meta file with the names of the classes."""
    class_names: tuple[str, ...] | None
    """The expected names; None: whatever the meta file says."""

    @property
    def files(self) -> tuple[str, ...]:
        """All files."""
        return (*self.train, self.test, self.meta)


def read_batch_folder(folder: Path, layout: BatchLayout) -> tuple[Split, Split, tuple[str, ...]]:
    """Read the official train and test parts, and the names of the classes, from a folder.

    Raises:
        DataError: A file is missing, truncated, not such a batch, or mislabelled; the message names
            it.
    """
    files: dict[str, bytes] = {}
    for name in layout.files:
        if not (folder / name).exists():
            raise DataError(f"{folder / name} is missing; unpack {layout.archive} again")
        files[name] = read_regular_file(folder / name)
    return _read_batches(files, lambda name: str(folder / name), layout)


def read_archive(archive: Path, layout: BatchLayout) -> tuple[Split, Split, tuple[str, ...]]:
    """Read both parts from the official archive without unpacking it to disk.

    Raises:
        DataError: As for `read_batch_folder`, or the archive itself is truncated or much larger
            than the official one.
    """
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                _check_member_size(member, archive, layout)
                name = PurePosixPath(member.name).name
                content = tar.extractfile(member) if name in layout.files and member.isfile() else None
                if content is not None:
                    files[name] = content.read()
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{archive}: not a whole tar.gz archive ({error}); fetch it again") from error
    for name in layout.files:
        if name not in files:
            raise DataError(f"{archive}: {layout.folder}/{name} is missing in it; fetch it again")
    return _read_batches(files, lambda name: f"{archive}, {name}", layout)


def _check_member_size(member: tarfile.TarInfo, archive: Path, layout: BatchLayout) -> None:
    """Refuse what would have to be unpacked for long, before it is."""
    end = member.offset_data + member.size
    if member.size > MAX_MEMBER_BYTES or end > MAX_ARCHIVE_BYTES:
        raise DataError(
            f"{archive}: {member.name} has {size_text(member.size)}, so that this is not the official archive of {layout.title} "
            f"(at most {size_text(MAX_MEMBER_BYTES)} a file and {size_text(MAX_ARCHIVE_BYTES)} in all); fetch it again"
        )


def _read_batches(
    files: Mapping[str, bytes], where: Callable[[str], str], layout: BatchLayout
) -> tuple[Split, Split, tuple[str, ...]]:
    meta = _load(files[layout.meta], where(layout.meta), layout)
    names = meta.get(layout.names)
    expected = layout.class_names
    found = tuple(map(_as_text, names)) if isinstance(names, list) else ()
    if not found or not all(isinstance(name, str) for name in found) or (expected is not None and found != expected):
        must_be = "a list of names" if expected is None else repr(list(expected))
        raise DataError(
            f"{where(layout.meta)}: {layout.names} is {names!r}, must be {must_be}: not the official {layout.title}; "
            "fetch it again"
        )
    class_names = tuple(map(str, found))
    num_images = meta.get("num_cases_per_batch") if len(layout.train) > 1 else None
    parts = [
        _read_batch(files[name], where(name), num_images, class_names, layout) for name in (*layout.train, layout.test)
    ]
    train, test = parts[:-1], parts[-1]
    whole = (np.concatenate([pixels for pixels, _ in train]), np.concatenate([labels for _, labels in train]))
    return whole, test, class_names


def _read_batch(
    content: bytes, where: str, num_images: object, class_names: Sequence[str], layout: BatchLayout
) -> Split:
    batch = _load(content, where, layout)
    labels, data = batch.get(layout.labels), batch.get("data")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError(f"{where}: {layout.labels!r} must be a list of integers; fetch it again")
    if not isinstance(data, _PickledArray):
        raise DataError(f"{where}: 'data' must be an array of pixels, is {type(data).__name__}; fetch it again")
    num_values = _CHANNELS * IMAGE_SIZE * IMAGE_SIZE
    pixels = data.to_uint8(where)
    if pixels.ndim != 2 or pixels.shape[1] != num_values or not len(pixels):
        raise DataError(f"{where}: 'data' has shape {pixels.shape}, must be (images, {num_values}); fetch it again")
    if len(labels) != len(pixels) or (isinstance(num_images, int) and num_images != len(pixels)):
        said = f", but {layout.meta} says {num_images} a batch" if isinstance(num_images, int) else ""
        raise DataError(f"{where}: {len(pixels)} images and {len(labels)} labels{said}; fetch it again")
    values = np.asarray(labels, dtype=object)  # checked before the conversion: a huge integer would overflow
    check_labels(values, class_names, where)
    return pixels.reshape(-1, _CHANNELS, IMAGE_SIZE, IMAGE_SIZE), values.astype(np.int64)


class _PickledType:
    """Stand-in for numpy.dtype that keeps the type's code, e.g. "u1"."""

    def __init__(self, code: object = None, *_flags: object) -> None:
        self.code = code

    def __setstate__(self, _state: object) -> None:
        """Ignore byte order and flags, which do not matter for one-byte values."""


class _PickledArray:
    """Stand-in for numpy.ndarray that keeps shape, type and bytes until they are checked."""

    def __init__(self, *_initial: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def to_uint8(self, where: str) -> np.ndarray:
        """The pickled array.

        Raises:
            DataError: It is not a plain uint8 array in C order, or its bytes do not fill its shape.
        """
        match self.state:
            case (_, tuple(shape), _PickledType(code="u1"), 0 | False, bytes() | str() as raw):
                values = raw.encode("latin1") if isinstance(raw, str) else raw
                try:
                    return np.frombuffer(values, dtype=np.uint8).reshape(shape).copy()
                except (ValueError, TypeError, OverflowError) as error:
                    raise DataError(f"{where}: the pixels do not fill the shape {shape}; fetch it again") from error
        raise DataError(f"{where}: 'data' must be a plain uint8 array; fetch it again")


def _encode(text: str, codec: str) -> bytes:
    """Stand-in for _codecs.encode, which Python 3 uses to write bytes in the batches' old pickle
    protocol."""
    if codec != "latin1":
        raise pickle.UnpicklingError(f"unexpected codec {codec!r}")
    return text.encode("latin1")


def _reconstruct(_kind: object, *_initial: object) -> _PickledArray:
    """Stand-in for numpy's array factory."""
    return _PickledArray()


_STAND_INS: Mapping[tuple[str, str], object] = {
    ("numpy", "ndarray"): _PickledArray,
    ("numpy", "dtype"): _PickledType,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("_codecs", "encode"): _encode,
}


class _DataUnpickler(pickle._Unpickler):
    """Unpickler that builds only containers, numbers, text and the stand-ins above.

    It derives from the implementation in Python, not the one in C, in which a single damaged byte
    can allocate a memo table of many gigabytes. Two opcodes are disabled: the one that allocates
    before it reads (BYTEARRAY8), and the one for integers of unlimited length (LONG4).
    """

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        opcode: build
        for opcode, build in pickle._Unpickler.dispatch.items()
        if opcode not in (pickle.BYTEARRAY8[0], pickle.LONG4[0])
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed in a data file")
        return _STAND_INS[module, name]


def _load(content: bytes, where: str, layout: BatchLayout) -> dict[object, Any]:
    try:
        # latin1: the official files were written by Python 2, whose strings are bytes.
        batch = _DataUnpickler(io.BytesIO(content), encoding="latin1").load()
    except _BROKEN_PICKLE as error:
        raise DataError(f"{where}: not a whole {layout.title} batch ({error}); fetch it again") from error
    if not isinstance(batch, dict):
        raise DataError(f"{where}: must hold a dictionary, holds {type(batch).__name__}; fetch it again")
    return {_as_text(key): value for key, value in batch.items()}


def _as_text(value: object) -> object:
    """Decode bytes, as batches written by Python 3 have for keys, to text; keep other values."""
    return value.decode("latin1") if isinstance(value, bytes) else value
