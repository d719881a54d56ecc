"""The pickles of PyTorch's files, read without running anything that they name.

The unpickler knows dictionaries and dense tensors. For any other name it makes an inert object, which keeps what the
file says of it and does nothing; so metadata of any class is read past.
"""

import io
import pickle
import pickletools
import re
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from dit_jax.tensors import WeightsError

REAL = {
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
}
BYTES = {"LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1}
BYTES |= {"ComplexFloatStorage": 8, "ComplexDoubleStorage": 16, "UntypedStorage": 1}
BYTES |= {name: dtype.itemsize for name, dtype in REAL.items()}
TUPLE_SIZE = 1000  # nested tuples included; hashing a larger key can take for ever or overflow the stack
CLASSES = 10_000  # that a file may name
# Functions that run commands or code, or open files. They would be as inert as any other name; but a file that asks for
# them is hostile, and is refused as a whole.
HOSTILE = re.compile(
    r"(os|posix|nt|sys|subprocess|shutil|socket|pty|ctypes|runpy|webbrowser|marshal|_?pickle)(\..*)? .*"
    r"|(builtins|__builtin__|_?io) (eval|exec|execfile|compile|open|__import__|input|breakpoint)"
    r"|importlib import_module"
)


class Storage(NamedTuple):
    """The numbers of one or more tensors."""

    kind: str  # PyTorch's name, for example "FloatStorage"
    key: str
    location: str
    count: int


class Tensor(NamedTuple):
    """A dense view of a storage, with offset and strides counted in numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def is_real(self) -> bool:
        return self.storage.kind in REAL and self.storage.location != "meta" and 0 not in self.shape


class Dictionary(dict):
    """Any of the standard library's dictionaries, and the attributes that were set on it."""

    attributes: Any = None

    def __init__(self, *args: Any):  # a default factory is left out
        super().__init__(*(arg for arg in args if isinstance(arg, list | dict)))

    def __setstate__(self, state: Any) -> None:
        self.attributes = state


class Inert:
    """An object of any other class: what the file says of it, and nothing done."""

    name = ""  # of the class
    args: tuple
    state: Any
    items: dict

    def __new__(cls, *args: Any, **_: Any) -> "Inert":
        self = super().__new__(cls)
        self.args, self.state, self.items = args, None, {}
        return self

    def __init__(self, *_: Any, **__: Any):
        pass

    def __call__(self, *args: Any, **_: Any) -> "Inert":
        return type(self)(*args)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, _: Any) -> None:
        pass

    extend = add = append


