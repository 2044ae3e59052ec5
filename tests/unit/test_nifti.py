"""NIfTI volumes made with nibabel: every orientation and number type shows the same anatomy; damaged ones come to a reason."""

from __future__ import annotations

import gzip
import io
import itertools
import random
import struct
import sys
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from megatron_infimed.errors import UserError
from megatron_infimed.intake import nifti
from megatron_infimed.intake.records import BadImage

nib = pytest.importorskip("nibabel")

REASONS = {
    *("not a NIfTI file", "not a NIfTI slice", "NIfTI slice out of range", "corrupt NIfTI", "unsupported NIfTI", "empty NIfTI volume"),
    "image too large",
}


def body(dtype: type = np.int16) -> np.ndarray:
    """RAS [20, 30, 10]: a block of tissue, and one darker voxel right of the middle, in front and above."""
    voxels = np.zeros((20, 30, 10), dtype)
    voxels[2:18, 3:27, 1:9] = 100
    voxels[15, 22, 7] = 60
    return voxels


def volume(voxels: np.ndarray, affine: np.ndarray | None = None, kind: type | None = None) -> bytes:
    return (kind or nib.Nifti1Image)(voxels, np.eye(4) if affine is None else affine).to_bytes()


def show(data: bytes, spec: str = "") -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(nifti.to_png(data, spec))))


def marker(picture: np.ndarray) -> tuple[int, int]:
    """(row, column) of the one pixel between background and tissue"""
    ((row, column),) = np.argwhere((picture > 0) & (picture < 255))
    return int(row), int(column)


def refused(data: bytes, spec: str = "z0") -> tuple[str, str]:
    with pytest.raises(BadImage) as e:
        nifti.to_png(data, spec)
    return e.value.args


def test_radiological_display():
    """The marker is on the patient's right (x 15 of 20), in front (y 22 of 30), above (z 7 of 10)."""
    data = volume(body())
    axial, coronal, sagittal = show(data, "z7"), show(data, "y22"), show(data, "x15")
    assert axial.shape == (30, 20) and marker(axial) == (30 - 1 - 22, 20 - 1 - 15), "right is left, anterior is up"
    assert coronal.shape == (10, 20) and marker(coronal) == (10 - 1 - 7, 20 - 1 - 15), "right is left, superior is up"
    assert sagittal.shape == (10, 30) and marker(sagittal) == (10 - 1 - 7, 30 - 1 - 22), "anterior is left, superior is up"
    assert marker(axial)[1] < 10 and marker(sagittal)[1] < 15


@pytest.mark.parametrize("codes", ["".join(c) for axes in itertools.permutations(("RL", "AP", "SI")) for c in itertools.product(*axes)])
def test_all_48_storage_orders_show_the_same_slices(codes):
    reference = nib.Nifti1Image(body(), np.eye(4))
    to = nib.orientations.axcodes2ornt(codes)
    stored = reference.as_reoriented(nib.orientations.ornt_transform(nib.orientations.io_orientation(np.eye(4)), to))
    assert "".join(nib.aff2axcodes(stored.affine)) == codes
    for spec in ("z7", "y22", "x15"):
        assert (show(stored.to_bytes(), spec) == show(reference.to_bytes(), spec)).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("order", ["<", ">"])
