"""What the page calls bands and the ends of the gap, by kind of modes."""

import xarray as xr

QUESTIONS = {
    "dct": "When does a diffusion transformer decide each spatial frequency of an image, what does coupling two "
    "of its trajectories do to that, and does the solvable theory say the same?",
    "pca": "When does a diffusion transformer decide each principal component of its data, what does coupling two of "
    "its trajectories do to that, and does the solvable theory, in which each component is one mode, say the same?",
    "colour": "Does a diffusion transformer decide luminance before chrominance, what does coupling two of its "
    "trajectories do to that, and does the solvable theory say the same?",
    "class": "When does a diffusion transformer decide what varies within a class along the directions that tell "
    "classes apart, what does coupling two of its trajectories do to that, and does the solvable theory say the same?",
}
BANDS = {
    "dct": "A band is a ring of spatial frequencies (of the DCT), named by its radius r, where 1 is "
    "the highest frequency along one axis; DC, the mean, is a band of its own.",
    "pca": "A band is a group of principal components of the training data within classes, named by their ranks; each "
    "group is twice the one before. What lies along later components is not measured.",
    "colour": "A band is luminance or chrominance at some frequencies: the first principal axis of the channels over "
    "the whole data, or the other two, at DC or in rings of the DCT (low: r up to 0.47; middle: up to 0.94; high).",
    "class": "A band is a group of principal directions between the means of the classes, named by their ranks. Both "
    "replicas of a pair have one class, so what differs along them is variation within the class, not its choice.",
}
SORTED = {
    "dct": "spatial frequency",
    "pca": "principal components of the data",
    "colour": "colour and spatial frequency",
    "class": "direction between classes",
}
_RANKED = {"pca": "components", "class": "directions"}


def modes_of(analysis: xr.Dataset) -> str:
    """The kind of modes of a run."""
    return analysis.attrs.get("modes", "dct")


def first_and_last(analysis: xr.Dataset) -> tuple[str, str]:
    """The two bands of the gap as a sentence has them, the first and the last."""
    kind = modes_of(analysis)
    if kind == "dct":
        return "the lowest", "the highest band"
    first, last = (str(analysis.band_name.values[analysis.attrs[f"{end}_band"]]) for end in ("low", "high"))
    if kind == "colour":
        first, last = (f"{name.replace(' ', ' at ')} frequencies" for name in (first, last))
        return first, last
    return f"the band of {_RANKED[kind]} {first}", f"the band of {_RANKED[kind]} {last}"
