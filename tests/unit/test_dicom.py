"""Every file inside pydicom and pydicom-data, all transfer syntaxes: right pixels or a constant reason; then damaged ones."""

from __future__ import annotations

import io
import os
import random
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_infimed.errors import UserError
from megatron_infimed.intake import dicom, images
from megatron_infimed.intake.deid import BURNS_TEXT, DeidPolicy, Gate
from megatron_infimed.intake.kept import Kept
from megatron_infimed.intake.records import BadImage, Stored

pydicom = pytest.importorskip("pydicom")


def folder(module: str) -> Path:
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "data"


FILES = {path.name: path for root in (folder("pydicom"), folder("data_store")) for path in sorted(root.rglob("*")) if path.is_file()}
NO_GATE = Gate(DeidPolicy(allow_burned_in=("tests",)))
REASONS = {"not a DICOM file", "DICOM without pixels", "corrupt DICOM", "unsupported DICOM", "DICOM frame out of range", "image too large"}
# 8-bit values 1 apart are rounding; lossy JPEG decoders (libjpeg-turbo here, gdcm in pydicom's hands) may be 3 apart, more where chroma is upsampled
EXACT, LOSSY = 1, 3


def show(name: str, frame: int | None = None) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(dicom.to_png(FILES[name].read_bytes(), frame, "tests", NO_GATE))))


def data_set(name: str = "CT_small.dcm", **changes: object) -> bytes:
    """A file of the package with header fields changed (None removes)."""
    header = pydicom.dcmread(FILES[name])
    for keyword, value in changes.items():
        if value is None:
            delattr(header, keyword)
        else:
            setattr(header, keyword, value)
    out = io.BytesIO()
    header.save_as(out)
    return out.getvalue()


def test_every_file_of_the_packages_comes_to_pixels_or_a_reason():
    outcomes: Counter[str] = Counter()
    for path in FILES.values():
        data = path.read_bytes()
        try:
            rows = list(dicom.frames(data))
            image = Image.open(io.BytesIO(dicom.to_png(data, None, "tests", NO_GATE)))
        except BadImage as e:
            assert e.args[0] in REASONS, (path, e.args)
            outcomes[e.args[0]] += 1
        else:
            fields = rows[0][1]
            assert image.size == (fields["columns"], fields["rows"]) and image.mode in ("L", "RGB")
            assert len(rows) == fields["frames"] and [k for k, _ in rows] == list(range(len(rows)))
            low, high = np.asarray(image).min(), np.asarray(image).max()
            assert high > low, path
            outcomes[image.mode] += 1
    # "unsupported": 32 bits a sample (dose grids, SC_rgb_32bit); "corrupt": truncated, no transfer syntax, a broken code stream, "1A" frames
    assert outcomes["L"] >= 90 and outcomes["RGB"] >= 50, outcomes
    assert outcomes["unsupported DICOM"] == 12 and outcomes["corrupt DICOM"] <= 6, outcomes


def windowed(name: str, frame: int = 0) -> np.ndarray:
    """Gray display by pydicom's own pipeline: its pixels, its modality LUT, its window, scaled by the range it documents."""
    from pydicom.pixels import apply_modality_lut, apply_windowing, pixel_array

    header = pydicom.dcmread(FILES[name])
    values = apply_windowing(apply_modality_lut(pixel_array(header, index=frame), header), header, index=0)
    stored, signed = header.BitsStored, header.PixelRepresentation
    low, high = (-(2 ** (stored - 1)), 2 ** (stored - 1) - 1) if signed else (0, 2**stored - 1)
    if header.get("RescaleSlope") is not None:
        low, high = (v * header.RescaleSlope + header.RescaleIntercept for v in (low, high))
    gray = (values.astype(float) - low) / (high - low) * 255
    return 255 - gray if header.PhotometricInterpretation == "MONOCHROME1" else gray


@pytest.mark.parametrize(
    "name",
    (
        *("693_UNCR.dcm", "693_J2KR.dcm", "693_J2KI.dcm", "MR_small_implicit.dcm", "MR_small_bigendian.dcm", "MR_small_RLE.dcm"),
        *("MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR2_UNCR.dcm", "RG3_UNCR.dcm", "RG3_J2KI.dcm"),
    ),
)
def test_gray_is_what_pydicom_shows_through_the_window_of_the_header(name):
    assert np.abs(show(name) - windowed(name)).max() <= EXACT


