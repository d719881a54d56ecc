"""One image file: what its pixels mean in every mode, which way up it is, and that it is read whole or not at all."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from dit_jax.image_decoding import decode, suffixes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns of what it mends in damaged files

SIDE = 16
RGB = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
GREY = np.arange(SIDE**2, dtype=np.uint8).reshape(SIDE, SIDE)  # every level once
HALF = np.arange(SIDE)[:, None].repeat(SIDE, 1) < SIDE // 2  # the upper half
PNG_GREY, PNG_RGB = 0, 2  # colour types


def saved(image, kind="PNG", **settings) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    content = io.BytesIO()
    image.save(content, kind, **settings)
    return content.getvalue()


def png(values, bits: int, colour: int, transparent=()) -> bytes:
    """A PNG of any depth (H, W) or (H, W, 3), with the transparent level or colour that its tRNS chunk names."""
    height, width = values.shape[:2]
    samples = values.reshape(height, -1)
    if bits == 16:
        rows = samples.astype(">u2").tobytes()
    else:
        unpacked = np.unpackbits(samples.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :]
        rows = np.packbits(unpacked.reshape(height, -1), axis=-1).tobytes()
    stride = len(rows) // height
    lines = b"".join(b"\0" + rows[i * stride : (i + 1) * stride] for i in range(height))
    trns = struct.pack(f">{len(transparent)}H", *transparent)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)), (b"tRNS", trns)]
    chunks += [(b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    made = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks:
        if body or name != b"tRNS":
            made += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return made


def tiff(rows: bytes, bits: int, photometric: int) -> bytes:
    """A grey TIFF of one strip, SIDE x SIDE, little-endian."""
    tags = {256: SIDE, 257: SIDE, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: SIDE, 279: len(rows)}
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag == 279 else 3, 1, value) for tag, value in tags.items())
    head = struct.pack("<2sHI", b"II", 42, 8 + len(rows))
    return head + rows + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)


def assert_grey(content: bytes, expected=GREY) -> None:
    np.testing.assert_array_equal(decode(content, SIDE), expected[..., None].repeat(3, -1))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bits_span_black_to_white(kind):
    assert_grey(saved((GREY * 257.0).astype(np.uint16), kind))


def test_depths_and_polarities_of_tiff():
    wide = GREY.astype("<u2")
    assert_grey(saved(Image.frombytes("I;16B", (SIDE, SIDE), (wide * 257).astype(">u2").tobytes()), "TIFF"))
    assert_grey(tiff((wide * 257).tobytes(), 16, photometric=1))
    assert_grey(tiff((wide * 257).tobytes(), 16, photometric=0), 255 - GREY)  # white is zero
    assert_grey(tiff(GREY.tobytes(), 8, photometric=0), 255 - GREY)
    twelve = np.round(GREY / 255 * 4095).astype(int).reshape(-1, 2)
    packed = np.stack([twelve[:, 0] >> 4, (twelve[:, 0] & 15) << 4 | twelve[:, 1] >> 8, twelve[:, 1] & 255], -1)
    assert_grey(tiff(packed.astype(np.uint8).tobytes(), 12, photometric=1))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_of_every_depth_and_what_is_transparent_in_it(bits):
    most = 2**bits - 1
    values = np.round(GREY / 255 * most).astype(int)
    expected = np.round(values / most * 255).astype(np.uint8)
    assert_grey(png(values, bits, PNG_GREY), expected)
    for level in {0, most // 3, most}:
        assert_grey(png(values, bits, PNG_GREY, [level]), np.where(values == level, 255, expected).astype(np.uint8))


def test_colour_of_sixteen_bits():
    wide = RGB.astype(int) * 257
    np.testing.assert_array_equal(decode(png(wide, 16, PNG_RGB), SIDE), RGB)
    hidden = decode(png(wide, 16, PNG_RGB, wide[3, 4]), SIDE)
    assert (hidden[3, 4] == 255).all()
    assert (hidden != RGB).any(-1).sum() == 1


@pytest.mark.parametrize("kind", ["TIFF", "PPM"])
def test_floating_point_numbers_from_zero_to_one_span_black_to_white(kind):
    assert_grey(saved(Image.fromarray(GREY.astype(np.float32) / 255), kind))


@pytest.mark.parametrize("worst", [1.5, 255.0, -0.1, np.nan, np.inf])
def test_floating_point_numbers_of_another_range_are_refused(worst):
    values = np.full((SIDE, SIDE), 0.5, np.float32)
    values[0, 0] = worst
    with pytest.raises(ValueError, match=r"only 0 .black. to 1 .white."):
        decode(saved(Image.fromarray(values), "TIFF"), SIDE)


def test_integers_whose_white_is_unknown_are_refused():
    with pytest.raises(ValueError, match="32-bit"):
        decode(saved(Image.fromarray(GREY.astype(np.int32)), "TIFF"), SIDE)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_a_turned_picture_is_turned_back(kind, orientation):
    inverse = [None, None, 0, 3, 1, 5, 2, 6, 4][orientation]  # Image.Transpose that undoes how a viewer turns it
    upright = Image.fromarray(np.kron(RGB[:2, :3], np.ones((8, 8, 1), np.uint8)))
    stored = upright if inverse is None else upright.transpose(Image.Transpose(inverse))
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"exif": exif} | {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    error = decode(saved(stored, kind, **settings), SIDE).astype(int) - decode(saved(upright), SIDE)
    assert np.abs(error).max() <= (4 if kind == "JPEG" else 0)
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(saved(stored, kind, **settings)))).size == upright.size


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_damaged_metadata_do_not_matter(exif):
    np.testing.assert_array_equal(decode(saved(RGB, exif=exif), SIDE), RGB)


def transparent(mode: str, hidden: int) -> bytes:
    """A picture whose upper half is fully transparent, and in which `hidden` is what nobody is to see."""
    colour, grey = RGB.copy(), GREY // 2 + 100
    colour[HALF], grey[HALF] = hidden, hidden
    alpha = Image.fromarray(np.where(HALF, 0, 255).astype(np.uint8))
    if mode.startswith("P"):
        indices = np.where(HALF, 0, 1 + GREY % 16).astype(np.uint8)
        picture = Image.fromarray(indices)
        picture.putpalette([hidden] * 3 + RGB.reshape(-1)[:48].tolist())
        return saved(picture, mode[1:] or "PNG", transparency=0 if mode != "P" else bytes([0, *[255] * 16]))
    if mode == "L":
        return saved(grey, transparency=hidden)
    if mode == "RGB":
        return saved(colour, transparency=(hidden,) * 3)
    picture = Image.fromarray(colour if mode.startswith("RGBA") else grey)
    picture.putalpha(alpha)
    kind = mode.removeprefix("RGBA").removeprefix("LA") or "PNG"
    return saved(picture, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))


@pytest.mark.parametrize(
    "mode", ["RGBA", "LA", "P", "PPNG", "PGIF", "L", "RGB", "RGBAWEBP", "RGBATIFF", "RGBATGA", "LATIFF"]
)
def test_what_lies_under_full_transparency_is_white(mode):
    dark, bright = (decode(transparent(mode, hidden), SIDE) for hidden in (1, 90))
    np.testing.assert_array_equal(dark, bright)
    assert (dark[HALF] == 255).all()
    assert len(np.unique(dark[~HALF])) > 10


def test_half_transparency_is_half_white():
    picture = Image.fromarray(RGB)
    picture.putalpha(128)
    seen = decode(saved(picture), SIDE)
    np.testing.assert_allclose(seen, RGB * (128 / 255) + 255 * (127 / 255), atol=1)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("CMYK", "TIFF"), ("CMYK", "JPEG"), ("YCbCr", "TIFF"), ("LAB", "TIFF"), ("P", "PNG"), ("P", "BMP"), ("1", "PNG")],
)
def test_colours_of_other_spaces_arrive(mode, kind):
    smooth = Image.fromarray(RGB[:2, :2]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    if mode == "LAB":
        from PIL import ImageCms

        profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
        other = ImageCms.buildTransform(*profiles, "RGB", "LAB").apply(smooth)
    else:
        other = smooth.convert(mode)
    error = decode(saved(other, kind), SIDE).astype(int) - np.asarray(smooth if mode == "LAB" else other.convert("RGB"))
    assert np.abs(error).mean() < 8


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_frame_counts(kind):
    if f".{kind.lower()}" not in suffixes():
        pytest.skip(f"this build of Pillow does not read {kind}")
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "lime", "blue")]
    seen = decode(saved(frames[0], kind, save_all=True, append_images=frames[1:]), SIDE)
    assert np.abs(seen.astype(int) - [255, 0, 0]).max() <= 4


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_pictures_of_any_shape_are_resized(shape):
    content = saved(np.broadcast_to(np.uint8([10, 200, 30]), (*shape, 3)).copy())
    np.testing.assert_array_equal(decode(content, SIDE), np.broadcast_to([10, 200, 30], (SIDE, SIDE, 3)))


def test_the_centre_is_kept():
    wide = np.zeros((SIDE, 3 * SIDE, 3), np.uint8)
    wide[:, SIDE:-SIDE] = RGB
    np.testing.assert_array_equal(decode(saved(wide), SIDE), RGB)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"  # a program, not a picture
CUT = ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "TGA", "JPEG2000", "PCX", "SGI", "QOI"]


@pytest.mark.parametrize("kind", CUT)
def test_a_file_cut_short_is_read_whole_or_refused(kind):
    content = saved(RGB, kind)
    whole, refused = decode(content, SIDE), 0
    for length in {*range(0, len(content), 53), *range(len(content) - 8, len(content))}:
        try:
            seen = decode(content[:length], SIDE)
        except ValueError:
            refused += 1
        else:
            np.testing.assert_array_equal(seen, whole)
    assert refused > 5


def test_what_is_no_picture_is_refused_without_a_machine_address():
    for content, why in ((b"", "empty"), (b"\0" * 500, "not read|damaged"), (EPS, "not read")):
        with pytest.raises(ValueError, match=why) as caught:
            decode(content, SIDE)
        assert "0x" not in str(caught.value)


def test_damage_anywhere_raises_nothing_but_value_errors(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**5)  # a damaged size costs time otherwise
    rng = np.random.default_rng(1)
    for kind in ("PNG", "GIF", "TIFF", "BMP", "TGA"):
        content = np.frombuffer(saved(RGB, kind), np.uint8)
        for _ in range(40):
            damaged = content.copy()
            damaged[rng.integers(0, min(len(content), 200), 3)] = rng.integers(0, 256, 3)
            try:
                assert decode(damaged.tobytes(), SIDE).shape == (SIDE, SIDE, 3)
            except ValueError:
                continue


def test_a_picture_of_very_many_pixels_is_refused():
    chunk = struct.pack(">IIBBBBB", 100_000, 100_000, 8, PNG_GREY, 0, 0, 0)
    content = png(GREY, 8, PNG_GREY)
    at = content.index(b"IHDR")
    head = b"IHDR" + chunk
    with pytest.raises(ValueError, match="pixels"):
        decode(content[:at] + head + struct.pack(">I", zlib.crc32(head)) + content[at + 21 :], SIDE)


def test_common_formats_are_among_the_suffixes_and_foreign_programs_are_not_asked():
    assert {".jpg", ".jpeg", ".jfif", ".png", ".gif", ".tif", ".tiff", ".webp", ".bmp", ".ppm", ".tga"} <= suffixes()
    assert not {".eps", ".ps", ".wmf", ".mpg", ".h5", ".txt", ""} & suffixes()
