"""Training on images or on a law that draws them: AdamW, warm-up, constant rate, linear decay; EMA; exact resume.

Every random choice of step s (batch, flips, label drops, timesteps, noise) is a function of (seed, s), so a run that
stops and resumes ends with the same bits as one that does not, and with the same log but for its seconds.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from PIL import Image
from tqdm import tqdm

from dit_jax.array_folder import load_arrays, save_arrays
from dit_jax.checkpoint import require_x64, save_model
from dit_jax.config import NetworkConfig
from dit_jax.controls import Network, make_network
from dit_jax.diffusion import network_denoiser, sample
from dit_jax.disk import write_json, writing
from dit_jax.images import ImageSet, image_grid, standardize, to_pixels
from dit_jax.lock import held
from dit_jax.objective import add_noise, losses, network_input
from dit_jax.training_config import TrainConfig, learning_rate
from dit_jax.training_log import LossLog
from dit_jax.training_run import RUN, extended, require_finite, require_finite_state, require_there, started
from ou_theory.clock import Clock
from ou_theory.keys import GENERATOR, random_key


class TrainingData(Protocol):
    """What a model is trained on: `Photographs`, what a transformation makes of them, or a law that draws."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W, C) of an image."""
        ...

    @property
    def may_mirror(self) -> bool:
        """Whether training may mirror the images at random (`TrainConfig.flip`): whether their law allows it."""
        ...

    def batch(self, config: TrainConfig, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Clean images (batch_size, H, W, C) float32 and labels (batch_size,), a function of (seed, step) alone."""
        ...

    def preparation(self) -> dict:
        """What a manifest needs to say about the data."""
        ...

    def pictures(self, x: np.ndarray) -> np.ndarray:
        """Images (..., H, W, C) as the network has them -> (..., H, W, 3) uint8 to look at."""
        ...


@dataclass(frozen=True)
class Photographs:
    """An `ImageSet` in epochs without replacement, standardised."""

    images: ImageSet

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.images.class_names

    @property
    def shape(self) -> tuple[int, ...]:
        return self.images.pixels.shape[1:]

    @property
    def may_mirror(self) -> bool:
        return True

    def batch(self, config: TrainConfig, step: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = batch_indices(config, len(self.images.pixels), step)
        return standardize(self.images.pixels[chosen], self.images.mean, self.images.std), self.images.labels[chosen]

    def preparation(self) -> dict:
        return self.images.preparation()

    def pictures(self, x: np.ndarray) -> np.ndarray:
        return to_pixels(x, self.images.mean, self.images.std)


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clipped AdamW; weight decay on matrices only, not on biases or embeddings of a single axis."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config),
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map_with_path(
                lambda path, _: any(getattr(p, "key", getattr(p, "name", None)) == "kernel" for p in path),
                params,
            ),
        ),
    )


def batch_indices(config: TrainConfig, count: int, step: int) -> np.ndarray:
    """Indices (batch_size,) of step `step`: epochs without replacement, each shuffled by (seed, epoch)."""
    per_epoch = max(1, count // config.batch_size)
    epoch, position = divmod(step, per_epoch)
    order = _epoch_order(config.seed, epoch, count)
    return np.resize(order, per_epoch * config.batch_size)[position * config.batch_size :][: config.batch_size]


@lru_cache(maxsize=8)
def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(count)
    order.flags.writeable = False
    return order


def make_step(model_config: NetworkConfig, config: TrainConfig, graph: nnx.GraphDef, constants, clock: Clock):
    """The jitted update ``(state, x0, labels) -> state, metrics``; the state's buffers are donated."""
    update = make_update(model_config, config, graph, constants, clock)
    mirrored = 0.5 if config.flip else 0.0
    return jax.jit(lambda state, x0, labels: update(state, x0, labels, config.seed, mirrored), donate_argnums=0)


def make_update(model_config: NetworkConfig, config: TrainConfig, graph: nnx.GraphDef, constants, clock: Clock):
    """The pure function of one training step, ``update(state, x0, labels, seed, mirrored, rate) -> state, metrics``.

    The seed and the share of images that are mirrored are arguments, in place of the config's, so that networks of one
    shape can be trained side by side under `jax.vmap`. `rate`, if given, multiplies the scheduled learning rate: for
    training that ends by the clock.

    Raises:
      ValueError: labels are to be dropped, and the network has no null label.
    """
    if config.label_dropout:
        model_config.need_null_label(f"label_dropout {config.label_dropout:g}", "train it with label_dropout 0")
    tx = optimizer(config)
    weight = np.ones(len(clock))
    if model_config.prediction == "epsilon":
        weight = np.minimum(1 + np.exp(-clock.log_snr), max(1.0, config.weight_cap))

    # one program for all layers makes training faster on a CPU; a GPU gains nothing and compiles it for minutes
    unroll = model_config.depth if jax.default_backend() == "cpu" else 1

    def loss_fn(params, x0, labels, noise, t):
        model = nnx.merge(graph, params, constants)
        timesteps = jnp.asarray(clock.timesteps)[t]
        x = network_input(add_noise(x0, noise, t, clock), t, clock)
        out = model(x, timesteps, labels, unroll=unroll)
        terms = losses(out.astype(x0.dtype), x0, noise, t, clock, model_config.prediction)
        return (jnp.asarray(weight, x0.dtype)[t] * terms.mse + terms.vb).mean(), terms

    def update(state, x0, labels, seed, mirrored, rate=None):
        keys = jax.random.split(jax.random.fold_in(random_key(seed), state["step"]), 5)
        size = x0.shape[0]
        flipped = jax.random.bernoulli(keys[0], mirrored, (size,))[:, None, None, None]
        x0 = jnp.where(flipped, x0[:, :, ::-1], x0)
        dropped = jax.random.bernoulli(keys[1], config.label_dropout, (size,))
        labels = jnp.where(dropped, model_config.num_classes, labels)
        # one timestep from each of `size` equal strata: uniform, with less variance than independent draws
        strata = (jax.random.permutation(keys[2], size) + jax.random.uniform(keys[3], (size,))) / size
        t = jnp.minimum((strata * len(clock)).astype(jnp.int32), len(clock) - 1)
        noise = jax.random.normal(keys[4], x0.shape, x0.dtype)
        (loss, terms), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["params"], x0, labels, noise, t)
        updates, opt = tx.update(grads, state["opt"], state["params"])
        if rate is not None:  # AdamW's step is proportional to its rate, decay of the weights included
            updates = jax.tree.map(lambda u: rate * u, updates)
        params = optax.apply_updates(state["params"], updates)
        step = state["step"] + 1
        decay = jnp.minimum(config.ema_decay, (1 + step) / (10 + step))
        ema = jax.tree.map(lambda e, p: e + (1 - decay).astype(e.dtype) * (p - e), state["ema"], params)
        metrics = {
            "loss": loss,
            "t": t,
            "mse": terms.mse,
            "vb": terms.vb,
            "grad_norm": optax.tree.norm(grads),
        }
        return {"params": params, "ema": ema, "opt": opt, "step": step}, metrics

    return update