def test_monochrome1_is_inverted():
    header = pydicom.dcmread(FILES["RG3_UNCR.dcm"])
    stored = header.pixel_array.astype(int)
    assert np.corrcoef(stored.ravel(), show("RG3_UNCR.dcm").ravel())[0, 1] < -0.8


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [(n, 0) for n in ("US1_UNCR.dcm", "US1_J2KR.dcm", "color-pl.dcm", "color-px.dcm", "ExplVR_BigEnd.dcm", "SC_rgb_rle.dcm")]
    + [(n, 0) for n in ("SC_ybr_full_uncompressed.dcm", "SC_rgb_small_odd.dcm", "SC_rgb_jls_lossy_line.dcm")]
    + [
        (n, LOSSY)
        for n in ("SC_rgb_dcmtk_+eb+cr.dcm", "SC_rgb_dcmtk_+eb+cy+n1.dcm", "SC_jpeg_no_color_transform.dcm", "SC_rgb_jpeg_dcmtk.dcm")
    ],
)
def test_colour_is_what_pydicom_decodes(name, tolerance):
    from pydicom.pixels import pixel_array

    assert np.abs(show(name).astype(int) - pixel_array(FILES[name], index=0)).max() <= tolerance


def test_planar_configuration_does_not_matter():
    assert (show("color-pl.dcm") == show("color-px.dcm")).all()


@pytest.mark.parametrize(("one", "other"), [("JPEG2000.dcm", "JPEG2000_UNC.dcm"), ("emri_small_jpeg_ls_lossless.dcm", "emri_small.dcm")])
def test_lossless_compression_changes_nothing(one, other):
    assert (show(one) == show(other)).all()


def test_lossless_jpeg_against_another_decoder():
    import imagecodecs
    from pydicom.encaps import get_frame

    header = pydicom.dcmread(FILES["JPEG-LL.dcm"])
    stored = imagecodecs.jpegsof3_decode(get_frame(header.PixelData, 0, number_of_frames=1)).astype(float)
    low, high = np.percentile(stored, (0.5, 99.5))
    assert np.abs(show("JPEG-LL.dcm") - np.clip((stored - low) / (high - low), 0, 1) * 255).max() <= EXACT


def test_12_bit_jpeg_extended():
    lossy, lossless = show("JPGExtended.dcm"), show("JPEG-LL.dcm")
    assert np.corrcoef(lossy.ravel(), lossless.ravel())[0, 1] > 0.97, "the same bone scan"


def test_signed_lossless_jpeg():
    """CT_small packed as lossless JPEG of 16 bits: negative values come back."""
    import imagecodecs
    from pydicom.encaps import encapsulate

    header = pydicom.dcmread(FILES["CT_small.dcm"])
    values = header.pixel_array - 500
    header.PixelData = encapsulate([imagecodecs.jpeg8_encode(values.view(np.uint16), lossless=True, bitspersample=16)])
    header["PixelData"].is_undefined_length = True
    header.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.70"
    header.RescaleIntercept += 500
    out = io.BytesIO()
    header.save_as(out)
    assert values.min() < 0
    assert (np.asarray(Image.open(io.BytesIO(dicom.to_png(out.getvalue(), None, "t")))) == show("CT_small.dcm")).all()


def test_palette():
    from pydicom.pixels import apply_color_lut

    header = pydicom.dcmread(FILES["OBXXXX1A.dcm"])
    assert np.abs(show("OBXXXX1A.dcm") - apply_color_lut(header.pixel_array, header) / 257).max() <= EXACT


def test_voi_lut_and_modality_lut():
    from pydicom.pixels import apply_modality_lut, apply_voi

    header = pydicom.dcmread(FILES["vlut_04.dcm"])
    bits = header.VOILUTSequence[0].LUTDescriptor[2]
    assert np.abs(show("vlut_04.dcm") - apply_voi(header.pixel_array, header) / (2**bits - 1) * 255).max() <= EXACT
    header = pydicom.dcmread(FILES["mlut_18.dcm"])
    values = apply_modality_lut(header.pixel_array, header)
    low, high = np.percentile(values, (0.5, 99.5))
    assert np.abs(show("mlut_18.dcm") - np.clip((values - low) / (high - low), 0, 1) * 255).max() <= EXACT