def test_number_types_and_byte_orders(dtype, order):
    voxels = (body() // 2).astype(dtype)
    made = nib.Nifti1Image(voxels, np.eye(4), header=nib.Nifti1Header(endianness=order))
    made.set_data_dtype(dtype)
    assert (show(made.to_bytes(), "z7") == show(volume(body()), "z7")).all()


@pytest.mark.parametrize("kind", ["Nifti1Image", "Nifti2Image"])
def test_versions_and_gzip(kind):
    data = volume(body(), kind=getattr(nib, kind))
    assert nifti.is_nifti(data) and nifti.is_nifti(gzip.compress(data))
    assert (show(gzip.compress(data), "z7") == show(volume(body()), "z7")).all()


def test_scaling_slope_and_intercept():
    plain = volume(body())
    scaled = bytearray(plain)
    struct.pack_into("<ff", scaled, 112, -3.0, 1000.0)  # scl_slope, scl_inter: turns the values round
    assert np.abs(show(bytes(scaled), "z7").astype(int) - (255 - show(plain, "z7"))).max() <= 2
    for useless in (0.0, float("nan"), float("inf")):
        struct.pack_into("<ff", scaled, 112, useless, 0.0)
        assert (show(bytes(scaled), "z7") == show(plain, "z7")).all()


def test_the_window_is_the_volumes():
    ramp = np.zeros((20, 20, 20), np.float32)
    ramp[:, :, 1:] = np.arange(1, 20) * 10
    low, high = np.percentile(ramp, 0.5), np.percentile(ramp[ramp > 0.1 * np.percentile(ramp, 99.5)], 99.5)
    for k in (0, 5, 12, 19):
        wanted = np.clip((k * 10 - low) / (high - low), 0, 1) * 255
        assert np.abs(show(volume(ramp), f"z{k}") - wanted).max() <= 1


def test_what_is_not_finite_is_black():
    voxels = body(np.float32)
    voxels[4, 4, 4], voxels[5, 4, 4], voxels[6, 4, 4] = np.nan, np.inf, -np.inf
    picture = show(volume(voxels), "z4")
    assert [picture[25, 19 - x] for x in (4, 5, 6)] == [0, 0, 0] and picture[25, 19 - 8] > 100


def test_pixels_become_square():
    data = volume(body(), np.diag([1.0, 1.0, 5.0, 1.0]))
    assert show(data, "z7").shape == (30, 20) and show(data, "y22").shape == (50, 20) and show(data, "x15").shape == (50, 30)
    stretched = Image.fromarray(show(volume(body()), "y22")).resize((20, 50), Image.Resampling.BILINEAR)
    assert (show(data, "y22") == np.asarray(stretched)).all()


def test_series_of_volumes():
    series = np.stack([body(), body()[::-1], body()[:, ::-1]], axis=3)
    data = volume(series)
    assert (show(data, "z7") == show(volume(body()), "z7")).all()
    assert marker(show(data, "z7t1")) == (7, 15) and marker(show(data, "z7t2")) == (22, 4)
    assert refused(data, "z7t3") == ("NIfTI slice out of range", "volume 3 of 3")
    assert {spec.find("t") for spec, _ in nifti.slices(data)} == {-1}, "the first volume"


def test_slices_with_something_in_them():
    specs = dict(nifti.slices(volume(body())))
    assert list(specs) == [*(f"x{k}" for k in range(2, 18)), *(f"y{k}" for k in range(3, 27)), *(f"z{k}" for k in range(1, 9))]
    assert specs["z7"] == {"plane": "axial", "slice": 7, "slices": 10}
    thick = [spec for spec, _ in nifti.slices(volume(body(), np.diag([1.0, 1.0, 5.0, 1.0])))]
    assert thick == [f"z{k}" for k in range(1, 9)], "planes across thick slices are left out"
    assert show(volume(body()), "").tolist() == show(volume(body()), "z5").tolist()


def test_oblique_volumes_take_the_closest_axes():
    turn = np.deg2rad(20)
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    assert (show(volume(body(), affine), "z7") == show(volume(body()), "z7")).all()


def test_no_header_text_leaves():
    made = nib.Nifti1Image(body(), np.eye(4))
    made.header["descrip"] = b"DOE^JANE 1950"
    data = made.to_bytes()
    assert b"DOE" in data and b"DOE" not in nifti.to_png(data, "z7")
    assert "DOE" not in str(list(nifti.slices(data)))


@pytest.mark.parametrize("spec", ["12", "w3", "z", "z-1", "z1t", "z1 ", "../z1", "z9999999"])
def test_a_spec_that_is_none(spec):
    assert refused(volume(body()), spec)[0] == "not a NIfTI slice"


def test_neighbours_read_the_volume_once(monkeypatch):
    read, calls = nifti._read, []
    monkeypatch.setattr(nifti, "_read", lambda *a: calls.append(1) or read(*a))
    one, two, three = (volume(body() + np.int16(k)) for k in range(3))
    for spec in ("z4", "z5", "y9"):
        show(one, spec)
    assert len(calls) == 1
    for data in (two, one, three, one):
        show(data)
    assert len(calls) == 3
    show(two)
    assert len(calls) == 4 and len(nifti._volumes._entries) == 2, "only the last two are kept"


def changed(offset: int, form: str, *values: float) -> bytes:
    data = bytearray(volume(body()))
    struct.pack_into(form, data, offset, *values)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a NIfTI file"),
        (b"\x1f\x8b", "not a NIfTI file"),
        (gzip.compress(b"hello"), "not a NIfTI file"),
        (volume(body())[:-1], "corrupt NIfTI"),
        (volume(body())[:352], "corrupt NIfTI"),
        (gzip.compress(volume(body()))[:-30], "corrupt NIfTI"),
        (changed(40, "<8h", 3, 8000, 8000, 8000, 1, 1, 1, 1), "image too large"),
        (changed(40, "<8h", 3, 32000, 10, 10, 1, 1, 1, 1), "corrupt NIfTI"),
        (changed(40, "<8h", 3, -5, 10, 10, 1, 1, 1, 1), "corrupt NIfTI"),
        (changed(40, "<8h", 0, 1, 1, 1, 1, 1, 1, 1), "corrupt NIfTI"),
        (changed(40, "<8h", 99, 1, 1, 1, 1, 1, 1, 1), "corrupt NIfTI"),
        (changed(40, "<8h", 3, 20, 30, 11, 1, 1, 1, 1), "corrupt NIfTI"),
        (changed(40, "<8h", 5, 20, 30, 5, 1, 2, 1, 1), "unsupported NIfTI"),
        (changed(70, "<h", 32), "unsupported NIfTI"),
        (changed(70, "<h", 128), "unsupported NIfTI"),
        (changed(70, "<h", 999), "corrupt NIfTI"),
        (changed(108, "<f", 2e9), "image too large"),
        (changed(108, "<f", float("nan")), "corrupt NIfTI"),
        (changed(116, "<f", float("nan")), "corrupt NIfTI"),
        (changed(280, "<4f", float("nan"), 0, 0, 0), "corrupt NIfTI"),
        (changed(280, "<4f", 0, 0, 0, 0), "corrupt NIfTI"),
        (volume(np.zeros((8, 8, 8), np.int16)), "empty NIfTI volume"),
        (volume(np.full((8, 8, 8), np.nan, np.float32)), "empty NIfTI volume"),
        (volume(body()[..., :3]), "NIfTI slice out of range"),
    ],
)
def test_what_cannot_be_read(data, reason):
    assert refused(data, "z7")[0] == reason


