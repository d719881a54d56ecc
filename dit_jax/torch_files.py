"""PyTorch's files, read without PyTorch: archives by their checksums, and the form from before version 1.6.

Their pickles are read by `dit_jax.pickles`, which runs nothing; tensors one at a time from where they lie in the file.
"""

import io
import math
import pickle
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.pickles import BYTES, REAL, Storage, Tensor, Unpickler, check_pickle
from dit_jax.tensors import WeightsError

ARCHIVE = b"PK\x03\x04"
LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, 2)  # how files from before version 1.6 begin
LEGACY_PICKLES = 4  # after the magic number: version, system, content, storages


class TorchFile:
    """A .pt file: its content, with a `Tensor` for each dense tensor in it, and the numbers of any of these.

    Raises:
      WeightsError: it is not such a file, is damaged, or is refused.
    """

    def __init__(self, path: Path):
        self.path, self.checked = path, True
        self._last: tuple[str, np.ndarray] | None = None
        refused = f"{path} is not a readable checkpoint: "
        try:
            with path.open("rb") as file:
                start = file.read(len(LEGACY))
            if not start.startswith((ARCHIVE, LEGACY)):
                raise WeightsError(f"{refused}it is of another format than PyTorch's")
            archive = start.startswith(ARCHIVE)
            self.content = self._open_archive(refused) if archive else self._open_legacy(refused)
        except WeightsError:
            raise
        except Exception as error:  # errors of any kind
            raise WeightsError(
                f"{refused}it is damaged, cut short or of another format ({type(error).__name__}: {str(error)[:100]}); "
                "compare its size and SHA-256 with its publisher's, and download it again"
            ) from error

    def array(self, tensor: Tensor) -> np.ndarray:
        """The numbers of a real tensor, as they are stored. They may be shared with another one.

        Raises:
          WeightsError: they are not there, or not those that were written.
        """
        storage = tensor.storage
        if self._last is None or self._last[0] != storage.key:
            self._last = None  # let go first
            self._last = storage.key, self._numbers(storage)
        numbers = self._last[1]
        if _contiguous(tensor):
            return numbers[tensor.offset :][: math.prod(tensor.shape)].reshape(tensor.shape)
        strides = [step * numbers.itemsize for step in tensor.stride]
        return np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, strides, writeable=False)

    def _numbers(self, storage: Storage) -> np.ndarray:
        offset, size, checksum = self._places[storage.key]
        dtype = REAL[storage.kind]
        if storage.count * dtype.itemsize != size:
            raise WeightsError(
                f"{self.path} is damaged: the storage {storage.key} has {size} bytes, not those it needs"
            )
        numbers = np.fromfile(self.path, np.uint8, size, offset=offset)
        if len(numbers) != size or (self.checked and checksum is not None and zlib.crc32(numbers.data) != checksum):
            raise WeightsError(
                f"{self.path} is damaged: the checksum of its record data/{storage.key} does not fit; download it again"
            )
        if self._order != sys.byteorder:
            numbers = numbers.view(f"u{dtype.itemsize}").byteswap()
        return numbers.view(dtype)

    def _open_archive(self, refused: str) -> Any:
        with zipfile.ZipFile(self.path) as file:
            infos = file.infolist()
            packed = [info.filename for info in infos if info.compress_type != zipfile.ZIP_STORED]
            if packed:  # PyTorch never compresses; a small file could fill the memory
                raise WeightsError(f"{refused}its archive is compressed ({packed[0][:100]!r}); save it with torch.save")
            names = [info.filename for info in infos]
            roots = {name.split("/")[0] for name in names}
            if len(roots) != 1 or len(set(names)) != len(names):
                raise WeightsError(f"{refused}its archive holds other files than PyTorch's")
            root = roots.pop()
            if f"{root}/constants.pkl" in names:
                raise WeightsError(f"{refused}it is a TorchScript program; save the weights alone: model.state_dict()")
            self.checked = any(info.CRC for info in infos)  # PyTorch can leave checksums out
            size = self.path.stat().st_size
            places = {}
            for info in infos:
                file.fp.seek(info.header_offset)  # type: ignore[union-attr]
                header = file.fp.read(30)  # type: ignore[union-attr]
                if len(header) < 30 or header[:4] != ARCHIVE or info.flag_bits & 1:
                    raise ValueError(f"no record {info.filename[:100]}")
                skip = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
                places[info.filename] = info.header_offset + 30 + skip, info.file_size, info.CRC
                if info.file_size != info.compress_size or sum(places[info.filename][:2]) > size:
                    raise ValueError(f"{info.filename[:100]} is larger than the file")

        def record(name: str) -> bytes:
            offset, size, checksum = places[f"{root}/{name}"]
            with self.path.open("rb") as file:
                file.seek(offset)
                content = file.read(size)
            if self.checked and zlib.crc32(content) != checksum:
                raise WeightsError(
                    f"{self.path} is damaged: the checksum of its record {name} does not fit; download it again"
                )
            return content

        data = f"{root}/data/"
        self._places = {name.removeprefix(data): place for name, place in places.items() if name.startswith(data)}
        self._order = "big" if f"{root}/byteorder" in places and record("byteorder") == b"big" else "little"
        pickled = record("data.pkl")
        check_pickle(io.BytesIO(pickled), refused)
        reader = Unpickler(pickled, refused)
        content = reader.load()
        if missing := sorted(set(reader.storages) - set(self._places)):
            raise ValueError(f"no record data/{missing[0][:100]}")
        return content

    def _open_legacy(self, refused: str) -> Any:
        parts = []
        with self.path.open("rb") as file:
            file.seek(len(LEGACY))
            for _ in range(LEGACY_PICKLES):
                start = file.tell()
                check_pickle(file, refused)
                length = file.tell() - start
                file.seek(start)
                parts.append(file.read(length))
            version, system, content, keys = (Unpickler(part, refused) for part in parts)
            if version.load() != 1001:
                raise ValueError("an unknown version")
            self._order = "little" if system.load()["little_endian"] else "big"
            found = content.load()
            order = keys.load()
            if not isinstance(order, list) or set(order) != set(content.storages):
                raise ValueError("storages that differ from those in use")
            size = self.path.stat().st_size
            self._places = {}
            for key in order:
                storage = content.storages[key]
                count = int.from_bytes(file.read(8), self._order)
                if storage.kind not in BYTES:
                    raise WeightsError(f"{refused}it holds numbers of an unknown kind ({storage.kind[:100]})")
                length = storage.count * BYTES[storage.kind]
                if count != storage.count or file.tell() + length > size:
                    raise ValueError("storages of other sizes than told")
                self._places[key] = file.tell(), length, None
                file.seek(length, 1)
        return found


def _contiguous(tensor: Tensor) -> bool:
    step = 1
    for n, stride in zip(tensor.shape[::-1], tensor.stride[::-1], strict=True):
        if n != 1 and stride != step:
            return False
        step *= n
    return True
