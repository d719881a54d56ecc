"""What scripts save beside weights: objects of any class are read past, and none of their code is run."""

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import os
import pathlib
import sys
import types
import uuid

import numpy as np
import pytest
import torch
from hostile import CONFIG, same, tensors, torch_file

from dit_jax.pickles import members
from dit_jax.torch_files import TorchFile
from dit_jax.weights import convert


class Kind(enum.Enum):
    LINEAR = "linear"


@dataclasses.dataclass
class Settings:
    rate: float = 0.1
    kind: Kind = Kind.LINEAR


class Attributes(dict):
    """As EasyDict and the containers of configuration libraries are."""

    def __init__(self, *args):
        super().__init__(*args)
        self.__dict__ = self


class Callback:
    """Whatever is done when it is unpickled would be seen."""

    ran: list = []  # noqa: RUF012 (all instances share it, on purpose)

    def __reduce__(self):
        return Callback.rebuild, (1,)

    def __setstate__(self, state):
        Callback.ran.append(state)

    @staticmethod
    def rebuild(*args):
        Callback.ran.append(args)
        return Callback()


def omegaconf():
    """Classes of the names, and instances of the layout, that OmegaConf pickles."""
    module = types.ModuleType("omegaconf.dictconfig")
    for name in ("DictConfig", "AnyNode", "ContainerMetadata"):
        cls = type(name, (), {"__module__": module.__name__, "__qualname__": name})
        setattr(module, name, cls)
    sys.modules.update({"omegaconf": types.ModuleType("omegaconf"), module.__name__: module})

    def node(value):
        if isinstance(value, dict):
            made = module.DictConfig()
            made.__dict__ |= {"_metadata": module.ContainerMetadata(), "_parent": None, "_content": {}}
            made._content |= {key: node(each) for key, each in value.items()}
        else:
            made = module.AnyNode()
            made.__dict__ |= {"_metadata": None, "_val": value}
        return made

    return node({"model": {"num_heads": 2, "num_classes": 3}, "diffusion": {"prediction": "v"}})


METADATA = {
    "NumPy scalars": lambda: {"loss": np.float64(0.5), "step": np.int64(3), "flag": np.bool_(True)},
    "NumPy arrays": lambda: np.arange(6).reshape(2, 3),
    "sizes": lambda: torch.Size([1, 2]),
    "devices": lambda: [torch.device("cpu"), torch.device("cuda:0")],
    "dtypes": lambda: {"dtype": torch.float32, "numpy": np.dtype("f4"), "layout": torch.strided},
    "paths": lambda: {"out": pathlib.Path("runs") / "x", "pure": pathlib.PurePosixPath("a")},
    "default dictionaries": lambda: collections.defaultdict(list, {"a": [1]}),
    "counters and queues": lambda: {"count": collections.Counter("abc"), "last": collections.deque([1, 2], 5)},
    "sets": lambda: {"a": {1, 2}, "b": frozenset({3}), "c": slice(1, 2), "d": range(3), "e": 1j, "f": b"bytes"},
    "dates": lambda: [datetime.datetime(2026, 1, 1), datetime.timedelta(1), datetime.UTC],
    "numbers": lambda: [decimal.Decimal("0.1"), uuid.UUID(int=3)],
    "namespaces": lambda: [argparse.Namespace(a=1), types.SimpleNamespace(b=2)],
    "own classes": lambda: [Settings(), Kind.LINEAR, Attributes({"a": 1})],
    "functions": lambda: [len, np.mean, functools.partial(max, 1), Settings],
    "callbacks": lambda: Callback(),
    "generators": lambda: {"rng": torch.get_rng_state(), "numpy": np.random.get_state()},  # noqa: NPY002
    "modules": lambda: torch.nn.Linear(2, 2),
    "OmegaConf": omegaconf,
}


@pytest.mark.parametrize("form", ["archive", "archive of protocol 4", "legacy"])
@pytest.mark.parametrize("kind", METADATA)
def test_metadata_is_read_past(tmp_path, kind, form):
    Callback.ran.clear()
    value = METADATA[kind]()
    other = {"optimizer": {"state": {0: value}}, "extra": [value], "more": value}
    options = {"pickle_protocol": 4} if form == "archive of protocol 4" else {}
    path = tmp_path / "model.pt"
    torch.save({"model": tensors(), **other}, path, _use_new_zipfile_serialization=form != "legacy", **options)
    same(path)
    assert not Callback.ran
    for name in ("omegaconf", "omegaconf.dictconfig"):
        sys.modules.pop(name, None)


def test_arguments_of_a_configuration_library_are_understood(tmp_path):
    """Through containers and nodes whose classes are not there."""
    torch.save({"state_dict": tensors(), "hyper_parameters": {"cfg": omegaconf()}}, tmp_path / "model.pt")
    del sys.modules["omegaconf.dictconfig"], sys.modules["omegaconf"]
    assert convert(tmp_path / "model.pt", input_size=4).config == dataclasses.replace(CONFIG, prediction="v")


def test_what_stands_for_an_object_does_nothing(tmp_path):
    """Also where a pickle calls what it made, sets its state and items, and extends it."""
    path = torch_file(tmp_path / "model.pt")
    torch.save(
        {"partial": functools.partial(os.path.join, "a"), "module": torch.nn.ReLU(), "own": Attributes({"a": 3})}, path
    )
    content = TorchFile(path).content
    assert all(type(value).__name__ == "Inert" for value in content.values())
    assert content["module"].name == "torch.nn.modules.activation ReLU"
    assert members(content["own"])["a"] == 3
    assert content["partial"](1, 2).args == (1, 2)
