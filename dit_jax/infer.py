"""The config of a DiT from the shapes of its state dict, and from what else is known of it.

Nothing is guessed: what neither says becomes a line that names the option to give. Two things are taken for granted for
networks of the official sizes, and told (`assumptions`).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from dit_jax.config import NOISE_PATHS, PREDICTIONS, VARIANTS, DiTConfig
from dit_jax.facts import Facts
from dit_jax.tensors import Shape

SMALL_EMBEDDING = 2**22  # numbers that a position embedding of any network may have
IMAGENET = 1000  # classes of the official models
OF_FLOWS = ("velocity", "score")  # predictions of networks that are trained on a path of flow matching


def variant_name(config: DiTConfig) -> str | None:
    """The official name of this architecture at any input size, channels and classes; None if it has none."""
    names = ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio")
    for name, official in VARIANTS.items():
        if all(getattr(config, n) == getattr(official, n) for n in names):
            return name
    return None


def infer_config(
    shapes: Mapping[str, Shape], depth: int, facts: Facts, grid: Callable[[], tuple[int, int] | None] = lambda: None
) -> tuple[DiTConfig | None, list[str]]:
    """Infers the config from the shapes of an official state dict and what else is known.

    On a path of flow matching the config has no variance, even where the final layer has rows for one, unless an export
    says so; see `dit_jax.weights.used_entries`.

    Args:
      grid: gives what the values of the position embedding tell, see `dit_jax.facts.token_grid`; called where that is
        needed.

    Returns:
      the config to check shapes with, with anything for what is not told; None if the shapes do not tell a size.
      problems: one line for everything that cannot be inferred, or does not fit.
    """
    problems = []
    sizes: dict[str, Any] = {"depth": depth}

    def tell(name: str, value: Any, where: str) -> None:
        if value:
            sizes[name] = value
        else:
            problems.append(f"cannot tell {name}: it is read off {where}")

    # A size that many entries share is decided by their majority, so that a single misshapen entry is reported as such.
    width = _vote(shapes, r"pos_embed|x_embedder\.proj\.bias|.*embedding_table\.weight|.*(attn\.proj|mlp\.2)\.bias")
    hidden = _vote(shapes, r"blocks\.\d+\.mlp\.fc1\.bias")
    _, channels, patch, _ = _ranked(shapes, "x_embedder.proj.weight", 4)
    _, tokens, features = _ranked(shapes, "pos_embed", 3)
    outputs = (_ranked(shapes, "final_layer.linear.weight", 2)[0], _ranked(shapes, "final_layer.linear.bias", 1)[0])
    rows = _ranked(shapes, "y_embedder.embedding_table.weight", 2)[0]
    held = sum(math.prod(shape) for key, shape in shapes.items() if key != "pos_embed")
    if tokens * width > max(held, SMALL_EMBEDDING):  # asking for the model's shapes would compute it
        problems.append(f"{tokens} tokens of width {width} are more numbers than the rest of the file has")
    tell("hidden_size", width, "the biases")
    tell("mlp_ratio", width and hidden / width, "blocks.*.mlp.fc1.bias")
    tell("in_channels", channels, "x_embedder.proj.weight")
    tell("patch_size", patch, "x_embedder.proj.weight")
    tell("num_classes", rows, "y_embedder.embedding_table.weight, which has a row for each class")
    tell("input_size", tokens, "pos_embed, which has a row for each token")
    each = next((n for n in (1, 2) if patch**2 * channels * n in outputs), 0)  # numbers per channel of the image
    tell("learn_sigma", each, "final_layer.linear, with one or two rows per number in a patch")
    if problems:
        return None, problems
    sizes["learn_sigma"] = each == 2
    side, problem = _side(tokens, patch, facts.input_size, grid() if features == width else None)
    problems += [problem] if problem else []
    if not side:
        return None, problems
    null, problem = _has_null_label(rows, facts)
    problems += [problem] if problem else []
    sizes |= {"input_size": side * patch, "num_classes": max(rows - null, 1), "null_label": null}
    if facts.path is not None:
        sizes["path"] = facts.path
    elif facts.prediction in OF_FLOWS:
        problems.append(_ask_path(facts.prediction))
        sizes["path"] = "linear"
    if facts.prediction is None:
        problems.append(_ask_prediction())
    elif facts.prediction not in PREDICTIONS:
        problems.append(f"it predicts {facts.prediction!r}; only {', '.join(PREDICTIONS)} can be run here")
    else:
        sizes["prediction"] = facts.prediction
    if sizes.get("path", "ddpm") != "ddpm" and facts.learn_sigma is None:
        sizes["learn_sigma"] = False  # SiT makes a second half of outputs, never trains it, and cuts it away
    heads = facts.num_heads or _official_heads(depth, width, hidden)
    if heads is None:
        problems.append(
            f"cannot tell num_heads: no official variant has depth {depth} and width {width}; give it (--num-heads)"
        )
    sizes |= {name: value for name in ("timestep_convention", "dtype") if (value := getattr(facts, name))}
    try:
        return DiTConfig(**sizes, num_heads=heads or 1), problems
    except ValueError as error:
        return None, [*problems, str(error)]


def assumptions(config: DiTConfig, facts: Facts) -> list[str]:
    """What a conversion took for granted because it holds for every official model: a line for each."""
    notes = []
    if facts.path is None:
        notes.append("it is run on the noise schedule of DDPM, as the released DiTs are (--path)")
    if facts.num_heads is None:
        notes.append(
            f"{config.num_heads} attention heads, as all official networks of depth {config.depth} and width "
            f"{config.hidden_size} have: shapes do not tell them (--num-heads)"
        )
    if facts.num_classes is None and facts.null_label is None:
        notes.append(f"{config.label_rows} label rows are taken for {config.num_classes} classes and the null label")
    return notes


def _official_heads(depth: int, width: int, hidden: int) -> int | None:
    sizes = {(v.depth, v.hidden_size, v.mlp_size): v.num_heads for v in VARIANTS.values()}
    return sizes.get((depth, width, hidden))


def _side(tokens: int, patch: int, input_size: int | None, grid: tuple[int, int] | None) -> tuple[int, str | None]:
    """Tokens along a side of the square input, 0 if it is none, and what is wrong or not known."""
    side = math.isqrt(tokens)
    if grid is not None and grid[0] != grid[1]:
        rows, columns = grid
        return 0, f"pos_embed is of {rows} x {columns} tokens, by its values; only square inputs can be run"
    if side**2 != tokens:
        return 0, f"pos_embed has {tokens} tokens, which make no square; only square inputs can be run"
    if input_size not in (None, side * patch):
        return side, f"input_size {input_size} does not fit the {side} x {side} tokens of patch {patch} of pos_embed"
    return side, _ask_side(tokens, patch) if grid is None and input_size is None else None


def _has_null_label(rows: int, facts: Facts) -> tuple[bool, str | None]:
    """Whether the last of the label rows is that of the null label, and what is wrong or not known."""
    given = facts.num_classes
    null = given == rows - 1 if given is not None else facts.null_label == "last"
    if given not in (None, rows, rows - 1):
        return True, f"num_classes {given} does not fit {rows} label rows: one for each class, and one for a null label"
    if given is not None and facts.null_label not in (None, "last" if null else "none"):
        return null, f"num_classes {given} and null label {facts.null_label!r} do not fit {rows} label rows"
    if rows == 1 and null:
        return False, "there is a single label row: it cannot be the null label beside a class (--null-label none)"
    if given is None and facts.null_label is None and rows == 1:
        return False, None
    if given is None and facts.null_label is None and rows != IMAGENET + 1:
        return True, _ask_classes(rows)
    return null or (given is None and facts.null_label is None), None


def _vote(shapes: Mapping[str, Shape], pattern: str) -> int:
    """The size of the last axis that most entries with keys of this pattern have; 0 if there are no such entries."""
    found = Counter(shape[-1] for key, shape in shapes.items() if shape and re.fullmatch(pattern, key))
    return found.most_common(1)[0][0] if found else 0


def _ranked(shapes: Mapping[str, Shape], key: str, rank: int) -> Shape:
    """The shape of an entry; zeros if it is missing or not of this rank."""
    shape = shapes.get(key, ())
    return shape if len(shape) == rank else (0,) * rank


def _ask_prediction() -> str:
    return (
        "cannot tell prediction: no entry of the file says what the network predicts; give it "
        f"(--prediction {'|'.join(PREDICTIONS)}). The released DiTs predict epsilon, the noise. The released "
        "SiTs have the same keys and shapes, and predict a velocity (--prediction velocity --path linear)"
    )


def _ask_path(prediction: str) -> str:
    paths = "|".join(path for path in NOISE_PATHS if path != "ddpm")
    return (
        f"cannot tell path: a {prediction} is that of a path from data to noise, and no entry of the file says which; "
        f"give it (--path {paths}). The released SiTs are of the linear path"
    )


def _ask_classes(rows: int) -> str:
    return (
        f"cannot tell num_classes: {rows} label rows are {rows - 1} classes and a null label "
        f"(--num-classes {rows - 1}), or {rows} classes without one (--num-classes {rows})"
    )


def _ask_side(tokens: int, patch: int) -> str:
    side = math.isqrt(tokens)
    return (
        f"cannot tell input_size: the values of pos_embed, for {tokens} tokens, are those of no single grid; if they "
        f"are {side} x {side} tokens of patch {patch}, say so (--input-size {side * patch})"
    )