def initial_state(params: nnx.State, config: TrainConfig) -> dict[str, Any]:
    """What `make_update` carries on, before the first step."""
    return {
        "params": params,
        "ema": jax.tree.map(jnp.copy, params),
        "opt": optimizer(config).init(params),
        "step": jnp.zeros((), jnp.int32),
    }


def train(
    data: TrainingData | ImageSet,
    model_config: NetworkConfig,
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    checkpoint_every: int = 500,
    log_every: int = 50,
    command: str = "",
    progress: bool = True,
    then: Callable[[Path], None] | None = None,
) -> Path:
    """Trains a model; leaves ``model/`` (the EMA weights, with manifest), ``log.jsonl`` and ``samples.png`` in `out`.

    Args:
      data: training set, of the config's input size.
      out: folder of this run; ``state/`` in it is the last checkpoint.
      resume: go on from the checkpoint in `out`, which must come from the same settings. More `steps` make the run
        longer, which the manifest records; see `learning_rate`.
      checkpoint_every: steps from one checkpoint to the next.
      log_every: steps that a line of the log stands for.
      then: adds to the folder of the trained model, while no other process may write the run.

    Returns:
      the folder of the trained model, which `load_model` reads.

    Raises:
      ValueError: the data do not fit the model, or may not be mirrored and `config.flip` asks for it; `out` holds
        another run, or the settings of a resumed run differ; another process trains there; a float64 model without x64;
        the disk refuses; the loss is not finite, and the last good checkpoint is kept.
    """
    out = Path(out)
    data = Photographs(data) if isinstance(data, ImageSet) else data
    _check_fit(data, model_config, config)
    for name, every in (("checkpoint_every", checkpoint_every), ("log_every", log_every)):
        if every < 1:
            raise ValueError(f"{name} must be at least 1, got {every}")
    require_x64(model_config.dtype)
    with held(out), writing(out):
        trained = _train(data, model_config, config, out, resume, checkpoint_every, log_every, command, progress)
        if then is not None:
            then(trained)
        return trained


