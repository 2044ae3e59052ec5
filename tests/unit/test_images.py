"""Images in folders and archives: each under its name, at random, from many threads; nothing from outside, nothing without a limit."""

from __future__ import annotations

import gzip
import hashlib
import io
import multiprocessing
import os
import pickle
import random
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zstandard
from PIL import Image

from megatron_infimed.errors import UserError
from megatron_infimed.intake import archives, images
from megatron_infimed.intake.images import open_images
from megatron_infimed.intake.records import BadImage, Stored
from tests.tiny import tiny_images

CONTAINERS = ("folder", "zip", "tar", "tar.gz", "tgz", "tar.zst")


def pack(target: Path, files: dict[str, bytes], kind: str) -> Path:
    """The files, in the order given, as a folder or archive of that kind."""
    path = target / f"pictures.{kind}" if kind != "folder" else target / "pictures"
    if kind == "folder":
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
            for name, data in files.items():
                out.writestr(name, data)
    else:
        plain = tar_bytes(*((tarfile.TarInfo(name), data) for name, data in files.items()))
        pressed = {
            "tar": bytes,
            "tar.gz": gzip.compress,
            "tgz": gzip.compress,
            "tar.zst": zstandard.ZstdCompressor(write_checksum=True).compress,
        }
        path.write_bytes(pressed[kind](plain))
    return path


def tar_bytes(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def reason(call: Callable[[], Any]) -> tuple[str, str]:
    with pytest.raises(BadImage) as bad:
        call()
    return bad.value.args  # type: ignore[return-value]


@pytest.mark.parametrize("kind", CONTAINERS)
def test_every_image_under_its_name_at_random_from_threads(tmp_path: Path, kind: str) -> None:
    names = [f"{'./' if k % 3 == 0 and kind != 'folder' else ''}deep/{k % 5}/{k:03}.jpg" for k in range(60)]
    files = dict(zip(names, tiny_images(60), strict=True))
    order = random.Random(1).sample(names, len(names))
    store = open_images([pack(tmp_path, {n: files[n] for n in order}, kind)], tmp_path / "spool")
    refs = {name: pickle.loads(pickle.dumps(store.find(name))) for name in names}
    wanted = random.Random(2).choices(names, k=400)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda n: images.read(refs[n]), wanted)) == [files[n] for n in wanted]
    assert images.load(refs[names[7]], "x") == files[names[7]]
    assert len(set(refs.values())) == 60 and str(refs[names[1]]).endswith("/deep/1/001.jpg")


def test_several_places_are_searched_in_order(tmp_path: Path) -> None:
    a, b, c = tiny_images(3)
    one, two = pack(tmp_path, {"x.jpg": a}, "zip"), pack(tmp_path, {"x.jpg": b, "y.jpg": c}, "tar")
    store = open_images([one, two])
    assert (images.read(store.find("x.jpg")), images.read(store.find("y.jpg"))) == (a, c)
    why, detail = reason(lambda: store.find("z.jpg"))
    assert why == "missing image file" and "z.jpg" in detail and one.name in detail and two.name in detail


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("name", ["../secret.jpg", "a/../../secret.jpg", "/etc/passwd", "..", "a/../.."])
def test_no_name_leads_out(tmp_path: Path, kind: str, name: str) -> None:
    (tmp_path / "secret.jpg").write_bytes(tiny_images(1)[0])
    store = open_images([pack(tmp_path, {"a/x.jpg": tiny_images(1)[0]}, kind)], tmp_path / "spool")
    assert reason(lambda: store.find(name))[0] == "image path leaves the folder"