def test_a_gzip_bomb_is_not_unpacked():
    """10 GB of zeros behind a header that asks for little: only what the volume needs is decompressed."""
    once = gzip.compress(bytes(50_000_000))
    bomb = gzip.compress(volume(body())) + once * 200
    start = time.process_time()
    assert (show(bomb, "z7") == show(volume(body()), "z7")).all()
    assert time.process_time() - start < 1


def test_missing_nibabel_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(UserError, match=r"nibabel.*-e .\[formats\]"):
        nifti.to_png(volume(body()), "z7")


def test_damaged_volumes_come_to_a_reason_or_a_picture():
    rng, start, outcomes = random.Random(5), time.monotonic(), Counter()
    plain = volume(body())
    for k in range(300):
        data = bytearray(gzip.compress(plain) if k % 3 == 0 else plain)
        for _ in range(rng.choice((1, 2, 8))):
            at = rng.randrange(min(len(data), 400 if rng.random() < 0.8 else len(data)) or 1)
            match rng.randrange(5):
                case 0:
                    data = data[: max(at, 8)]
                case 1:
                    del data[at : at + rng.randrange(1, 20)]
                case _ if data:
                    data[at] ^= 1 << rng.randrange(8)
        try:
            list(nifti.slices(bytes(data)))
            Image.open(io.BytesIO(nifti.to_png(bytes(data), "z5"))).load()
            outcomes["picture"] += 1
        except BadImage as e:
            assert e.args[0] in REASONS, e.args
            outcomes[e.args[0]] += 1
    assert outcomes["picture"] > 50 and outcomes["corrupt NIfTI"] > 20, outcomes
    assert time.monotonic() - start < 20