def _train(
    data: TrainingData,
    model_config: NetworkConfig,
    config: TrainConfig,
    out: Path,
    resume: bool,
    checkpoint_every: int,
    log_every: int,
    command: str,
    progress: bool,
) -> Path:
    clock = model_config.training_clock()
    record = {"model": model_config.to_dict(), "training": config.to_dict(), "data": data.preparation()}
    before = started(out, record, resume)
    graph, params, constants = nnx.split(make_network(model_config, nnx.Rngs(random_key(config.seed))), nnx.Param, ...)
    state = initial_state(params, config)
    if before is not None:
        state = load_arrays(out / "state", state)
    first = kept = int(state["step"])
    config = dataclasses.replace(config, extensions=extended(before, config.steps, first))
    record |= {"training": config.to_dict()}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RUN, record)
    update = make_step(model_config, config, graph, constants, clock)
    log = LossLog(out / "log.jsonl", clock, learning_rate(config))
    log.rewind(first)
    hints = [f"a --learning-rate below {config.learning_rate:g}", *_other_dtype(model_config)]
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, desc="training", disable=not progress)
    previous: Any = None
    for step in bar:
        state, metrics = update(state, *data.batch(config, step))
        if previous is not None:  # looked at while this step is computed
            require_finite(step, previous, out, kept, hints)
        previous, done = metrics, step + 1
        log.add(metrics)
        writes, keeps = done % log_every == 0, done % checkpoint_every == 0 or done == config.steps
        if writes or keeps:
            require_finite(done, metrics, out, kept, hints)
        if writes:
            line = log.write(done)
            bar.set_postfix(loss=f"{line['loss']:.4f}", mse=f"{line['mse']:.4f}")
        if keeps:
            require_finite_state(done, state, out, kept, hints)
            require_there(out)
            log.keep(done)
            save_arrays(out / "state", state)
            log.forget(done)
            kept = done
    if log.rows:  # the last line may stand for fewer steps
        log.write(int(state["step"]))
    model = nnx.merge(graph, state["ema"], constants)
    _sample_grid(model, data).save(out / "samples.png")
    save_model(
        model,
        out / "model",
        extra={
            "data": data.preparation(),
            "training": record["training"],
            "generator": GENERATOR,
            "final_loss": log.lines()[-1],
            "command": command,
        },
        overwrite=True,
    )
    return out / "model"


def _other_dtype(config: NetworkConfig) -> list[str]:
    return [] if config.dtype != "bfloat16" else ["--dtype float32"]


def _check_fit(data: TrainingData, config: NetworkConfig, training: TrainConfig) -> None:
    shape = (config.input_size, config.input_size, config.in_channels)
    if data.shape != shape:
        raise ValueError(f"images are {data.shape}, the model takes {shape}")
    if len(data.class_names) != config.num_classes:
        raise ValueError(f"the data has {len(data.class_names)} classes, the model {config.num_classes}")
    if training.flip and not data.may_mirror:
        raise ValueError("flip mirrors images at random, which these data must not be; train on them with flip=False")


def _sample_grid(model: Network, data: TrainingData, per_class: int = 8, steps: int = 50, seed: int = 0) -> Image.Image:
    """One row of uncoupled DDIM samples per class (the first ten classes)."""
    config = model.config
    clock = config.clock(steps)
    rows = min(10, config.num_classes)
    labels = jnp.repeat(jnp.arange(rows), per_class)
    shape = (rows * per_class, config.input_size, config.input_size, config.in_channels)
    x = jax.random.normal(random_key(seed), shape)
    draw = jax.jit(lambda model, x, labels: sample(network_denoiser(model, clock), x, clock, labels)[0])
    pixels = data.pictures(jax.device_get(draw(model, x, labels)))
    grid = Image.fromarray(image_grid(pixels, per_class))
    return grid.resize((grid.width * 4, grid.height * 4), Image.Resampling.NEAREST)
