"""Which files of a folder or zip are images, of which classes, in which order; nothing vanishes without a word."""

import os
import re
import struct
import unicodedata
import zipfile

import pytest

from dit_jax import image_files, image_listing
from dit_jax.class_names import resolve
from dit_jax.image_files import find_images, read_labels
from dit_jax.image_listing import DataError

UMLAUT = "B\u00e4r"  # composed; macOS has it decomposed


@pytest.fixture(params=["folder", "zip"])
def made(request, tmp_path):
    """Makes a source that holds empty files of these paths; a path that ends with / is an empty folder."""

    def make(*paths, name="photos"):
        if request.param == "zip":
            with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
                for path in paths:
                    archive.writestr(path, b"")
            return tmp_path / f"{name}.zip"
        for path in paths:
            place = tmp_path / name / path
            (place if path.endswith("/") else place.parent).mkdir(parents=True, exist_ok=True)
            if not path.endswith("/"):
                place.touch()
        return tmp_path / name

    return make


def packed(path, entries, **settings):
    """A zip of these (name or ZipInfo, content)."""
    with zipfile.ZipFile(path, "w", **settings) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return path


def found(files):
    """Paths of the images by class, classes in the order of their labels."""
    by_class = {name: [] for name in files.class_names}
    for parts, label in zip(files.paths, files.labels, strict=True):
        by_class[files.class_names[label]].append("/".join(parts))
    return by_class


def test_only_class_folders_are_classes(made):
    junk = [".ipynb_checkpoints/1.png", "cat/.ipynb_checkpoints/1.png", "__MACOSX/cat/._1.png", "cat/._1.png"]
    junk += ["@eaDir/1.jpg", "cat/@eaDir/1.jpg", ".Trashes/1.png", "$RECYCLE.BIN/1.png", "cat/Thumbs.db", ".DS_Store"]
    junk += ["System Volume Information/1.png", "__pycache__/1.png", "dog/.1.png", "lost+found/1.png"]
    files = find_images(made("cat/1.png", "dog/1.png", *junk))
    assert found(files) == {"cat": ["cat/1.png"], "dog": ["dog/1.png"]}
    told = files.left_out[image_listing.HIDDEN]
    assert {".ipynb_checkpoints", "cat/.ipynb_checkpoints", "cat/._1.png", "cat/@eaDir", "cat/Thumbs.db"} <= set(told)
    assert len(told) == len(junk)


def test_every_readable_format_in_any_case_counts(made):
    names = ["1.tif", "2.GIF", "3.JPEG", "4.Png", "5.jfif", "6.ppm", "7.TIFF", "8.webp", "9.tga"]
    assert found(find_images(made(*(f"owl/{name}" for name in names))))["owl"] == [f"owl/{name}" for name in names]


def test_what_is_left_out_is_said_with_the_reason(made):
    files = find_images(made("cat/1.png", "cat/notes.txt", "readme.png", "dog/list.csv", "owl/young/", "cat/2.heic"))
    assert found(files) == {"cat": ["cat/1.png"]}
    assert files.left_out == {
        image_listing.FORMAT: ("cat/2.heic", "cat/notes.txt", "dog/list.csv"),
        image_files.OUTSIDE: ("readme.png",),
        image_files.EMPTY: ("dog", "owl"),
    }
    said = files.describe()
    assert all(path in said for paths in files.left_out.values() for path in paths)
    assert all(reason in said for reason in files.left_out)


def test_classes_are_said_with_their_counts_in_the_order_of_their_labels(made):
    said = find_images(made("b/1.png", "a/1.png", "b/2.png")).describe()
    assert re.search(r"3 images in 2 classes, by label\n +0: a \(1\), 1: b \(2\)$", said)


def test_a_name_cannot_write_to_the_terminal(tmp_path):
    said = find_images(packed(tmp_path / "set.zip", [("a\x1b[2J\n/1.png", b""), ("b/1.png", b"")])).describe()
    assert "\x1b" not in said
    assert said.count("\n") == 1


