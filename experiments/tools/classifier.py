"""The command that trains a classifier of photographs for `syncgap speciation`."""

import functools

from dit_jax.classifier import check_form, save_classifier, train_classifier
from dit_jax.disk import writing
from dit_jax.images import load_images
from experiments.tools.settings import MakeClassifier


def make_classifier(command: MakeClassifier) -> str:
    """Trains, tests and writes a classifier, and returns what is said of it.

    Raises:
      ValueError: images that cannot be read or trained on.
      CheckpointError: the file cannot be written.
    """
    check_form(command.size, command.epochs, command.batch_size)
    images, test = (
        load_images(
            source,
            command.size,
            not command.quiet,
            labels=command.classes or None,
            tell=functools.partial(print, flush=True),
        )
        for source in (command.images, command.test)
    )
    made = train_classifier(
        images, test, epochs=command.epochs, batch=command.batch_size, seed=command.seed, progress=not command.quiet
    )
    with writing(command.out):
        save_classifier(command.out, made)
    found = made.about["test"]
    low, high = (100 * end for end in found["interval"])
    right = f"right in {100 * found['accuracy']:.1f} % [{low:.1f}, {high:.1f}] of {found['images']} test images"
    return f"classifier: {command.out} ({right})"
