"""What a machine without a network needs beside this checkout: wheels of packages that it lacks, and training images.

`fill` collects both in the ignored folder ``carry/``; `site_folder` unpacks there the wheels that are missing, beside
what is installed and never over it.
"""

import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "carry"
# zarr and tyro with what they need, for Python 3.12 on x86-64; all other dependencies come with GPU images of JAX
ZARR = ("zarr", "numcodecs", "google-crc32c", "donfig", "msgspec", "pyyaml")
PACKAGES = (*ZARR, "tyro", "docstring-parser", "typeguard")
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (17, 24, 27, 28, 34, 35)] + ["manylinux2014_x86_64"]
SHEET = 40  # images per side of a sheet
SIZE = 16
PAIR = ("automobile", "horse")  # the two classes of Biroli et al. (2024), carried at PAIR_SIZE, too
PAIR_SIZE = 32


def fill(images: Path) -> None:
    """Collects the wheels by pip, and the images of a zip, at 16 x 16, without loss, as sheets per class; two of the
    classes, if they are among them, at 32 x 32, too."""
    wheels = FOLDER / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    where = [part for platform in PLATFORMS for part in ("--platform", platform)]
    chosen = ["--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp", *where]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "-d", str(wheels), *chosen, *PACKAGES], check=True)
    pack(images, FOLDER / "images.zip")
    pack(images, FOLDER / "pair.zip", PAIR_SIZE, PAIR)
    total = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    print(f"{FOLDER}: {total / 2**20:.1f} MiB")


def pack(images: Path, target: Path, size: int = SIZE, classes: tuple[str, ...] = ()) -> None:
    """Writes a zip of class folders, or some of its classes, as one of lossless sheets
    ``<class>/<number>_<count>.webp``."""
    import io

    import numpy as np
    from PIL import Image

    from dit_jax.images import load_images

    found = load_images(images, size)
    if not set(classes) <= set(found.class_names):
        return
    aside = target.with_suffix(".partial")
    with zipfile.ZipFile(aside, "w") as archive:
        for label, name in enumerate(found.class_names):
            if classes and name not in classes:
                continue
            pixels = found.pixels[found.labels == label]
            for first in range(0, len(pixels), SHEET**2):
                some = pixels[first : first + SHEET**2]
                full = np.zeros((SHEET**2, size, size, 3), np.uint8)
                full[: len(some)] = some
                sheet = full.reshape(SHEET, SHEET, size, size, 3).swapaxes(1, 2).reshape(SHEET * size, -1, 3)
                data = io.BytesIO()
                Image.fromarray(sheet).save(data, "WEBP", lossless=True, quality=100, method=4)
                archive.writestr(f"{name}/{first:06d}_{len(some)}.webp", data.getvalue())
    aside.replace(target)


def unpack(packed: Path):
    """The `ImageSet` of a zip that `pack` has written: the bits and the digest of `load_images` at its size."""
    import io

    import numpy as np
    from PIL import Image

    from dit_jax.images import image_set

    pixels, labels = [], []
    with zipfile.ZipFile(packed) as archive:
        files = sorted(archive.namelist())
        names = sorted({name.split("/")[0] for name in files})
        for name in files:
            count = int(name.rsplit("_", 1)[1].removesuffix(".webp"))
            with Image.open(io.BytesIO(archive.read(name))) as image:
                sheet = np.asarray(image.convert("RGB"))
            size = len(sheet) // SHEET
            tiles = sheet.reshape(SHEET, size, SHEET, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
            pixels.append(tiles[:count])
            labels.append(np.full(count, names.index(name.split("/")[0]), np.int32))
    return image_set(np.concatenate(pixels), np.concatenate(labels), tuple(names), str(packed))


def site_folder(out: Path) -> list[str]:
    """A folder with the carried wheels that are missing here, as a list to put on the path; empty if none is."""
    missing = [wheel for wheel in sorted((FOLDER / "wheels").glob("*.whl")) if not _installed(wheel)]
    if not missing:
        return []
    folder = (out / "site").resolve()
    for wheel in missing:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return [str(folder)]


def _installed(wheel: Path) -> bool:
    try:
        importlib.metadata.version(re.split("-", wheel.name, maxsplit=1)[0])
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