def members(value: Any) -> Mapping | None:
    """What is in a mapping, in the attributes of an inert object, or in a pickled PyTorch module; None for the rest."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, Inert):
        return None
    state = value.state if isinstance(value.state, dict) else {}
    if "_parameters" not in state:
        return {**state, **value.items} or None
    parts = (members(state.get(part)) or {} for part in ("_parameters", "_buffers", "_modules"))
    return {key: inner for part in parts for key, inner in part.items()}


class _Maker:
    """A function of ours that a pickle may call. Nothing can be set on it."""

    __slots__ = ("make", "name")

    def __init__(self, name: str, make: Callable[..., Any]):
        self.name, self.make = name, make

    def __call__(self, *args: Any) -> Any:
        return self.make(*args)

    def __setstate__(self, _: Any) -> None:
        raise TypeError(f"a state for {self.name}")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor | None:
    if not isinstance(storage, Storage):
        raise TypeError("a tensor without a storage")
    if len(rest) > 2 and rest[2]:  # its numbers are stored negated or conjugated
        return None
    found = Tensor(storage, offset, tuple(size), tuple(stride))
    if not all(isinstance(n, int) and 0 <= n < 2**63 for n in (offset, *found.shape, *found.stride)):
        raise ValueError("a tensor of no size")
    last = offset + sum((n - 1) * step for n, step in zip(found.shape, found.stride, strict=True))
    if 0 not in found.shape and last >= storage.count:
        raise ValueError("a tensor larger than its storage")
    return found


def _data(data: Any, *_: Any) -> Tensor | None:
    return data if isinstance(data, Tensor) else None


def _of_subclass(rebuild: Any, _: Any, args: Any, *__: Any) -> Tensor | None:
    return rebuild(*args) if isinstance(rebuild, _Maker) else None


_KNOWN: dict[str, Any] = {
    **dict.fromkeys(("collections OrderedDict", "collections defaultdict", "builtins dict"), Dictionary),
    "torch._utils _rebuild_tensor": _Maker("tensor", _tensor),
    "torch._utils _rebuild_tensor_v2": _Maker("tensor", _tensor),
    "torch._utils _rebuild_parameter": _Maker("parameter", _data),
    "torch._utils _rebuild_parameter_with_state": _Maker("parameter", _data),
    "torch._tensor _rebuild_from_type_v2": _Maker("subclass", _of_subclass),
}


class Unpickler(pickle.Unpickler):
    """Reads one pickle that `check_pickle` has passed. `refused` begins what is said of a hostile file."""

    def __init__(self, content: bytes, refused: str):
        super().__init__(io.BytesIO(content), encoding="latin1")
        self.refused = refused
        self.storages: dict[str, Storage] = {}
        self.classes: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module} {name}"
        if HOSTILE.fullmatch(full):
            raise WeightsError(
                f"{self.refused}it holds pickled objects other than dense tensors ({full[:100]}), which are never "
                "loaded because that would run code from the file. This one has no place in a checkpoint: get the file "
                "from its publisher again, as .safetensors if there is such a file"
            )
        if full in _KNOWN:
            return _KNOWN[full]
        if full not in self.classes:
            if len(self.classes) >= CLASSES:
                raise ValueError("too many classes")
            storage = module in ("torch", "torch.storage", "torch.cuda") and name in BYTES
            self.classes[full] = _Maker(name, _nothing) if storage else type("Inert", (Inert,), {"name": full})
        return self.classes[full]

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module" and isinstance(pid[1], type):
            return pid[1]  # a class, of which the old form has the source code too
        if not (isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage"):
            raise ValueError("an unknown persistent object")
        parts: list[Any] = list(pid)
        kind, key, location, count = parts[1:5]
        if parts[5:] not in ([], [None]):
            raise ValueError("a view of a storage, as PyTorch wrote them before version 0.4")
        name = getattr(kind, "name", None)
        fits = isinstance(name, str) and isinstance(key, str) and isinstance(location, str) and isinstance(count, int)
        if not fits or count < 0:
            raise ValueError("an unknown storage")
        found = Storage(str(name), key, location, count)
        if self.storages.setdefault(key, found)[0::3] != found[0::3]:
            raise ValueError("a storage of two sizes")
        return found


def _nothing(*_: Any) -> None:
    raise TypeError("a storage is not called")


def check_pickle(file: BinaryIO, refused: str) -> None:
    """Reads one pickle of a file, and raises an error if unpickling it could take far more memory or time than its size
    says.

    It follows the stack of the unpickler, on which it keeps a size: 0 for an empty tuple, 1 for what is not a tuple.
    Sizes are counted because tuples in tuples, used again by reference, can be of exponential size."""
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    for number, (opcode, found, _) in enumerate(pickletools.genops(file)):
        argument: Any = found
        needed, left = opcode.stack_before, opcode.stack_after
        if pickletools.markobject in needed:
            first = marks.pop()
            start = first - needed.index(pickletools.markobject)
        else:
            first = start = len(stack) - len(needed)
        if start < 0:
            raise ValueError("nothing left on the stack")
        popped = stack[first:]
        pushed: list[int] = [1] * len(left)
        if opcode.name == "MARK":
            marks.append(len(stack))
            pushed = []
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = popped[0]
            pushed = popped
        elif "PUT" in opcode.name:
            if argument > number:  # the unpickler makes a table of this length
                raise ValueError("a memo of no use")
            memo[argument] = stack[-1]
        elif "GET" in opcode.name:
            pushed = [memo[argument]]
        elif opcode.name == "DUP":
            pushed = popped * 2
        elif pickletools.pytuple in left:
            size = 1 + sum(popped) if popped else 0
            if size > TUPLE_SIZE:
                raise WeightsError(f"{refused}it holds tuples in tuples of more than {TUPLE_SIZE} parts")
            pushed = [size]
        stack[start:] = pushed