def test_a_class_in_a_format_that_is_not_read_does_not_vanish(made):
    source = made("cat/1.png", "owl/1.HEIC", "owl/2.heic")
    with pytest.raises(DataError, match=r"owl.*HEIC.*convert.*--labels"):
        find_images(source)
    assert found(find_images(source, ["cat"])) == {"cat": ["cat/1.png"]}


def test_pictures_around_class_folders_are_no_class(made):
    files = find_images(made("set/overview.png", "set/cat/1.png", "set/dog/1.png", "logo.png"))
    assert files.class_names == ("cat", "dog")
    assert files.left_out[image_files.OUTSIDE] == ("logo.png", "set/overview.png")


def test_a_set_without_classes_is_one_that_lacks_a_folder(made):
    with pytest.raises(DataError, match=r"no images in class folders.*needs one folder(.|\n)*1\.png"):
        find_images(made("1.png", "2.png"))
    assert find_images(made("all/1.png", name="other")).class_names == ("all",)


def test_folders_of_one_name_are_not_merged(made):
    files = find_images(made("set/cars/jaguar/1.png", "set/cats/jaguar/2.png", "set/cats/lynx/3.png"))
    assert found(files) == {
        "cars/jaguar": ["set/cars/jaguar/1.png"],
        "cats/jaguar": ["set/cats/jaguar/2.png"],
        "lynx": ["set/cats/lynx/3.png"],
    }


@pytest.mark.parametrize(
    "paths",
    [
        ["train/cat/1.png", "test/cat/1.png"],
        ["set/Train/cat/1.png", "set/val/dog/1.png"],
        ["train/cat/1.png", "train/dog/1.png", "test/1.png"],
        ["cat/train/1.png", "cat/test/1.png", "dog/train/1.png"],
    ],
)
def test_parts_of_a_set_are_not_joined(made, paths):
    source = made(*paths)
    with pytest.raises(DataError, match=r"several parts of a set.*--labels"):
        find_images(source)
    assert found(find_images(source, [paths[0].rpartition("/")[0]])) == {paths[0].split("/")[-2]: [paths[0]]}


def test_one_part_of_a_set_is_a_set(made):
    assert find_images(made("train/cat/1.png", "train/dog/1.png")).class_names == ("cat", "dog")
    assert find_images(made("train/1.png", "airplane/1.png", name="vehicles")).class_names == ("airplane", "train")


def test_folders_named_by_numbers_are_in_the_order_of_the_numbers(made):
    names = [str(n) for n in range(12)]
    files = find_images(made(*(f"{name}/1.png" for name in names)))
    assert list(files.class_names) == names
    assert resolve(["2"], files.class_names, 12) == (files.labels[files.paths.index(("2", "1.png"))],) == (2,)
    assert "--classes" not in files.describe()
    padded = find_images(made(*(f"{name}/1.png" for name in ("010", "9", "10", "0009")), name="padded"))
    assert padded.class_names == ("0009", "9", "010", "10")
    assert "--classes takes labels" in padded.describe()  # which are not these numbers
    mixed = find_images(made("10/1.png", "9/1.png", "b/1.png", name="mixed"))
    assert mixed.class_names == ("10", "9", "b")


def test_both_spellings_of_an_accent_are_one_name(made):
    composed, decomposed = (unicodedata.normalize(form, UMLAUT) for form in ("NFC", "NFD"))
    one, other = (made(f"{name}/1.png", "Bzz/1.png", name=kind) for name, kind in ((composed, "c"), (decomposed, "d")))
    assert found(find_images(one)).keys() == found(find_images(other)).keys()
    assert find_images(other).class_names == ("Bzz", composed)
    assert find_images(other, [composed]).class_names == find_images(one, [decomposed]).class_names == (composed,)
    assert resolve([decomposed], find_images(one).class_names, 2) == (1,)
    with pytest.raises(DataError, match="different spellings"):
        find_images(made(f"{composed}/1.png", f"{decomposed}/1.png", name="both"))


