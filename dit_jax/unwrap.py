"""Finds the weights in a checkpoint: under nested entries, under prefixes of keys, averaged ones beside raw ones."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from dit_jax.config import Which
from dit_jax.pickles import Inert, Tensor, members
from dit_jax.tensors import WeightsError

# parts of keys that training adds around a network or a block
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
BLOCK = re.compile(r"(|.*?\.)(?:transformer_)?blocks\.\d{1,6}\.")
MARKS = ("x_embedder.proj.weight", "pos_embed.proj.weight", "final_layer.linear.weight", "proj_out_2.weight")
DEPTH = 24  # of nested entries
MOST_ENTRIES = 500_000
EMA_NAMES = {"ema", "ema_model", "model_ema", "ema_state_dict", "ema_model_state_dict"}
COUNTS = {"n_averaged", "num_updates", "initted", "step"}  # that averaging keeps beside the weights
SHOWN = 4  # keys in an error
KEY_LENGTH = 80


def flattened(content: Mapping, label: str) -> dict[str, Any]:
    """Everything in nested mappings under one key each: the keys of the mappings, joined with dots. `label` names the
    file in errors.

    Raises:
      WeightsError: there are too many, or one key stands for two.
    """
    found: dict[str, Any] = {}
    visits = 0

    def walk(inner: Mapping, lead: str, depth: int) -> None:
        nonlocal visits
        odd = any(not isinstance(key, str) for key in inner)
        if odd and any(isinstance(key, str) and isinstance(value, Tensor) for key, value in inner.items()):
            raise WeightsError(f"{label} has keys that are not strings beside its tensors; it is no state dict")
        for key, value in inner.items():
            visits += 1
            if visits > MOST_ENTRIES or depth > DEPTH:
                raise WeightsError(f"{label} is nested too deeply, or holds too many entries")
            if not isinstance(key, str):
                continue  # as in the state of an optimizer
            name = ".".join(part for part in f"{lead}{key}".split(".") if part not in WRAPPERS)
            if nested := members(value):
                walk(nested, f"{name}." if name else "", depth + 1)
            elif name in found:
                raise WeightsError(f"{label} holds {name[:KEY_LENGTH]} twice, with and without a prefix")
            else:
                found[name] = None if isinstance(value, dict) else value

    walk(content, "", 0)
    return found


def unwrapped(
    entries: Mapping[str, Any], which: Which | None, prefix: str | None, label: str
) -> tuple[dict[str, Any], str, tuple[str, ...]]:
    """The entries of the one set of weights that is meant, with their own keys.

    Args:
      entries: of the whole file, see `flattened`.
      which: EMA or raw weights; by default EMA where there are some, and otherwise the only ones.
      prefix: of the keys of the weights, where that does not tell.

    Returns:
      entries: by the keys that are left behind the prefix.
      prefix: with its dot at the end, or "".
      notes: what the user should know of what was left out.

    Raises:
      WeightsError: there are no weights of a DiT in the file, or several and it is not clear which are meant.
    """
    found = list(dict.fromkeys(match[1] for key in entries if (match := BLOCK.match(key))))
    sets = [lead for lead in found if any(lead + mark in entries for mark in MARKS)] or found
    ema = [lead for lead in sets if _is_ema(lead)]
    raw = [lead for lead in sets if lead not in ema]
    notes = []
    if prefix is not None:
        lead = ".".join(part for part in prefix.strip(".").split(".") if part not in WRAPPERS)
        lead += "." if lead else ""
        if not any(key.startswith(lead) for key in entries):
            raise WeightsError(f"{label} has no entries under {prefix!r}; it has {_shown(entries)}{_of(sets)}")
    elif not sets:
        raise WeightsError(
            f"{label} has no entries blocks.0.*: it is not a DiT in the official form, nor in that of diffusers. "
            f"It has {_shown(entries)}"
        )
    elif which == "ema" and not ema and sets != [""]:
        raise WeightsError(f"{label} is without EMA weights that can be read{_of(sets)}; give --which model")
    elif which == "model" and sets == [""]:
        raise WeightsError(f"{label} is a bare state dict, without a part 'model'; leave --which out")
    elif which == "model" and not raw:
        raise WeightsError(f"{label} holds EMA weights alone{_of(ema)}; leave --which out")
    elif ema and which != "model":
        lead = _one(ema, label)
    elif which is None and sets != [""] and (empty := _empty_ema(entries)):
        raise WeightsError(
            f"{label} is without 'ema' weights that can be read: {empty!r} holds none{_of(raw)}; to read weights that "
            "are not averaged, give --which model"
        )
    else:
        lead = _one(raw, label)
        if lead and which is None:
            notes.append(f"the weights are those under {lead.rstrip('.')!r}, the only ones in the file")
    others = [other for other in sets if other != lead and other.startswith(lead)]
    chosen = {
        key.removeprefix(lead): value
        for key, value in entries.items()
        if key.startswith(lead) and not any(key.startswith(other) for other in others)
    }
    chosen = {
        key: value for key, value in chosen.items() if key not in COUNTS and ("." in key or _may_be_weights(value))
    }
    return chosen, lead, tuple(notes)


def _may_be_weights(value: Any) -> bool:
    return not isinstance(value, bool | int | float | str)


def _is_ema(name: str) -> bool:
    return any(re.match(r"ema(\d|model|$)", word) for word in re.split(r"[._/-]", name.lower()))


def _empty_ema(entries: Mapping[str, Any]) -> str | None:
    """A key of EMA weights, of which there are none that can be read; None if there is no such key."""
    for key, value in entries.items():
        first = key.split(".")[0]
        if first in EMA_NAMES or (_is_ema(first) and _may_be_weights(value)):
            return key[:KEY_LENGTH]
    return None


def _one(leads: list[str], label: str) -> str:
    if len(leads) > 1:
        raise WeightsError(
            f"{label} holds several sets of weights{_of(leads)}; say which, for example --prefix {max(leads[:2])[:-1]}"
        )
    return leads[0]


def _of(leads: Iterable[str]) -> str:
    names = ", ".join(repr(lead.rstrip(".")[:KEY_LENGTH]) if lead else "no prefix" for lead in leads)
    return f"; it has weights under {names}" if names else ""


def _shown(entries: Mapping[str, Any]) -> str:
    keys = [
        key[:KEY_LENGTH] + (f" ({value.name})" if isinstance(value, Inert) else "") for key, value in entries.items()
    ]
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"the entries {', '.join(keys[:SHOWN])}{more}" if keys else "no entries"