def test_without_a_window_16_bits_stretch_between_percentiles_and_8_bits_stay():
    stored = pydicom.dcmread(FILES["CT_small.dcm"]).pixel_array.astype(float)
    low, high = np.percentile(stored, (0.5, 99.5))
    assert np.abs(show("CT_small.dcm") - np.clip((stored - low) / (high - low), 0, 1) * 255).max() <= EXACT
    assert (show("image_dfl.dcm") == pydicom.dcmread(FILES["image_dfl.dcm"]).pixel_array).all()


@pytest.mark.parametrize(("centre", "width"), [(40, 0), (40, -5), (1e6, 10), ("", "")])
def test_a_useless_window_is_not_used(centre, width):
    data = data_set(WindowCenter=centre, WindowWidth=width)
    assert (np.asarray(Image.open(io.BytesIO(dicom.to_png(data, None, "t")))) == show("CT_small.dcm")).all()


def test_the_first_of_several_windows():
    one, two = data_set(WindowCenter=40, WindowWidth=400), data_set(WindowCenter=[40, 500], WindowWidth=[400, 1500])
    assert dicom.to_png(one, None, "t") == dicom.to_png(two, None, "t") != dicom.to_png(data_set(), None, "t")


def test_pixel_padding_is_outside_the_percentile_window():
    padded = pydicom.dcmread(FILES["CT_small.dcm"])
    pixels = padded.pixel_array.copy()
    pixels[:40] = -2000
    padded.PixelData, padded.PixelPaddingValue = pixels.tobytes(), -2000
    out = io.BytesIO()
    padded.save_as(out)
    shown = np.asarray(Image.open(io.BytesIO(dicom.to_png(out.getvalue(), None, "t"))))
    low, high = np.percentile(pixels[40:], (0.5, 99.5))
    assert np.abs(shown[40:] - np.clip((pixels[40:] - low) / (high - low), 0, 1) * 255).max() <= EXACT


def test_a_file_is_read_and_parsed_once_for_all_its_frames(tmp_path, monkeypatch):
    """By eight threads; a file that changes is read again."""
    header = pydicom.dcmread(FILES["CT_small.dcm"])
    values = header.pixel_array
    header.NumberOfFrames, header.PixelData = 40, b"".join((values + 8 * k).astype(np.int16).tobytes() for k in range(40))
    header.WindowCenter, header.WindowWidth = 0, 4096
    header.save_as(tmp_path / "clip.dcm")
    calls = Counter()
    for module, name in ((dicom, "_parse"), (images, "read")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name, **k: (calls.update([name]), real(*a, **k))[1])

    def show_all() -> list[int]:
        with ThreadPoolExecutor(8) as pool:
            files = pool.map(lambda k: images.load(Stored(str(tmp_path), "clip.dcm", str(k)), "t"), range(40))
            return [int(np.asarray(Image.open(io.BytesIO(f))).astype(int).sum()) for f in files]

    sums = show_all()
    assert sums == sorted(set(sums)) and calls == {"_parse": 1, "read": 1}, "each frame is its own, brighter than the one before"
    header.WindowCenter = 500
    header.save_as(tmp_path / "clip.dcm")
    os.utime(tmp_path / "clip.dcm", ns=(1, 1))
    assert show_all()[0] < sums[0] and calls == {"_parse": 2, "read": 2}


def test_kept_makes_each_value_once_and_keeps_no_failure():
    kept: Kept[int] = Kept(2)
    made: Counter[int] = Counter()

    def make(k: int) -> int:
        time.sleep(0.02)
        made[k] += 1
        if made[k] == 1 and k == 7:
            raise BadImage("first time", "")
        return k

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda k: kept.get(k, lambda: make(k)), [1] * 8 + [2] * 8)) == [1] * 8 + [2] * 8
    assert made == {1: 1, 2: 1}
    with pytest.raises(BadImage):
        kept.get(7, lambda: make(7))
    assert kept.get(7, lambda: make(7)) == 7 and kept.get(2, lambda: make(2)) == 2 and made == {1: 1, 2: 1, 7: 2}
    assert kept.get(1, lambda: make(1)) == 1 and made[1] == 2, "the oldest went"