def test_labels_give_the_order_and_the_choice(made):
    source = made("a/1.png", "b/1.png", "c/d/1.png")
    files = find_images(source, ["c/d/", "a"])
    assert found(files) == {"d": ["c/d/1.png"], "a": ["a/1.png"]}
    assert files.labels == (1, 0)  # the order of the images is by path, whatever their labels
    assert files.left_out == {image_files.UNLISTED: ("b",)}
    assert find_images(source, ["d", "b", "a"]).class_names == ("d", "b", "a")


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        (["a", "bb"], r"no class folder 'bb'.*near are b"),
        (["a", "b", "a"], "twice"),
        (["x"], r"several folders 'x': p/x, q/x"),
        (["empty"], "with images"),
    ],
)
def test_labels_that_name_no_class_folder_are_refused(made, labels, why):
    source = made("a/1.png", "b/1.png", "p/x/1.png", "q/x/1.png", "empty/")
    with pytest.raises(DataError, match=why):
        find_images(source, labels)


def test_a_file_of_labels(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_bytes("\ufeffowl \r\n\r\nB\u00e4r\r\nred panda\r\n".encode())
    assert read_labels(path) == ("owl", UMLAUT, "red panda")
    for content, why in ((b"\n \n", "no labels"), (b"\xff\xfe\0", "cannot be read")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=why):
            read_labels(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_labels(tmp_path / "nowhere.txt")


def test_links_to_class_folders_and_images_are_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.png").touch()
    source = tmp_path / "set"
    (source / "cat").mkdir(parents=True)
    (source / "cat" / "2.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    (source / "owl").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert found(find_images(source)) == {"cat": ["cat/2.png"], "owl": ["owl/1.png"]}
    (tmp_path / "elsewhere" / "1.png").unlink()
    with pytest.raises(DataError, match=r"cat/2\.png leads nowhere"):
        find_images(source)


def test_links_that_lead_back_are_not_followed(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    back = {"a/up": "", "a/self": "a", "a/other": "b", "b/other": "a", "c": "a"}
    for link, target in back.items():
        (tmp_path / link).symlink_to(tmp_path / target, target_is_directory=True)
    files = find_images(tmp_path)
    assert found(files) == {"a": ["a/1.png"], "b": ["b/1.png"]}
    assert files.left_out == {image_listing.AGAIN: tuple(sorted(back))}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").touch()
    os.mkfifo(tmp_path / "a" / "2.png")
    assert find_images(tmp_path).left_out == {image_listing.SPECIAL: ("a/2.png",)}


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "cat").mkdir()
    (tmp_path / "owl").mkdir()
    (tmp_path / "cat" / "1.png").touch()
    list_it = os.scandir

    def scandir(folder):
        if str(folder).endswith("owl"):
            raise PermissionError(13, "Permission denied")
        return list_it(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"owl cannot be listed .Permission denied"):
        find_images(tmp_path)


def test_a_name_that_is_not_utf8_is_told(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    with open(folder + b"/1.png", "wb"):
        pass
    with pytest.raises(DataError, match=r"caf\\udce9 is not in UTF-8"):
        find_images(tmp_path)


@pytest.mark.parametrize("way", ["./{}/{}", "{}\\{}", ".\\{}\\{}", "/{}/{}", "C:\\{}\\{}", "{}//{}", "set/./{}/{}"])
def test_paths_of_a_zip_however_they_are_written(tmp_path, way):
    entries = [(zipfile.ZipInfo(way.format(name, "1.png")), name.encode()) for name in ("cat", "dog")]
    files = find_images(packed(tmp_path / "set.zip", entries))
    assert files.class_names == ("cat", "dog")
    assert [content for _, content in files.read()] == [b"cat", b"dog"]


def test_paths_that_climb_are_left_out(tmp_path):
    files = find_images(
        packed(tmp_path / "set.zip", [("cat/1.png", b""), ("../dog/1.png", b""), ("cat/../x/1.png", b"")])
    )
    assert found(files) == {"cat": ["cat/1.png"]}
    assert files.left_out == {image_listing.UPWARD: ("../dog/1.png", "cat/../x/1.png")}


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_entries_of_one_path_the_last_counts(tmp_path):
    entries = [("cat/1.png", b"first"), ("cat/2.png", b"other"), ("./cat/1.png", b"second"), ("cat/1.png", b"last")]
    files = find_images(packed(tmp_path / "set.zip", entries))
    assert list(files.read()) == [("cat/1.png", b"last"), ("cat/2.png", b"other")]
    assert files.left_out == {image_listing.REPLACED: ("cat/1.png",)}


def test_names_that_finder_writes_are_utf8(tmp_path):
    path = packed(tmp_path / "set.zip", [("BXXr/1.png", b"x")])
    path.write_bytes(path.read_bytes().replace(b"BXXr", UMLAUT.encode()))  # and no flag says so
    files = find_images(path)
    assert files.class_names == (UMLAUT,)
    assert [content for _, content in files.read()] == [b"x"]


def test_an_encrypted_zip_is_told(tmp_path):
    path = packed(tmp_path / "set.zip", [("cat/1.png", b"x")])
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x03\x04") + 6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="encrypted"):
        find_images(path)


def test_a_link_in_a_zip_is_told(tmp_path):
    link = zipfile.ZipInfo("owl")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with pytest.raises(DataError, match="owl is a link"):
        find_images(packed(tmp_path / "set.zip", [("cat/1.png", b"x"), (link, b"/data/owl")]))


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(image_listing, "UNPACKED", 10**6)
    dense = {"compression": zipfile.ZIP_DEFLATED}
    bomb = packed(tmp_path / "bomb.zip", [(f"cat/{i}.png", bytes(2 * 10**5)) for i in range(6)], **dense)
    with pytest.raises(DataError, match=r"claims to unpack to 1,200,000, \d+ times as much"):
        find_images(bomb)
    noise = os.urandom(2 * 10**5)
    assert len(find_images(packed(tmp_path / "set.zip", [(f"cat/{i}.png", noise) for i in range(6)], **dense))) == 6
    small = packed(tmp_path / "small.zip", [("cat/1.png", bytes(10**6))], **dense)  # a flat picture packs well
    assert len(find_images(small)) == 1


def test_a_file_of_improbable_size_is_not_read(made, monkeypatch):
    files = find_images(made("cat/1.png"))
    monkeypatch.setattr(image_listing, "LARGEST_FILE", -1)
    with pytest.raises(DataError, match=r"cat/1\.png cannot be read .it has 0 bytes"):
        list(files.read())


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_entry_that_lies_about_its_size_is_stopped(tmp_path, method):
    path, claimed = tmp_path / "set.zip", 1000
    packed(path, [("cat/1.png", bytes(10**6))], compression=method)
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack("<I", 10**6), struct.pack("<I", claimed)))
    with pytest.raises(DataError, match=r"cat/1\.png cannot be read"):
        list(find_images(path).read())


@pytest.mark.parametrize("where", [60, -120])
def test_a_damaged_entry_is_named(tmp_path, where):
    path = packed(tmp_path / "set.zip", [("cat/1.png", bytes(200))])
    content = bytearray(path.read_bytes())
    content[where if where > 0 else content.index(b"PK\x03\x04") + 26] ^= 0x55
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cat/1\.png cannot be read"):
        list(find_images(path).read())


def test_a_file_that_is_gone_is_named(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").touch()
    files = find_images(tmp_path)
    (tmp_path / "cat" / "1.png").unlink()
    with pytest.raises(DataError, match=r"cat/1\.png cannot be read"):
        list(files.read())
