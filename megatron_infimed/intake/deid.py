"""The de-identification gate, closed by default: what may become training data, and a count of every decision.

**Pixels.** A DICOM file is refused when its header says that text is burned in (BurnedInAnnotation YES), or does not say NO while the file
is of a kind that usually has text burned in: `BURNS_TEXT`, secondary captures, digitised film or video, screen saves, labels. DICOM PS3.15
E.3.1 (Clean Pixel Data Option) holds burned-in text for the habit of some modalities ("CT images do not normally contain such burned in
annotation, whereas Ultrasound images routinely do"); the rules on ImageType follow the filter that RSNA's CTP and pydicom's `deid` use.
A source that somebody has looked at is allowed by name. A face or another RecognizableVisualFeatures YES is never allowed.

**Text.** What `phi.find` finds in any turn: a net under curated data, not a licence to feed raw reports.

**Ids, kept fields and details.** They reach logs, manifests and pages, so unless the policy is "off" the same expressions go over them. An id
(read with _ and / as spaces too, and with dates like 19700101) that is hit is replaced by the row's place, and the record stays. A kept field
(`Record.meta`) that is hit is left out. A reject's detail loses what `records.quote` marked as the row's own words or a file's name; if the
rest is hit it goes altogether. Names of DICOM and NIfTI files are never shown, under any policy: rows.py and `Stored.label` put a hash in
their place. The names of inputs and sources are the user's own choice.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_infimed.intake.phi import find
from megatron_infimed.intake.records import BadImage, Record, Reject, Turn, without_quotes

BURNS_TEXT = frozenset(
    {
        *("US", "IVUS", "BDUS"),  # the scanner writes name, date and institution above the fan
        *("SC", "OT", "DOC", "HC"),  # captured screens, scanned or printed documents, and whatever nobody classified
        "RG",  # film, with the patient's label exposed on it
        *("ES", "GM", "XC", "OP"),  # visible light through a video processor that overlays the patient's line
        "SM",  # slides are scanned with their label; a conforming file must say YES or NO (type 1 there), so only others are held up
        "BMD",  # bone densitometry leaves as a page of report
        "",  # no modality at all
    }
)
"""Modalities refused unless BurnedInAnnotation says NO. CT, MR, PT, NM, CR, DX, MG, XA, RF draw their annotations as overlays."""
_CAPTURED = frozenset(
    ("DV", "DI", "DF", "SD", "SI")
)  # ConversionType: digitised video or film, scanned document or image, digital interface
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # and its multi-frame children
_IMAGE_TYPE = re.compile(r"SECONDARY|SCREEN|SAVE|CAPTURE|REPORT|DOSE|DEMOGRAPHIC|LABEL|OVERVIEW")


@dataclass(frozen=True)
class DeidPolicy:
    text: Literal["reject", "redact", "flag", "off"] = "reject"
    """A record with identifying text is rejected; or has the passages replaced by "[date]" and the like; or is kept with `meta["phi"]`, the
    kinds found; "off" does not look."""
    allow_burned_in: tuple[str, ...] = ()
    """Sources whose images may have text burned in, because somebody checked it."""


class Gate:
    """Judges records and DICOM headers, and counts what it decided in `counts`. Safe to share between threads."""

    def __init__(self, policy: DeidPolicy) -> None:
        self.policy = policy
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def row(self, item: Record | Reject, place: str) -> Record | Reject:
        """What a row comes to, as it may be used and told; `place` is its id where its own is identifying."""
        if self.policy.text != "off":
            kinds = _kinds_in_name(item.id)
            self._count(*(f"id {kind}: redacted" for kind in kinds))
            item = replace(item, id=place) if kinds else item
            if isinstance(item, Reject):
                item = replace(item, detail=self._detail(item.detail))
        return self.record(item) if isinstance(item, Record) else item

    def _detail(self, detail: str) -> str:
        constant = without_quotes(detail)
        kinds = _kinds_in_name(constant)
        self._count(*(f"detail {kind}: withheld" for kind in kinds))
        return f"withheld: {', '.join(kinds)}" if kinds else constant

    def record(self, record: Record) -> Record | Reject:
        """The record as it may be used, judged by its text. A Reject names kinds and turns (from 0), never the text."""
        if self.policy.text == "off":
            self._count("text: not looked at")
            return record
        kept = self._harmless(record.meta)
        record = record if len(kept) == len(record.meta) else replace(record, meta=kept)
        found = [find(turn.text) for turn in record.turns]
        kinds = sorted({kind for spans in found for _, _, kind in spans})
        if not kinds:
            self._count("text: clean")
            return record
        self._count(*(f"text {kind}: {_DONE[self.policy.text]}" for kind in kinds))
        if self.policy.text == "flag":
            return replace(record, meta={**record.meta, "phi": kinds})
        if self.policy.text == "redact":
            return replace(record, turns=tuple(Turn(t.role, _redact(t.text, spans)) for t, spans in zip(record.turns, found, strict=True)))
        where = (f"{kind} in turn {k}" for k, spans in enumerate(found) for kind in sorted({kind for _, _, kind in spans}))
        return Reject(record.id, "identifying text", ", ".join(where)[:200], record.source)

    def _harmless(self, meta: Mapping[str, Any]) -> dict[str, Any]:
        """Without the fields whose text identifies somebody: they are not trained on, so nothing is lost with them."""
        kept = {}
        for name, value in meta.items():
            kinds = {kind for _, _, kind in find(f"{name.replace('_', ' ')}: {value}")}
            self._count(*(f"kept field, {kind}: left out" for kind in kinds))
            if not kinds:
                kept[name] = value
        return kept

    def dicom(self, header: Any, source: str) -> None:
        """Judges a DICOM header: anything with `get(keyword)`.

        Raises:
            BadImage: its pixels may identify the patient.
        """
        if _code(header, "RecognizableVisualFeatures") == "YES":
            self._count("dicom recognizable visual features: rejected")
            raise BadImage("recognizable visual features", "RecognizableVisualFeatures is YES")
        doubt = _burned_in(header)
        if doubt is None:
            self._count("dicom: pixels only")
            return
        reason, why = doubt
        allowed = source in self.policy.allow_burned_in
        self._count(f"dicom {reason}: {'allowed by name' if allowed else 'rejected'}")
        if not allowed:
            raise BadImage(reason, f"{why}; if the images of {source!r} are known to be clean, name it in allow_burned_in")

    def _count(self, *decisions: str) -> None:
        with self._lock:
            self.counts.update(decisions)


_NAME_SIGNS = str.maketrans("_/\\^", "    ")
_COMPACT_DATE = re.compile(r"(?<!\d)(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?!\d)")


def _kinds_in_name(name: str) -> list[str]:
    """The kinds found in an id or a file name, as it is and with the signs that stand for spaces in names."""
    kinds = {kind for text in {name, name.translate(_NAME_SIGNS)} for _, _, kind in find(text)}
    return sorted(kinds | {"date" for _ in _COMPACT_DATE.finditer(name)})


def _redact(text: str, spans: list[tuple[int, int, str]]) -> str:
    return "".join(_pieces(text, spans))


def _pieces(text: str, spans: list[tuple[int, int, str]]) -> Iterator[str]:
    at = 0
    for start, end, kind in spans:
        yield text[at:start] + f"[{kind}]"
        at = end
    yield text[at:]


_DONE = {"reject": "rejected", "redact": "redacted", "flag": "flagged"}


def _code(header: Any, keyword: str) -> str:
    return str(header.get(keyword) or "").strip().upper()


def _burned_in(header: Any) -> tuple[str, str] | None:
    """(reason, which field says so) when text may be burned into the pixels."""
    said = _code(header, "BurnedInAnnotation")
    if said == "NO":
        return None
    if said == "YES":
        return "burned-in annotation", "BurnedInAnnotation is YES"
    if _code(header, "Modality") in BURNS_TEXT:
        return "modality may burn in text", "its Modality usually does and BurnedInAnnotation is not NO"
    if str(header.get("SOPClassUID") or "").startswith(_SECONDARY_CAPTURE):
        return "modality may burn in text", "a secondary capture, and BurnedInAnnotation is not NO"
    if _code(header, "ConversionType") in _CAPTURED:
        return "modality may burn in text", "ConversionType says captured or scanned, and BurnedInAnnotation is not NO"
    if _IMAGE_TYPE.search(str(header.get("ImageType") or "").upper()):
        return "modality may burn in text", "ImageType says derived from a screen or an earlier image, and BurnedInAnnotation is not NO"
    return None