def test_frames_of_a_clip():
    assert (show("emri_small.dcm", None) == show("emri_small.dcm", 5)).all(), "10 frames: the middle one"
    assert not (show("emri_small.dcm", 0) == show("emri_small.dcm", 9)).all()
    assert np.abs(show("emri_small_RLE.dcm", 7).astype(int) - show("emri_small.dcm", 7)).max() == 0
    for frame in (10, -1):
        with pytest.raises(BadImage) as e:
            show("emri_small.dcm", frame)
        assert e.value.args == ("DICOM frame out of range", f"frame {frame} of 10")


def test_one_frame_of_a_long_clip_costs_one_frame(monkeypatch):
    import imagecodecs

    decoded, decode = [], imagecodecs.jpeg8_decode
    monkeypatch.setattr(imagecodecs, "jpeg8_decode", lambda *a, **k: decoded.append(1) or decode(*a, **k))
    show("color3d_jpeg_baseline.dcm", 60)
    assert len(decoded) == 1


def test_enhanced_files_use_the_functional_group_of_their_frame():
    from pydicom.dataset import Dataset

    def item(**fields: float) -> list[Dataset]:
        made = Dataset()
        for keyword, value in fields.items():
            setattr(made, keyword, value)
        return [made]

    header = pydicom.dcmread(FILES["emri_small.dcm"])
    header.PerFrameFunctionalGroupsSequence = [Dataset() for _ in range(10)]
    for k, group in enumerate(header.PerFrameFunctionalGroupsSequence):
        group.FrameVOILUTSequence = item(WindowCenter=100 * (k + 1), WindowWidth=200)
    header.SharedFunctionalGroupsSequence = [Dataset()]
    header.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence = item(RescaleSlope=2, RescaleIntercept=-5)
    out = io.BytesIO()
    header.save_as(out)
    wanted = np.clip((header.pixel_array[3] * 2.0 - 5 - 399.5) / 199 + 0.5, 0, 1) * 255
    assert np.abs(np.asarray(Image.open(io.BytesIO(dicom.to_png(out.getvalue(), 3, "t")))) - wanted).max() <= EXACT


def test_only_safe_fields_leave():
    data = data_set(
        PatientName="DOE^JANE", StudyDescription="JANE DOE CHEST", BodyPartExamined="chest", Laterality="L", ViewPosition="Jane, 1950"
    )
    ((number, fields),) = dicom.frames(data)
    assert number == 0
    assert fields == {
        "rows": 128,
        "columns": 128,
        "frames": 1,
        "modality": "CT",
        "body_part": "CHEST",
        "laterality": "L",
        "photometric": "MONOCHROME2",
    }
    assert "body_part" not in next(dicom.frames(data_set(BodyPartExamined="DOE 1234567")))[1]
    png = dicom.to_png(data, None, "t")
    assert b"DOE" not in png and Image.open(io.BytesIO(png)).info == {}


def test_the_gate_is_asked_before_decoding_and_closed_by_default(monkeypatch):
    monkeypatch.setattr(dicom, "_decode", lambda *a: pytest.fail("decoded"))
    for gate in (None, Gate(DeidPolicy())):
        with pytest.raises(BadImage, match="modality may burn in text"):
            dicom.to_png(FILES["US1_UNCR.dcm"].read_bytes(), None, "clinic", gate)
    gate = Gate(DeidPolicy())
    with pytest.raises(BadImage, match="burned-in annotation"):
        dicom.to_png(data_set(BurnedInAnnotation="YES"), None, "clinic", gate)
    assert gate.counts == {"dicom burned-in annotation: rejected": 1}


