"""What identifies a patient in a text, as far as it has a recognisable form.

Regular expressions of bounded length (linear time) for those of the 18 identifiers of HIPAA's Safe Harbor, 45 CFR 164.514(b)(2),
that have a recognisable form: dates finer than a year, ages over 89, record and accession numbers, names after a title or label, phone and
fax numbers, e-mail and street addresses, social security numbers. A bare name ("Smith was seen") has none and is not found: this is a
net under curated data, not a licence to feed raw reports. English, plus Chinese dates.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# Every repetition is bounded, so a text of n characters costs O(n). S: a small gap. The group `it`, where there is one, is what is hidden.

_DIGITS = re.compile(r"\d+")
_S = r"[ \t]{0,3}"
_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|"
    r"sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?"
)
_Month = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|March|Apr(?:il)?|June?|July?|Aug(?:ust)?|Sept(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)\.?"
)
_YEAR = r"(?:19|20)\d\d(?!\d)"
_D, _M = r"(?:3[01]|[12]\d|0?[1-9])", r"(?:1[0-2]|0?[1-9])"
_DAY = rf"{_D}(?:st|nd|rd|th)?"
_UNIT = (
    r"(?![ -]?(?:mm|cm|m|ml|cc|mg|g|kg|%|Gy|HU|of|x|×|years?|months?|weeks?|days?|hours?|patients?|cases?|slices?|images?|views?)\b)"
    r"(?![\d.,/]\d)"
)
_EXAM = (
    r"\b(?:stud(?:y|ies)|exam(?:ination)?s?|radiographs?|x-?rays?|CXR|CT|MRI?|films?|scans?|mammograms?|ultrasound|comparison|biopsy|"
    r"surgery|performed|admitted|discharged|seen|obtained|born)"
)
_DATES_FROM_A_DIGIT = (
    rf"(?<![\d.-])(?:19|20)\d\d(?P<iso>[-/.]){_M}(?P=iso){_D}(?!\d)",
    rf"(?<![\d./-])(?:{_D}(?P<s1>[-/.]){_M}(?P=s1)|{_M}(?P<s2>[-/.]){_D}(?P=s2)){_YEAR}(?![.-]\d)",
    rf"(?<![\d./-])(?:{_D}/{_M}|{_M}/{_D})/\d\d(?![\d/]){_UNIT}",
    rf"(?<![\d./-])(?:(?:[0-2]\d|3[01])-(?:0\d|1[0-2])|(?:0\d|1[0-2])-(?:[0-2]\d|3[01]))-\d\d(?![\d-]){_UNIT}",
    rf"(?i:(?<![\d.]){_DAY}(?:[ \t-]{{1,3}}|[ \t]of[ \t])?{_MONTH},?[ \t-]{{0,3}}(?:{_YEAR}|'\d\d\b))",
    rf"(?i:(?<![\d.]){_D}[-/]{_MONTH}[-/]\d\d(?!\d))",
    rf"(?<![\d./-])(?:{_D}[ \t]/[ \t]{_M}|{_M}[ \t]/[ \t]{_D})[ \t]/[ \t]{_YEAR}",
    rf"(?i:(?<![\w.-])(?<!section )(?<!version )(?<!chapter )(?<!table )(?<!figure )){_D}\.{_M}\.\d\d(?![\w-]){_UNIT}",
    rf"(?<![\d.]){_DAY}(?:[ \t]of)?[ \t]{_Month}(?![A-Za-z]|[ \t]fracture)",
    rf"(?<![\d./-])(?:0[1-9]|1[0-2])/{_YEAR}",
    r"(?<!\d)(?:19|20)\d\d年[01]?\d月(?:[0-3]?\d日)?",
)
_DATES_FROM_A_MONTH = (
    rf"\b(?i:{_MONTH}[ \t-]{{1,3}}{_DAY},?[ \t-]{{1,3}}{_YEAR})",
    rf"\b{_Month}[ \t]{_DAY}\b{_UNIT}",
    rf"\b(?i:(?!may\b){_MONTH}(?:[ \t]of)?,?[ \t-]{{1,3}}{_YEAR})",
    rf"\b(?:May|MAY)(?:[ \t]of)?,?[ \t-]{{1,3}}{_YEAR}",
)
_LABELLED_DATES = (
    rf"(?:(?i:{_EXAM}(?::|[ \t](?:on|of|from|dated|since))|\b(?:dated?|DOB|(?:re)?admitted|discharged):?)[ \t])(?P<it>{_M}/{_D}(?!\d)){_UNIT}",
    r"(?i:\b(?:dated?|dob|born|on)\b:?[ \t])(?P<it>(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?!\d))",
)

_NUMBER = rf"{_S}(?:number|num|no|nr|id|identifier|#)?\.?{_S}(?:is[ \t]|[:#=])?{_S}"
_RECORD_NUMBERS = (
    r"(?i:\b(?:mrn|uhid|medical record|hospital record|hosp(?:ital)?[ \t](?=n|id|#)|patient|health card|health plan|insurance|nhs|"
    r"account|encounter|episode|chart|"
    rf"case file|subject){_NUMBER})"
    r"(?P<it>(?![-/ ]?(?:19|20)\d\d-(?:19|20)?\d\d\b)[A-Z]{0,4}[-/ ]?\d[\d-]{3,18}\d)(?![\d.,]\d|[ \t]?%)",
    rf"(?i:\b(?<!genbank )(?<!geo )(?<!embl )(?:accession|specimen|requisition|order|report){_NUMBER})"
    r"(?P<it>(?!GSE|[NX][MRP]_|[A-Z]{2}\d{6}\b)[A-Z]{0,4}[-/]?\d{0,4}[-/]?\d{4,12}(?:-\d{1,6})?)(?![\d.,]\d|[ \t]?%)(?!-?[A-Za-z])",
    r"\b(?:S|SP|SU|SS|SC|CY|NG|NP|C|F|H|B)-?(?:\d\d|20\d\d)-\d{3,6}\b",
    rf"(?i:\b(?:mrn|uhid){_NUMBER})(?P<it>[A-Z]{{0,4}}-?\d{{3,4}})(?![\w-]|[.,]\d|[ \t]?%)",
    rf"(?i:\bacc\.?{_S}(?:#|no\b|num\b){_S}[.:]?{_S})(?P<it>[A-Z]{{0,4}}-?\d{{4,12}})(?!\d)",
)

_UP = "A-ZÀ-ÖØ-ÞĀĂĄĆČĎĐĒĘĚĞĢĪĮİĶĹĽŁŃŅŇŌŐŒŔŘŚŞŠŢŤŪŮŰŲŹŻŽ"
_LOW = "a-zß-öø-ÿāăąćčďđēęěğģīįıķĺľłńņňōőœŕřśşšţťūůűųźżž"
_NOT_A_NAME = (
    r"(?!(?i:images?|imag\w{1,9}|angio\w{0,9}|spectro\w{0,9}|veno\w{0,9}|entero\w{0,9}|cholangio\w{0,20}|scans?|chest|findings?|impression|comparison|technique|"
    r"indication|history|conclusion|exam\w{0,9}|report|no|the|there|this|brain|abdomen|pelvis|spine|system|detector|anonym\w{0,5}|redacted|unknown|withheld|removed|"
    r"de-?identified|none|not|n/a|male|female|age|sex|date|id|rate|view|views|sequences?|protocol|elastography|arthro\w{0,6}|uro\w{0,6}|perfusion|diffusion|lesions?)\b)"
)
_NO_LOWER_NAME = (
    r"(?!(?:visits?|appointments?|offices?|notes?|orders?|said|says|was|were|is|has|had|who|and|or|for|to|in|at|on|the|this|that|will|would|"
    r"may|can|could|should|also|did|does|gave|told|saw|sees|came|went|about|with|by|of|as|if|but|not|recommend\w{0,5}|prescri\w{0,5}|"
    r"order\w{0,3}|ask\w{0,3}|think\w{0,1}|thought|refer\w{0,4}|want\w{0,2}|advis\w{0,3}|suggest\w{0,3}|agree\w{0,1}|name|unknown)\b)"
)
_WORD = rf"(?=[{_UP}]){_NOT_A_NAME}[{_UP}][{_LOW}]{{0,3}}(?:['’-]?[{_UP}]?[{_LOW}]{{1,15}}){{1,3}}"
_CAPS = rf"(?=[{_UP}]){_NOT_A_NAME}[{_UP}]{{2}}[{_UP}'’-]{{0,20}}"
_INITIALS = rf"(?:[{_UP}](?:\.|(?=[ \t]))[ \t]?){{0,3}}"
_PARTICLE = r"(?:(?:van|von|de|der|den|del|della|da|dos|di|la|le|bin|al|el)[ \t-]){0,3}"
_NAME = rf"{_INITIALS}{_PARTICLE}{_WORD}(?:[ \t](?:[{_UP}]\.[ \t])?{_PARTICLE}{_WORD}){{0,2}}"
_FULL = rf"(?:{_NAME},?(?:[ \t]{_WORD})?|{_CAPS},?[ \t]{_CAPS}(?:[ \t][{_UP}]\b)?|{_CAPS},?[ \t]{_WORD})"
_NAMES = (
    rf"(?<![\w-])(?:(?:Drs?|Prof|Mrs?|Ms)(?:\.|(?=[ \t]))|(?:Doctor|Professor|Miss|Mister|Sir|Herrn?|Frau)(?=[ \t])){_S}"
    rf"(?:(?:Dr|Prof)\.?[ \t]){{0,2}}(?!(?:Dr|Prof)\b)(?P<it>{_NAME}|{_CAPS}(?![\w-]))",
    rf"(?<![\w-])(?:drs?|prof|mrs)\.{_S}{_NO_LOWER_NAME}(?P<it>(?:[a-z]\.[ \t]?){{0,3}}[{_LOW}][{_LOW}'’-]{{2,20}})",
    rf"(?<![\w-])(?:DR|PROF|MRS)(?:\.|(?=[ \t])){_S}"
    rf"(?P<it>{_CAPS}(?:[ \t](?!AT\b|ON\b|BY\b|TO\b|IN\b|AND\b|WHO\b|WAS\b|HAS\b|FOR\b){_CAPS})?)(?![\w:-])",
    r"(?i:\b(?:patient(?:'s|’s)?[ \t]name|name of(?: the)? patient|(?:sur|last |first |family |given )name|"
    r"referring (?:physician|doctor|clinician)|attending(?: physician)?|ordering (?:physician|provider)|radiologist|pathologist|"
    rf"technologist|physician|surgeon|next of kin){_S}(?:[:=]|is[ \t]){_S})(?P<it>{_FULL}|{_CAPS})",
    r"(?i:\b(?:signed|dictated|reported|transcribed|interpreted|verified|approved|referred|read|reviewed|seen|requested|authenticated)"
    rf"(?: electronically)? by:?[ \t])(?P<it>{_WORD},?[ \t](?:[{_UP}]\.?[ \t])?{_WORD}|{_CAPS},?[ \t]{_CAPS})"
    rf"(?=,?{_S}(?:M\.?D|D\.?O|MBBS|FRCR|Ph\.?D)\b|{_S}(?:[.;\n]|\Z|on\b|at\b))",
    rf"(?m:^{_S}(?i:patient|pt|name){_S}:{_S}"
    rf"(?P<it>{_CAPS},[ \t]?{_CAPS}|{_WORD},[ \t]?{_WORD}|{_WORD}[ \t](?:[{_UP}]\.?[ \t])?{_WORD}[ \t]{{0,3}}$))",
    rf"\b(?P<it>[{_UP}][{_LOW}]{{1,20}}[ \t](?:[{_UP}]\.?[ \t])?[{_UP}][\w'’-]{{1,20}}),?[ \t](?:M\.D\.|D\.O\.|MBBS|FRCR|FRCPath)(?!\w)",
    rf"\b(?P<it>{_WORD}[ \t](?:[{_UP}]\.?[ \t])?{_WORD}), (?:MD|DO)(?![\w.])",
    rf"\b(?P<it>[{_UP}]{{2,20}}\^[{_UP}]{{1,20}})",
)

_PHONES = (
    r"(?<![\d.-])(?:\+?1[-. ]?)?(?:\([2-9]\d\d\)[ ]?|[2-9]\d\d[-.])[2-9]\d\d[-. ]\d{4}(?![\d-])",
    rf"(?<![\d.-])(?<!\d )[2-9]\d\d [2-9]\d\d \d{{4}}(?![\w-]| \d){_UNIT}",
    r"(?i:\b(?:call(?:ed)?|contact|paged?|dial|ring|reach(?:ed)?)(?: at| on)?:?[ \t])(?P<it>[2-9]\d\d-\d{4})(?![\w-])",
    r"\+(?=(?:[ ()-]{0,2}\d){9,15}(?!\d))\d{1,3}(?:[ ()-]{0,2}\d{1,5}){2,6}",
    r"(?<![\d.])0\d{2,4}[ -]\d{3,4}[ -]\d{3,4}(?![\d-])",
    rf"(?i:\b(?:tele?(?:phone)?|phone|fax|pager|beeper|mobile|hotline|ext(?:ension)?)\.?{_S}(?:number|no|#)?\.?{_S}:?{_S})"
    r"(?P<it>\(?\d(?:[ ().-]{0,2}\d){4,14})(?![\d.]?\d|[ \t]?%)",
)
_EMAIL = r"(?<![\w.%+-])[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,5}"
_STREET = (
    r"(?:Street|Avenue|Road|Boulevard|Lane|Drive|Court|Place|Terrace|Square|Highway|Parkway|(?:St|Ave|Rd|Blvd|Ln|Hwy|Pkwy)\b\.?|Dr\.|Ct\.)"
)
_STATE = r"(?:A[KLRZ]|C[AOT]|D[CE]|FL|GA|HI|I[ADLN]|K[SY]|LA|M[ADEINOST]|N[CDEHJMVY]|O[HKR]|PA|RI|S[CD]|T[NX]|UT|V[AT]|W[AIVY])"
_ADDRESSES = (
    rf"(?<![\d.,/-])\d{{1,5}}[A-Za-z]?,?[ \t](?:[NSEW]\.?[ \t])?(?:[A-Z][a-z]{{1,20}}[ \t]|\d{{1,3}}(?:st|nd|rd|th)[ \t]){{1,3}}{_STREET}(?!\w)",
    rf"\b[A-Z][a-z]{{2,20}}(?:[ \t][A-Z][a-z]{{2,20}})?,?[ \t]{_STATE}[ \t]\d{{5}}(?:-\d{{4}})?(?!\d)",
    rf"(?i:\bP\.?{_S}O\.?{_S}Box[ \t]\d{{1,6}})",
    rf"(?i:\bzip(?:[ \t]?code)?{_S}:?{_S})(?P<it>\d{{5}}(?:-\d{{4}})?)(?!\d)",
)
_SSN = r"(?<![\d.-])(?!000|666|9\d\d)\d{3}-\d\d-\d{4}(?![\d-])"
_AGES = (
    r"(?<![\d.,-])(?P<it>9\d|1[01]\d)(?=[- ]{0,2}(?:years?|yrs?|y)[- ./]{0,2}(?:olds?|o\b|of age))",
    r"(?i:\b(?:aged?|age:)[ \t])(?P<it>9\d|1[01]\d)\b(?![-/.]\d|[ \t]?%|[- ](?:days?|weeks?|months?|hours?)\b)",
)


@dataclass(frozen=True)
class Detector:
    """A pattern, and what a text must have for it to match at all: looking for that first is what makes the gate fast."""

    kind: str
    pattern: re.Pattern[str]
    digits: int = 0
    """A run of so many digits."""
    words: tuple[str, ...] = ()
    """One of these, case ignored."""

    def can_match(self, folded: str, longest: int) -> bool:
        return longest >= self.digits and (not self.words or any(w in folded for w in self.words))


_RECORD_WORDS = (
    *("mrn", "uhid", "record", "hosp", "patient", "health", "insurance", "nhs", "account", "encounter", "episode", "chart"),
    *("case file", "subject"),
)
_TITLES = ("dr", "doctor", "prof", "mr", "ms", "miss", "mister", "sir", "herr", "frau")
_LABELS = (
    "name",
    "physician",
    "doctor",
    "clinician",
    "attending",
    "provider",
    "radiologist",
    "pathologist",
    "technologist",
    "surgeon",
    "kin",
)
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_CALL_WORDS = ("call", "contact", "page", "dial", "ring", "reach")
_PHONE_WORDS = ("tel", "phone", "fax", "pager", "beeper", "mobile", "hotline", "ext")
_NEEDS: tuple[tuple[str, Sequence[str], Sequence[tuple[int, tuple[str, ...]]]], ...] = (  # kind, patterns, (digits, words) of each
    ("e-mail", (_EMAIL,), ((0, ("@",)),)),
    (
        "record number",
        _RECORD_NUMBERS,
        (
            (1, _RECORD_WORDS),
            (4, ("accession", "specimen", "requisition", "order", "report")),
            (3, ("-",)),
            (3, ("mrn", "uhid")),
            (4, ("acc",)),
        ),
    ),
    ("social security number", (_SSN,), ((4, ("-",)),)),
    ("phone", _PHONES, ((4, ()), (4, (" ",)), (4, _CALL_WORDS), (1, ("+",)), (3, ()), (1, _PHONE_WORDS))),
    ("address", _ADDRESSES, ((1, ()), (5, ()), (1, ("box",)), (5, ("zip",)))),
    (
        "date",
        (  # what each must begin with, first: it is seven times faster
            rf"(?=\d)(?:{'|'.join(_DATES_FROM_A_DIGIT)})",
            rf"\b(?=[ADFJMNOSadfjmnos])(?:{'|'.join(_DATES_FROM_A_MONTH)})",
            *_LABELLED_DATES,
        ),
        ((1, ()), (1, _MONTHS), (1, ("/",)), (8, ())),
    ),
    (
        "name",
        _NAMES,
        (
            (0, _TITLES),
            (0, ("dr", "prof", "mrs")),
            (0, ("dr", "prof", "mrs")),
            (0, _LABELS),
            (0, (" by",)),
            (0, (":",)),
            (0, ("m.d.", "d.o.", "mbbs", "frc")),
            (0, (", md", ", do")),
            (0, ("^",)),
        ),
    ),
    ("age over 89", _AGES, ((2, ("y",)), (2, ("age",)))),
)
DETECTORS = tuple(
    Detector(kind, re.compile(pattern), *needs)
    for kind, patterns, all_needs in _NEEDS
    for pattern, needs in zip(patterns, all_needs, strict=True)
)
"""From the most to the least specific."""


def find(text: str) -> list[tuple[int, int, str]]:
    """(start, end, kind) of what looks identifying, in order and not overlapping; the earlier kind of `DETECTORS` wins."""
    found: list[tuple[int, int, str]] = []
    taken, folded = bytearray(len(text)), text.casefold()
    longest = max(map(len, _DIGITS.findall(text)), default=0)
    for detector in DETECTORS:
        if not detector.can_match(folded, longest):
            continue
        for match in detector.pattern.finditer(text):
            start, end = match.span("it") if "it" in detector.pattern.groupindex else match.span()
            if not any(taken[start:end]):
                taken[start:end] = b"\1" * (end - start)
                found.append((start, end, detector.kind))
    return sorted(found)