def test_links_are_not_followed_out_of_the_folder(tmp_path: Path) -> None:
    folder = pack(tmp_path, {"a.jpg": tiny_images(1)[0]}, "folder")
    (tmp_path / "secret.jpg").write_bytes(tiny_images(1)[0])
    (folder / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "inside.jpg").symlink_to("a.jpg")
    (folder / "up").symlink_to(tmp_path)
    (folder / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(folder / "pipe.jpg")
    (tmp_path / "alias").symlink_to(folder)
    for root in (folder, tmp_path / "alias"):
        store = open_images([root])
        assert images.read(store.find("inside.jpg")) == images.read(store.find("a.jpg"))
        for name in ("out.jpg", "up/secret.jpg"):
            assert reason(lambda store=store, name=name: store.find(name))[0] == "image path leaves the folder"
        for name in ("pipe.jpg", "loop.jpg"):
            assert reason(lambda store=store, name=name: store.find(name))[0] in ("missing image file", "unusable image path")


def odd(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def test_odd_members_of_a_tar(tmp_path: Path) -> None:
    a, b = tiny_images(2)
    path = tmp_path / "odd.tar"
    path.write_bytes(
        tar_bytes(
            (tarfile.TarInfo("a.jpg"), a),
            (odd("soft.jpg", tarfile.SYMTYPE, "/etc/passwd"), b""),
            (odd("hard.jpg", tarfile.LNKTYPE, "a.jpg"), b""),
            (odd("device.jpg", tarfile.CHRTYPE), b""),
            (odd("pipe.jpg", tarfile.FIFOTYPE), b""),
            (tarfile.TarInfo("../up.jpg"), b),
            (tarfile.TarInfo("/root.jpg"), b),
            (tarfile.TarInfo("twice.jpg"), a),
            (tarfile.TarInfo("./twice.jpg"), b),
        )
    )
    store = open_images([path])
    assert images.read(store.find("a.jpg")) == a
    for name in ("soft.jpg", "hard.jpg", "device.jpg", "pipe.jpg"):
        assert reason(lambda name=name: store.find(name))[0] == "archive member is not a plain file"
    assert reason(lambda: store.find("twice.jpg"))[0] == "two archive members of one name"
    for name in ("../up.jpg", "/root.jpg"):
        assert reason(lambda name=name: store.find(name))[0] == "image path leaves the folder"
    for name in ("up.jpg", "root.jpg", "etc/passwd"):
        assert reason(lambda name=name: store.find(name))[0] == "missing image file"


def test_odd_members_of_a_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "FILE_LIMIT", 100_000)
    link = zipfile.ZipInfo("soft.jpg")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    path = tmp_path / "odd.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out, pytest.warns(UserWarning, match="Duplicate name"):
        out.writestr(link, "/etc/passwd")
        out.writestr("../up.jpg", b"x")
        out.writestr("bomb.jpg", bytes(200_000))
        out.writestr("liar.jpg", bytes(50_000))
        out.writestr("packed.jpg", bytes(1000), zipfile.ZIP_LZMA)
        out.writestr("twice.jpg", b"1")
        out.writestr("twice.jpg", b"2")
    raw = path.read_bytes()
    at = raw.rindex(b"liar.jpg") - 46  # its entry in the central directory: 24 bytes in is the declared size
    path.write_bytes(raw[: at + 24] + (40).to_bytes(4, "little") + raw[at + 28 :])
    store = open_images([path])
    assert reason(lambda: store.find("soft.jpg"))[0] == "archive member is not a plain file"
    assert reason(lambda: store.find("bomb.jpg"))[0] == "image file too large"
    assert reason(lambda: store.find("twice.jpg"))[0] == "two archive members of one name"
    assert reason(lambda: images.read(store.find("liar.jpg"))) == ("unreadable image file", "Bad CRC-32 for file [name]")
    assert reason(lambda: images.read(store.find("packed.jpg"))) == (
        "unreadable image file",
        "compression method 14; zip it again with deflate",
    )


def test_a_read_has_a_limit(tmp_path: Path) -> None:
    with (tmp_path / "huge.jpg").open("wb") as out:
        out.truncate(archives.FILE_LIMIT + 2)  # a hole, no disk
    store = open_images([tmp_path])
    assert reason(lambda: images.read(store.find("huge.jpg"), 1 << 20)) == ("image file too large", "the limit is 1048576 bytes")
    (tmp_path / "huge.jpg").unlink()
    assert reason(lambda: images.read(Stored(str(tmp_path), "huge.jpg"))) == ("unreadable image file", "No such file or directory")


DAMAGE = {
    "zip": [lambda b: b[:-30], lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"PK\3\4 not a zip"],
    "tar": [
        lambda b: b[: len(b) // 2],
        lambda b: b[:-10240],
        lambda b: b"",
        lambda b: b[:512],
        lambda b: b[:148] + b"9" + b[149:],
        lambda b: b + b"x",
    ],
    "tar.gz": [lambda b: b[: len(b) // 2], lambda b: b[:-1], lambda b: b"", lambda b: b[:-6] + b"!" + b[-5:], lambda b: b + b"x"],
    "tar.zst": [lambda b: b[: len(b) // 2], lambda b: b[:-1], lambda b: b"", lambda b: b[:-3] + b"!!!", lambda b: b + b"x"],
}


@pytest.mark.parametrize(("kind", "damage"), [(kind, d) for kind, all_ in DAMAGE.items() for d in all_])
def test_a_damaged_archive_is_one_error(tmp_path: Path, kind: str, damage: Callable[[bytes], bytes]) -> None:
    path = pack(tmp_path, {f"{k}.jpg": data for k, data in enumerate(tiny_images(9))}, kind)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"pictures\..*(is damaged|cannot be decompressed).*get it again"):
        open_images([path], tmp_path / "spool")
    assert not list(tmp_path.glob("spool/*.part")) and not (kind != "zip" and kind != "tar" and list(tmp_path.glob("spool/*.tar")))


def test_two_tars_in_one_file_do_not_lose_the_second(tmp_path: Path) -> None:
    path = pack(tmp_path, {"a.jpg": tiny_images(1)[0]}, "tar")
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(UserError, match="data after the end of the archive"):
        open_images([path])


def test_a_compressed_tar_bomb_stops(tmp_path: Path) -> None:
    path = tmp_path / "bomb.tar.zst"
    path.write_bytes(zstandard.compress(tar_bytes((tarfile.TarInfo("a.jpg"), bytes(300 << 20)))))
    with pytest.raises(UserError, match="more than 250 times its size"):
        open_images([path], tmp_path / "spool")
    assert not list(tmp_path.glob("spool/*.part"))


def test_no_room_for_the_plain_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(tmp_path, {"a.jpg": tiny_images(1)[0]}, "tar.gz")
    with pytest.raises(UserError, match="give a folder for its plain copy"):
        open_images([path])
    monkeypatch.setattr(images.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(UserError, match=r"does not fit into .*spool: 0 MiB of it are made, 1 MiB are free"):
        open_images([path], tmp_path / "spool")


def _open_and_read(path: Path, spool: Path) -> bytes:
    return images.read(open_images([path], spool).find("3.jpg"))


def test_many_processes_make_one_plain_copy(tmp_path: Path) -> None:
    pictures = tiny_images(9)
    path = pack(tmp_path, {f"{k}.jpg": data for k, data in enumerate(pictures)}, "tar.gz")
    (tmp_path / "spool").mkdir()
    left_by_a_kill = tmp_path / "spool" / "x.part"
    left_by_a_kill.write_bytes(b"half")
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.starmap(_open_and_read, [(path, tmp_path / "spool")] * 8) == [pictures[3]] * 8
    assert len(list(tmp_path.glob("spool/*.tar"))) == 1 and list(tmp_path.glob("spool/*.part")) == [left_by_a_kill]


def _read_all(seed: int) -> bool:
    names = random.Random(seed).choices(sorted(_REFS), k=200)
    return all(hashlib.sha256(images.read(_REFS[n][0])).hexdigest() == _REFS[n][1] for n in names)


_REFS: dict[str, tuple[Stored, str]] = {}


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_forked_processes_share_an_archive(tmp_path: Path, kind: str) -> None:
    files = {f"{k}.jpg": data for k, data in enumerate(tiny_images(40))}
    store = open_images([pack(tmp_path, files, kind)], tmp_path / "spool")
    _REFS.update({n: (store.find(n), hashlib.sha256(data).hexdigest()) for n, data in files.items()})
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert all(pool.map(_read_all, range(12), chunksize=1))


def test_what_is_not_there(tmp_path: Path) -> None:
    for name, words in (("gone", "no such image folder"), ("gone.zip", "no such image archive"), ("note.txt", "no such image folder")):
        (tmp_path / "note.txt").write_text("x")
        with pytest.raises(UserError, match=rf"{name}: {words}; images lie in a folder or in \.zip"):
            open_images([tmp_path / name])


def encoded(image: Image.Image, format: str) -> bytes:
    out = io.BytesIO()
    image.save(out, format)
    return out.getvalue()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "JPEG2000", "PPM"])
def test_a_sound_image_passes_as_it_is_and_a_cut_one_does_not(format: str) -> None:
    data = encoded(Image.effect_noise((64, 48), 60).convert("RGB"), format)
    assert images.load(data, "x") == data
    why, detail = reason(lambda: images.load(data[: len(data) * 2 // 3], "x"))
    assert why == "corrupt image" and detail.startswith(f"{len(data) * 2 // 3} bytes: ")


def test_absurd_pixel_sizes_and_foreign_files() -> None:
    png = bytearray(encoded(Image.new("RGB", (8, 8)), "PNG"))
    png[16:24] = (100_000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    assert reason(lambda: images.load(bytes(png), "x"))[0] == "image too large"
    bmp = bytearray(encoded(Image.new("RGB", (8, 8)), "BMP"))
    bmp[18:26] = (60_000).to_bytes(4, "little") * 2
    assert reason(lambda: images.load(bytes(bmp), "x"))[0] == "image too large"
    for data in (b"", b"%PDF-1.4", b"<svg/>", b"%!PS-Adobe", bytes(1000)):
        assert reason(lambda data=data: images.load(data, "x"))[0] == "corrupt image"
