"""What the shapes in a checkpoint do not tell of its model: what its file says of it elsewhere, or the user is asked.

A file says it in the metadata of this package's exports, in the config.json and scheduler of the diffusers form, and in
the arguments that training scripts save beside the weights.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dit_jax.config import DiTConfig, TimestepConvention
from dit_jax.pickles import members
from dit_jax.tensors import WeightsError

NullLabel = Literal["last", "none"]
METADATA = "syncgap"  # entry of a file's metadata, or attribute of its state dict, with the JSON of an export
ARGUMENTS = ("args", "hyper_parameters", "hparams", "config", "cfg")  # entries of training checkpoints
# Names under which scripts nest the arguments of a network and its diffusion. What is under others may be of another
# network, for example of an encoder.
GROUPS = {"args", "cfg", "config", "hparams", "model", "network", "net", "dit", "sit", "denoiser", "transformer"}
GROUPS |= {"params", "parameters", "kwargs", "model_args", "model_config", "model_kwargs", "model_params"}
GROUPS |= {"diffusion", "transport", "scheduler", "loss", "training"}
ARGUMENTS_DEPTH = 4
PREDICTION_NAMES = {
    "epsilon": ("epsilon", "eps", "noise"),
    "v": ("v", "v_prediction", "v-prediction"),
    "x0": ("x0", "x_0", "x_start", "xstart", "start_x", "sample"),
    "velocity": ("velocity", "flow", "flow_prediction"),
    "score": ("score",),
}
FLOW_PATHS = ("linear", "gvp", "vp")


@dataclass(frozen=True)
class Facts:
    """What is known of a model beside its shapes. None: nothing is."""

    prediction: str | None = None  # one of `PREDICTION_NAMES`
    num_heads: int | None = None
    num_classes: int | None = None
    null_label: NullLabel | None = None  # whether the last row of the label table is the null label's
    input_size: int | None = None  # side of the square input
    timestep_convention: TimestepConvention | None = None
    path: str | None = None  # "ddpm", or that of flow matching: one of `FLOW_PATHS`
    dtype: str | None = None  # in which the model computes


Said = tuple[str, Facts]  # what says it, and what it says


def option(name: str) -> str:
    """The option of the command line that gives a fact."""
    return "--" + name.replace("_", "-")


def told(said: list[Said]) -> list[str]:
    """What the arguments or the scheduler beside the weights said, in a line for each."""
    lines = []
    for source, facts in said:
        known = [f"{name} {value}" for name, value in dataclasses.asdict(facts).items() if value is not None]
        if known and source not in ("metadata", "config.json"):
            lines.append(f"by its {source}: {', '.join(known)}")
    return lines


def combined(asked: Facts, said: list[Said], label: str) -> Facts:
    """What the user and the file say together. `label` names the file in errors.

    Raises:
      WeightsError: two of them contradict each other.
    """
    known: dict[str, tuple[str, Any]] = {}
    for source, facts in [*said, ("", asked)]:
        for name, value in dataclasses.asdict(facts).items():
            if value is None:
                continue
            where, before = known.setdefault(name, (source, value))
            if before == value:
                continue
            if source:
                raise WeightsError(f"{label}: {name} is {before} by its {where}, and {value} by its {source}")
            raise WeightsError(
                f"{label}: {option(name)} {value} contradicts its {where}, which says {before}; leave the option out"
            )
    return Facts(**{name: value for name, (_, value) in known.items()})


# --- exports of this package


def export_metadata(config: DiTConfig, data: Mapping | None) -> str:
    """What an export says of itself: the config of its model, and how its training images were prepared."""
    return json.dumps({"config": config.to_dict(), "data": data})


def read_export(text: Any, label: str) -> tuple[Facts, Mapping | None]:
    """Inverts `export_metadata`.

    Raises:
      WeightsError: it is something else.
    """
    try:
        content = json.loads(text)
        config, data = DiTConfig.from_dict(content["config"]), content["data"]
        if not isinstance(data, dict | None):
            raise TypeError("data is no object")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise WeightsError(
            f"{label}: its metadata {METADATA!r} is not what an export writes ({str(error)[:200]}); export it again, or"
            " use the syncgap version that wrote it"
        ) from error
    told = {field.name: getattr(config, field.name, None) for field in dataclasses.fields(Facts)}
    return Facts(**{**told, "null_label": "last" if config.null_label else "none"}), data


# --- the diffusers form


def config_facts(config: Mapping) -> Facts:
    """What the config.json of a diffusers transformer says; its sizes are checked elsewhere. That library's label table
    has a null label at its end."""
    return Facts(
        prediction=_prediction(config.get("prediction_type")),
        num_heads=_count(config.get("num_attention_heads")),
        num_classes=_count(config.get("num_embeds_ada_norm")),
        null_label="last",
        input_size=_count(config.get("sample_size")),
    )


def scheduler_facts(scheduler: Mapping) -> Facts:
    """What the scheduler_config.json of a diffusers pipeline says."""
    if str(scheduler.get("_class_name", "")).startswith("FlowMatch"):
        return Facts(prediction="velocity", path="linear")
    return Facts(prediction=_prediction(scheduler.get("prediction_type")))


# --- training checkpoints


def training_facts(content: Mapping) -> list[Said]:
    """What the arguments in a training checkpoint say, by the names of common scripts."""
    return [(name, facts) for name in ARGUMENTS if (facts := argument_facts(content.get(name))) != Facts()]


def argument_facts(arguments: Any) -> Facts:
    """What arguments say, in nested mappings or in the attributes of objects."""
    found: dict[str, list] = {}
    _collect(arguments, found, ARGUMENTS_DEPTH)
    said = {name: values[0] for name, values in found.items() if all(value == values[0] for value in values)}
    path = str(said.get("path_type", "")).lower()
    prediction = _prediction(next((said[n] for n in ("prediction", "prediction_type", "pred_type") if n in said), None))
    if prediction == "v" and path in FLOW_PATHS:  # as REPA's script calls the velocity
        prediction = "velocity"
    if prediction is None and path == "":
        flags = {"predict_xstart": "x0", "predict_v": "v"}
        prediction = next((flags[name] for name in flags if said.get(name) is True), None)
    dropout = said.get("class_dropout_prob")
    return Facts(
        prediction=prediction,
        num_heads=_count(said.get("num_heads", said.get("num_attention_heads"))),
        num_classes=_count(said.get("num_classes")),
        null_label=None if not isinstance(dropout, int | float) else "last" if dropout > 0 else "none",
        path=path if path in FLOW_PATHS else None,
    )


def _collect(value: Any, found: dict[str, list], depth: int) -> None:
    """All numbers, texts and truth values in mappings and the `GROUPS` in them, by their own name."""
    inner = members(value)
    if inner is None or not depth:
        return
    inner = inner.get("_content", inner)  # OmegaConf's containers and nodes
    for name, each in list((members(inner) or {}).items())[:1000]:
        node = members(each)
        plain = node["_val"] if node is not None and "_val" in node else each
        if isinstance(plain, bool | int | float | str):
            found.setdefault(str(name), []).append(plain)
        elif str(name).lower() in GROUPS:
            _collect(each, found, depth - 1)


def _prediction(name: Any) -> str | None:
    name = str(name).lower()
    return next((ours for ours, theirs in PREDICTION_NAMES.items() if name in theirs), None)


def _count(value: Any) -> int | None:
    if isinstance(value, str) and value.isdecimal() and len(value) < 10:
        value = int(value)
    return value if type(value) is int and value > 0 else None


def metadata_facts(metadata: Mapping[str, str]) -> Facts:
    """What the metadata of a safetensors file say, in the words of arguments or of the model specification."""
    return argument_facts({key.removeprefix("modelspec."): value for key, value in metadata.items()})


# --- values


def token_grid(positions: np.ndarray) -> tuple[int, int] | None:
    """The rows and columns of tokens that a position embedding (T, D) is of: one half of its channels depends on the
    column alone and the other on the row alone. None if that holds for no grid, as for one that was learned, or for
    several."""
    tokens, width = positions.shape
    if width < 2 or not np.isfinite(positions).all():
        return None
    allowed = 1e-3 * np.abs(positions).max()
    found = []
    for rows in (n for n in range(1, tokens + 1) if tokens % n == 0):
        grid = positions.reshape(rows, tokens // rows, width)
        halves = grid[..., : width // 2], grid[..., width // 2 :]
        across, along = ([np.ptp(half, axis).max() <= allowed for half in halves] for axis in (0, 1))
        if (across[0] and along[1]) or (across[1] and along[0]):
            found.append((rows, tokens // rows))
    square = any(rows == columns for rows, columns in found)
    return found[0] if len(found) == 1 or (found and not square) else None
