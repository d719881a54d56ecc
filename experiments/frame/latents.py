"""Pages about a model of latents say so: what studies call an image is a latent there."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.text import Text

from dit_jax.latents import VAE_CHANNELS

WORDS = {
    "an image": "a latent",
    "image": "latent",
    "images": "latents",
    "pixel": "latent pixel",
    "pixels": "latent pixels",
}
MEANING = (
    "what the network makes in the place of an image: its code by the autoencoder of the official models, of 4 "
    "channels and an eighth of the side. Bands are those of the latent, not of the picture that it decodes to"
)
# not inside of names and paths
_WORD = re.compile(r"(?<![\w./-])(an image|images?|pixels?)(?![\w/-]|\.\w)", re.IGNORECASE)


def of_latents(manifest: Mapping[str, Any]) -> bool:
    """Whether the network of a run with this manifest denoises latents, as the official models do."""
    return (manifest.get("model") or {}).get("in_channels") == VAE_CHANNELS


def spoken(entry: Any) -> Any:
    """Text, or the texts in lists and dictionaries, about a model of latents. Keys of dictionaries stay as they are."""
    if isinstance(entry, str):
        return _WORD.sub(_latent, entry)
    if isinstance(entry, dict):
        return {name: spoken(value) for name, value in entry.items()}
    return [spoken(each) for each in entry] if isinstance(entry, list) else entry


def drawn(figures: Mapping[str, Callable[[], Figure]]) -> dict[str, Callable[[], Figure]]:
    """Figures whose titles, axes and legends speak of latents."""

    def changed(draw: Callable[[], Figure]) -> Callable[[], Figure]:
        def figure() -> Figure:
            made = draw()
            for text in made.findobj(Text):
                assert isinstance(text, Text)
                text.set_text(spoken(text.get_text()))
            return made

        return figure

    return {name: changed(draw) for name, draw in figures.items()}


def _latent(found: re.Match[str]) -> str:
    word = WORDS[found[0].lower()]
    return word[0].upper() + word[1:] if found[0][0].isupper() else word