def test_what_the_gate_says_of_the_packages_files():
    gate = Gate(DeidPolicy())
    for name, path in FILES.items():
        try:
            dicom.to_png(path.read_bytes(), None, "clinic", gate)
        except BadImage:
            continue
        header = pydicom.dcmread(path, stop_before_pixels=True)
        assert header.get("BurnedInAnnotation") == "NO" or header.get("Modality") not in BURNS_TEXT | {None}, name
    assert gate.counts["dicom modality may burn in text: rejected"] > 90
    assert gate.counts["dicom: pixels only"] > 40


def refused(data: bytes, frame: int | None = None) -> tuple[str, str]:
    with pytest.raises(BadImage) as e:
        dicom.to_png(data, frame, "tests", NO_GATE)
    return e.value.args


def test_sizes_are_checked_before_anything_is_decoded(monkeypatch):
    assert refused(data_set(Rows=65000, Columns=65000))[0] == "image too large"
    reason, detail = refused(data_set(Rows=200))
    assert (reason, detail) == ("corrupt DICOM", "1 frames of at least 51200 bytes, 32768 bytes of pixels")
    assert refused(data_set(NumberOfFrames=10**9))[0] == "corrupt DICOM"
    with pytest.raises(BadImage, match="corrupt DICOM"):
        list(dicom.frames(data_set(NumberOfFrames=10**9)))
    assert refused(data_set(Rows=0))[0] == "corrupt DICOM"
    assert refused(data_set("MR_small_jp2klossless.dcm", Rows=63))[1].startswith("the compressed frame is (64, 64, 1)")
    assert refused(data_set("JPEG-LL.dcm", Columns=255))[1].startswith("the compressed frame is (1024, 256, 1)")
    assert refused(data_set(BitsAllocated=32))[0] == "unsupported DICOM"


def test_a_deflated_bomb(monkeypatch):
    monkeypatch.setattr(dicom, "MAX_INFLATED", 100_000_000)
    path = FILES["image_dfl.dcm"]
    data = path.read_bytes()
    start = 132 + 12 + int.from_bytes(data[140:144], "little")  # behind the file meta information, whose length its first element tells
    packer = zlib.compressobj(9, wbits=-15)
    bomb = data[:start] + b"".join(packer.compress(bytes(1 << 24)) for _ in range(8)) + packer.flush()
    assert len(bomb) < 1_000_000
    assert refused(bomb)[0] == "image too large"


def test_no_preamble_is_no_dicom():
    data = FILES["no_meta.dcm"].read_bytes()
    assert not dicom.is_dicom(data) and not dicom.is_dicom(b"") and not dicom.is_dicom(b"DICM")
    assert refused(data) == ("not a DICOM file", "no DICM after the preamble")


def test_errors_do_not_quote_the_header():
    data = data_set(PatientName="DOE^JANE").replace(b"MONOCHROME2 ", b"DOE JANE 19 ")
    assert "DOE" not in " ".join(refused(data))


def test_missing_packages_name_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(UserError, match=r"imagecodecs.*-e .\[formats\]"):
        show("JPEG-LL.dcm")


def test_damaged_files_come_to_a_reason_or_a_picture():
    rng = random.Random(3)
    names = [n for n, p in FILES.items() if p.stat().st_size < 100_000 and dicom.is_dicom(p.read_bytes()) and "IM0000" not in n]
    outcomes: Counter[str] = Counter()
    start = time.monotonic()
    for _ in range(300):
        data = bytearray(FILES[rng.choice(names)].read_bytes())
        for _ in range(rng.choice((1, 2, 8))):
            at = rng.randrange(132, len(data))
            match rng.randrange(5):
                case 0:
                    data = data[: max(at, 140)]
                case 1:
                    del data[at : at + rng.randrange(1, 40)]
                case _:
                    data[at] ^= 1 << rng.randrange(8)
            if len(data) < 140:
                break
        try:
            list(dicom.frames(bytes(data)))
            Image.open(io.BytesIO(dicom.to_png(bytes(data), None, "tests", NO_GATE))).load()
            outcomes["picture"] += 1
        except BadImage as e:
            assert e.args[0] in REASONS, e.args
            outcomes[e.args[0]] += 1
    assert outcomes["picture"] > 30 and outcomes["corrupt DICOM"] > 20, outcomes
    assert time.monotonic() - start < 20
