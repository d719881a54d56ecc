"""One image file of any kind as 8-bit RGB: upright, on white where it is transparent, cropped and resized."""

import io
from functools import cache

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

# formats that Pillow leaves to other programs and libraries, and one of measured numbers, of which none is white
NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF", "FITS"}
PNM = {"PNG", "PPM"}  # formats whose wider integers Pillow gives the range of 16 bits
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF: two tags, and a value of the second
SPREAD = {"L;2": 85, "L;4": 17}  # what Pillow multiplies a grey PNG of few bits by, but not its transparent level


@cache
def formats() -> tuple[str, ...]:
    """Formats that Pillow decodes by itself, by its names."""
    Image.init()
    return tuple(name for name in Image.OPEN if name not in NOT_READ)


@cache
def suffixes() -> frozenset[str]:
    """Suffixes of files in these formats, in lower case, with their dot."""
    read = {*formats(), "MPO"}  # the pictures of a camera with several lenses, opened as the JPEG that comes first
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in read)


def decode(content: bytes, size: int) -> np.ndarray:
    """The image in a file, as the network is to see it.

    The first frame is taken, turned as its EXIF orientation says, and laid on white where it is transparent. Wide
    integers are scaled from 0..65535 (or the range that a TIFF gives), floating-point numbers from 0..1, to 0..255. The
    centre is cropped to a square and resized to size x size by the average over areas.

    Returns:
      (size, size, 3) uint8.

    Raises:
      ValueError: the content is not a whole image in a format that is read, or its numbers have no known range.
    """
    if not content:
        raise ValueError("it is empty")
    try:
        with Image.open(io.BytesIO(content), formats=formats()) as image:
            if min(image.size) < 1:
                raise ValueError(f"it has {image.width} x {image.height} pixels")
            fitted = ImageOps.fit(_rgb(image), (size, size), Image.Resampling.BOX)
    except UnidentifiedImageError as error:
        raise ValueError("it is damaged, or in a format that is not read") from error
    except Exception as error:  # damaged files raise many kinds
        raise ValueError(f"{error or type(error).__name__}") from error
    return np.asarray(fitted)


def _rgb(image: Image.Image) -> Image.Image:
    """An opened image, upright, in RGB."""
    if "transparency" in image.info and isinstance(image, ImageFile.ImageFile):
        _match_transparency(image)
    image.load()
    _turn(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _grey(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _turn(image: Image.Image) -> None:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # its metadata are damaged, and its pixels are not
        return


def _grey(image: Image.Image) -> Image.Image:
    """Grey of wide integers or floating-point numbers in 8 bits, with alpha where one level is transparent."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "F":
        white = 1
        if not (values.min() >= 0 and values.max() <= 1):  # a NaN is neither
            raise ValueError(
                f"its floating-point numbers are in {values.min():g}..{values.max():g}, and only 0 (black) to 1 "
                f"(white) is read; save it with 8 or 16 bits"
            )
    elif image.mode == "I" and image.format not in PNM:
        raise ValueError("what is white is not known for its signed or 32-bit numbers; save it with 8 or 16 bits")
    else:
        white = 2 ** tags.get(BITS, (16,))[0] - 1
    share = values / np.float32(white)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        share = 1 - share
    grey = Image.fromarray(np.round(255 * share).astype(np.uint8))
    level = image.info.get("transparency")
    if level is not None:
        grey.putalpha(Image.fromarray(np.where(values == level, 0, 255).astype(np.uint8)))
    return grey


def _match_transparency(image: ImageFile.ImageFile) -> None:
    """Brings the transparent colour of a PNG of other than 8 bits to the 8 bits that its pixels will have."""
    level, raw = image.info["transparency"], image.tile[0].args if image.tile else None
    raw = raw[0] if isinstance(raw, tuple) else raw
    if raw in SPREAD:
        image.info["transparency"] = level * SPREAD[str(raw)]
    elif raw == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in level)
