"""The gate: every rule on sentences as they stand in reports, captions and questions. The sets are small and written by hand, so the
recall and precision asserted here (1.0 of SENTENCES) say that the rules do what they are meant to, not how much of real PHI they find."""

from __future__ import annotations

import random
import threading
import time

import pytest

from megatron_infimed.intake.deid import BURNS_TEXT, DeidPolicy, Gate
from megatron_infimed.intake.phi import DETECTORS, Detector, find
from megatron_infimed.intake.records import BadImage, Record, Reject, Turn, make_record, marks

# (text with what must be found in ‹›, kinds in order)
IDENTIFYING: tuple[tuple[str, str], ...] = (
    ("Comparison: chest radiograph ‹2014-03-12›.", "date"),
    ("Study acquired ‹2014/3/2›, no prior.", "date"),
    ("CT abdomen dated ‹12/03/2014› shows no change.", "date"),
    ("Comparison is made with ‹3/12/14›.", "date"),
    ("Admitted ‹12.03.2014› with dyspnoea.", "date"),
    ("Exam date: ‹03-12-2014›", "date"),
    ("Follow-up ‹03-12-14› was normal.", "date"),
    ("MRI of the brain on ‹12 March 2014› was normal.", "date"),
    ("Seen on the ‹3rd of April 2011› in clinic.", "date"),
    ("Compared to ‹Mar 12, 2014›, the nodule has grown.", "date"),
    ("Compared to ‹March 12th, 2014›, unchanged.", "date"),
    ("Biopsy ‹12-Mar-2014› showed carcinoma.", "date"),
    ("Biopsy ‹12MAR2014› showed carcinoma.", "date"),
    ("The last examination was in ‹October 2011›.", "date"),
    ("Surgery in ‹Sept. 2009› and no recurrence since.", "date"),
    ("She was operated in ‹May 2010›.", "date"),
    ("The film of ‹March 12› is not available.", "date"),
    ("Radiograph obtained ‹5 November›, portable.", "date"),
    ("Unchanged since the CT of ‹11/24›.", "date"),
    ("Prior mammogram from ‹04/2012› is benign.", "date"),
    ("Discharged ‹3/14›, readmitted ‹3/20›.", "date, date"),
    ("Study date ‹20140312›, series 3.", "date"),
    ("DOB: ‹01/02/1950›", "date"),
    ("检查日期：‹2014年3月12日›", "date"),
    ("On ‹2014-03-12›T10:15 the patient fell.", "date"),
    ("MRN: ‹1234567›", "record number"),
    ("MRN ‹00-12-34-56› was reviewed.", "record number"),
    ("Medical record number ‹A1234567›.", "record number"),
    ("Patient ID: ‹123456›, chest PA.", "record number"),
    ("patient id ‹PT-004512› has a left nodule", "record number"),
    ("Accession number: ‹MR20145678›", "record number"),
    ("Accession no. ‹7654321› was addended.", "record number"),
    ("Account # ‹5550012345› was billed.", "record number"),
    ("Specimen ‹S14-12345› is received in formalin.", "record number"),
    ("See also prior case ‹SP14-2201›, invasive ductal carcinoma.", "record number"),
    ("Hospital record no: ‹998877›", "record number"),
    ("Hosp. no unknown, hosp no ‹88211›", "record number"),
    ("NHS number: ‹9434765919›", "record number"),
    ("Findings were discussed with Dr. ‹Smith› by telephone.", "name"),
    ("Discussed with Dr ‹Jones› at 14:30.", "name"),
    ("Referred by Dr. ‹J. A. Müller› for staging.", "name"),
    ("Dr. ‹O'Brien› was informed.", "name"),
    ("Prof. ‹van der Berg› reviewed the slides.", "name"),
    ("Professor ‹Kovács› agrees.", "name"),
    ("Mr. ‹Johnson› is a 54-year-old man with cough.", "name"),
    ("Mrs ‹Garcia› presents with headache.", "name"),
    ("Ms. ‹Lee› has multiple sclerosis.", "name"),
    ("Drs. ‹Patel› and colleagues were informed.", "name"),
    ("FINDINGS DISCUSSED WITH DR. ‹SMITH› AT 1430.", "name"),
    ("Patient name: ‹John Smith›", "name"),
    ("PATIENT NAME: ‹DOE, JANE›", "name"),
    ("Patient's name is ‹Maria Lopez›.", "name"),
    ("Pt: ‹Smith, John›  MRN#: ‹0045678›", "name, record number"),
    ("Name: ‹SMITH, JOHN›", "name"),
    ("Patient: ‹DOE, JANE›\nIndication: cough", "name"),
    ("Referring physician: ‹Adam Brown›", "name"),
    ("Electronically signed by: ‹Laura Chen›, MD", "name"),
    ("Dictated by ‹Laura Chen›, MD", "name"),
    ("Radiologist: ‹Peter Novak›", "name"),
    ("Reported by ‹Anna Weber›.", "name"),
    ("The film was read as normal by ‹Ellen Ross›, M.D.", "name"),
    ("‹SMITH^JOHN› chest PA", "name"),
    ("Please call ‹617-555-0123› with questions.", "phone"),
    ("Contact: ‹(617) 555-0123›", "phone"),
    ("Call ‹+1 617 555 0123› for results.", "phone"),
    ("Ring ‹+44 20 7946 0018› at night.", "phone"),
    ("Ring ‹020 7946 0018› at night.", "phone"),
    ("Paged at ‹617.555.0123›.", "phone"),
    ("Fax: ‹5550123›", "phone"),
    ("Results to pager ‹12345›.", "phone"),
    ("Send images to ‹jane.doe@hospital.org› please.", "e-mail"),
    ("Mail ‹radiology+ct@uni-klinik.example.de›.", "e-mail"),
    ("SSN ‹123-45-6789› on file.", "social security number"),
    ("Lives at ‹12 Main Street›, alone.", "address"),
    ("Found at ‹221B Baker St.› unconscious.", "address"),
    ("Address: ‹1600 N Oak Ridge Avenue›", "address"),
    ("Transferred from ‹Boston, MA 02115› by ambulance.", "address"),
    ("Correspondence to ‹P.O. Box 1234›.", "address"),
    ("ZIP code: ‹02115›", "address"),
    ("A ‹93›-year-old woman with hip fracture.", "age over 89"),
    ("Male, aged ‹101›, with dementia.", "age over 89"),
    ("Dr. ‹Smith› saw the patient (MRN ‹445566›) on ‹3/4/2015›.", "name, record number, date"),
    ("Biopsy ‹12-Mar-19› showed carcinoma.", "date"),
    ("Admitted ‹12.3.19› with dyspnoea.", "date"),
    ("Compared with ‹12 / 03 / 2019›.", "date"),
    ("Discussed with Dr.‹Smith› today.", "name"),
    ("discussed with dr. ‹smith› today", "name"),
    ("reported by dr. ‹smith›", "name"),
    ("DISCUSSED WITH DR.‹SMITH› AT 1430.", "name"),
    ("Final read: ‹John Smith›, MD", "name"),
    ("Osteopath ‹Ann B. Lee›, DO agrees.", "name"),
    ("Herr ‹Müller› und Frau ‹Schäfer› waren da.", "name, name"),
    ("Frau Dr. ‹Weber› informiert.", "name"),
    ("MRN ‹1234›, chest PA", "record number"),
    ("MRN: ‹A123›", "record number"),
    ("acc# ‹12345› chest", "record number"),
    ("Acc. no. ‹7654321›", "record number"),
    ("Results to ‹617 555 1234›.", "phone"),
    ("Please call ‹555-1234› with questions.", "phone"),
    ("Mr. ‹Brown› was seen on ‹12 May 2010›; call ‹617-555-0123›.", "name, date, phone"),
)
CLEAN: tuple[str, ...] = (
    "The lesion measures 3.2 x 4.1 cm.",
    "A 12 x 8 x 5 mm nodule in the right upper lobe.",
    "Two of 12 lymph nodes positive (2/12).",
    "Lymph nodes: 0/15 positive, margins 1/2.",
    "Muscle strength is 3/5 on the left and 5/5 on the right.",
    "Gleason score 3+4=7, grade group 2.",
    "Nottingham grade 2/3.",
    "Grade 3/5 reflux.",
    "Disc herniation at T2-3 and L4-5.",
    "Compression fracture of T12, L1 and L2.",
    "C5-6-7 fusion with anterior plate.",
    "L5/S1 disc protrusion.",
    "Stage pT2 N0 M0, T1c disease.",
    "TNM: T3N1M0, stage IIIA.",
    "BI-RADS 4A, PI-RADS 4/5, LI-RADS 5.",
    "Since 2014 there has been no recurrence.",
    "The 2016 WHO classification was used.",
    "Between 2009 and 2012 the lesion grew.",
    "Follow-up in 3-6 months is advised.",
    "Follow-up CT at 6, 12 and 24 months.",
    "Blood pressure 120/80 mmHg, pulse 72.",
    "SUVmax 12.3, previously 10.1.",
    "HU of 45 to 60 on the arterial phase.",
    "MR image of the brain, axial T2.",
    "MR imaging shows a mass in the left temporal lobe.",
    "Mr imaging of the knee was normal.",
    "MR Angiography was performed without contrast.",
    "Brain MR. Findings include white matter lesions.",
    "The findings are typical of MS. Periventricular lesions are seen.",
    "Patients with MS have Dawson fingers.",
    "DR chest shows no consolidation.",
    "CHEST DR. FINDINGS: NORMAL.",
    "Diabetic retinopathy (DR) Grade 2.",
    "Hodgkin lymphoma with Reed-Sternberg cells.",
    "Parkinson's disease and Alzheimer's disease.",
    "Crohn's disease of the terminal ileum.",
    "Baker cyst in the popliteal fossa.",
    "Wilson disease; Kayser-Fleischer ring.",
    "Ewing sarcoma of the femur.",
    "Colles fracture, Smith fracture and Barton fracture.",
    "March fracture of the second metatarsal.",
    "There are 2 March fractures.",
    "Positive Murphy sign and McBurney point tenderness.",
    "Barrett esophagus with Schatzki ring.",
    "Virchow node, Sister Mary Joseph nodule.",
    "Hounsfield units and Swan-Ganz catheter.",
    "Cotton-Wool spots and Roth spots.",
    "HER2 3+, ER 90%, PR 80%, Ki-67 20-30%.",
    "TP53 p.R175H and KRAS G12D mutations.",
    "EGFR exon 19 deletion, ALK negative, PD-L1 clone 22C3.",
    "CD20, CD3, CD5 and BCL-2 are positive; PAX8 negative.",
    "HLA-B27 positive, H3K27M mutant glioma.",
    "NM_000546 is the reference transcript.",
    "GenBank accession number AY123456.",
    "GEO accession GSE12345 was analysed.",
    "Magnification 400x, scale bar 50 um.",
    "H&E, 10x and 40x.",
    "500 mg twice a day for 10 days.",
    "A dose of 2.5 mg/kg over 30 minutes.",
    "60 Gy in 30 fractions.",
    "740 MBq of FDG were injected 60 minutes before.",
    "TR/TE 4000/90 ms, slice thickness 5 mm.",
    "A 54-year-old man with cough.",
    "A 9-year-old girl and a 90-day-old infant.",
    "aged 45 to 60 years",
    "The patient may 2 days later be discharged.",
    "It may 10 times exceed the normal value.",
    "In May be careful.",
    "The sun is seen in 1 of 3 images.",
    "Figure 3 shows the axial view; Table 2 the values.",
    "Image 5 of 12, series 3, slice 1024.",
    "1/2 of the field, 3/4 of the lung.",
    "The ratio is 1:10 000.",
    "White blood cells 12,000/uL, platelets 250,000.",
    "Sodium 140, potassium 4.1, chloride 102.",
    "AFP 1234567 ng/mL.",
    "The p value was 0.0012 (95% CI 1.2-3.4).",
    "An ejection fraction of 55-60%.",
    "What is the abnormality in this image?",
    "Is there evidence of pneumothorax? Yes.",
    "Which plane is shown? A. Axial B. Sagittal C. Coronal D. Oblique",
    "A: Left lung B: Right lung C: Heart",
    "Name: the organ in the upper right of the image.",
    "Name the structure marked by the arrow.",
    "Patient: elderly woman in supine position",
    "Patient name: [redacted]",
    "Patient name: Anonymous",
    "Discussed with Dr. ___ at ___ on ___.",
    "Dr. [name] was informed.",
    "Findings were discussed with the doctor.",
    "Miss Rate and false positives were reported.",
    "The radiologist reported no change.",
    "Reported by the referring clinician.",
    "Seen by the surgeon.",
    "Lead V1-V6, QT 400 ms.",
    "Coordinates 120-130-1400 are not a line.",
    "Numbers 120 130 1400 2000 in the histogram.",
    "The 3rd ventricle and the 12th rib.",
    "Left anterior descending artery, 2 Main Branches.",
    "Segment 4a/4b and segments 5-8 of the liver.",
    "Pathology: adenocarcinoma, moderately differentiated.",
    "Subject 3 of the cohort, patient 12.",
    "Case 12345678 cells were counted.",
    "Patient number 5 has a cyst.",
    "Order of magnitude 100000 copies.",
    "Report 3 of 4: normal chest.",
    "The patient is 1.75 m tall and weighs 80 kg.",
    "Zip lock sign, tram-track sign.",
    "The optic chiasm is seen at 10 o'clock.",
    "A fluid-fluid level on 2-3 slices at 10-12-15 mm.",
    "10^6 cells; 5'-ATG-3'.",
    "In the first episode 2010-2012 and in the patient 2014-15 the course was mild.",
    "PMID: 12345678; doi 10.1016/j.ejrad.2014.03.012",
    "CUI C0040405; ROCO_00012; PMC2935873_f1.jpg",
    "Mr. X, a 60-year-old male. Ms. A.B. presented with pain.",
    "PATIENT NAME: ____ MRN: ____ DOB: __/__/____",
    "Case reported by Smith et al. in 1998. Reviewed by two radiologists.",
    "The patient received 5-FU 400 mg/m2 on days 1-5 of 28-day cycles; CA 19-9 was 1200 U/mL, CEA 10/5.",
    "T1-weighted MR image (TR/TE, 500/15) of a 37-year-old woman with Sturge-Weber syndrome.",
    "R0 resection; N2/3 nodes; M1a.",
    "A 1.5.20 mm stent; see section 3.2.10, version 1.4.12.",
    "diabetes type 2 / 03 of the series, 1 / 2 / 3",
    "In Mar-19 days of follow-up; ratio 12-Mar",
    "The patient was seen by MD and then by a DO.",
    "a dr. visit was planned, the dr. said so",
    "Silver stain, Grocott, do not repeat. Do MD criteria apply?",
    "ACC 12345 is a cell line; ACC/AHA 2014; the ACC number is low; acc. to 12345 cells",
    "MRN was missing in 120 cases, MRN 12% of rows.",
    "Matrix 256 256 1024 5, values 220 230 1400 2000; 300 400 1200 images",
    "Call 10-15 times; recall 555-1234 is a number; ring of 120-1300 um",
    "Frau is a word; Herringbone pattern",
    "<image>\nDescribe the image.",
    "在这张图像中，病变位于左肺上叶，大小约3.2×4.1厘米。",
)


def parse(marked: str) -> tuple[str, list[str]]:
    """The text, and what stands between the marks."""
    pieces = marked.replace("›", "‹").split("‹")
    return "".join(pieces), pieces[1::2]


def test_the_sets_are_large_enough():
    assert len(IDENTIFYING) >= 60 and len(CLEAN) >= 100
    assert {kind for _, kinds in IDENTIFYING for kind in kinds.split(", ")} == {d.kind for d in DETECTORS}


def test_what_a_detector_needs_is_really_needed(monkeypatch):
    """`can_match` saves time and must never change what is found: pieces of all sentences, put together at random."""
    sentences = [parse(marked)[0] for marked, _ in IDENTIFYING] + list(CLEAN)
    rng = random.Random(0)
    texts = [*sentences, *(s.upper() for s in sentences), *(s.lower() for s in sentences)]
    for _ in range(3000):
        a, b = rng.choice(sentences), rng.choice(sentences)
        texts.append(a[rng.randrange(len(a)) :] + rng.choice(["", " ", "\n", "-", "/"]) + b[: rng.randrange(len(b))])
    quick = [find(t) for t in texts]
    monkeypatch.setattr(Detector, "can_match", lambda *_: True)
    assert [find(t) for t in texts] == quick and sum(map(bool, quick)) > 500


@pytest.mark.parametrize(("marked", "kinds"), IDENTIFYING, ids=[t[:40] for t, _ in IDENTIFYING])
def test_identifying_text_is_found_exactly(marked, kinds):
    text, wanted = parse(marked)
    found = find(text)
    assert [text[a:b] for a, b, _ in found] == wanted
    assert ", ".join(kind for _, _, kind in found) == kinds


@pytest.mark.parametrize("text", CLEAN, ids=[t[:40] for t in CLEAN])
def test_medical_text_is_left_alone(text):
    assert [(kind, text[a:b]) for a, b, kind in find(text)] == []


def record(*texts: str, meta: dict | None = None) -> Record:
    turns = [Turn(("user", "assistant")[k % 2], text) for k, text in enumerate(texts)]
    made = make_record("row 7", [b"..."] * marks(turns), turns, "clinic", meta)
    assert isinstance(made, Record)
    return made


TALK = ("<image>\nWhat did Dr. Smith see on 12 March 2014?", "A nodule; MRN 123456. Dr. Smith called.")


def test_reject_is_the_default_and_never_quotes():
    gate = Gate(DeidPolicy())
    found = gate.record(record(*TALK))
    assert found == Reject("row 7", "identifying text", "date in turn 0, name in turn 0, name in turn 1, record number in turn 1", "clinic")
    assert gate.counts == {"text date: rejected": 1, "text name: rejected": 1, "text record number: rejected": 1}


def test_redaction_keeps_everything_else():
    gate = Gate(DeidPolicy(text="redact"))
    found = gate.record(record(*TALK))
    assert isinstance(found, Record)
    assert [t.text for t in found.turns] == [
        "<image>\nWhat did Dr. [name] see on [date]?",
        "A nodule; MRN [record number]. Dr. [name] called.",
    ]
    assert marks(found.turns) == 1 and found.images == (b"...",)
    assert gate.counts["text name: redacted"] == 1, "documents are counted, not passages"
    assert gate.record(found) is found, "what was redacted is clean"


def test_flag_and_off():
    flag, off = Gate(DeidPolicy(text="flag")), Gate(DeidPolicy(text="off"))
    found = flag.record(record(*TALK, meta={"modality": "CT"}))
    assert isinstance(found, Record) and found.meta == {"modality": "CT", "phi": ["date", "name", "record number"]}
    assert found.turns == record(*TALK).turns
    assert off.record(record(*TALK)) == record(*TALK)
    assert off.counts == {"text: not looked at": 1}


def test_clean_records_pass_unchanged_and_are_counted():
    gate, clean = Gate(DeidPolicy()), record("<image>\nIs there a nodule?", "Yes, 3/5 slices show a 12 mm nodule.")
    assert gate.record(clean) is clean
    assert gate.counts == {"text: clean": 1}


@pytest.mark.parametrize("text", [t for t, _ in IDENTIFYING])
def test_redaction_is_complete_and_keeps_image_marks(text):
    gate = Gate(DeidPolicy(text="redact"))
    found = gate.record(record(f"<image>{parse(text)[0]}<image>", "yes"))
    assert isinstance(found, Record) and marks(found.turns) == 2
    assert find(found.turns[0].text) == []


def test_counting_from_threads():
    gate, clean = Gate(DeidPolicy()), record("<image>", "normal")
    threads = [threading.Thread(target=lambda: [gate.record(clean) for _ in range(2000)]) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert gate.counts == {"text: clean": 8000}


HOSTILE = (
    " ", "\n", "\t", "1", "a", "A", "Aa ", "A. ", "1/", "1-", "1.", "12/12/", "Dr. ", "Dr ", "Dr. A", "patient name: ", "patient id: ", "MRN: ",
    "accession ", "+1 ", "+ ", "(", "555-", "a@", "a.", "a@a.", "Jan ", "May ", "Mary Ann ", "1 A", "12 Main ", "signed by Ann ", "DR. SMITH ",
    "SMITH^", "ABCDEFGHIJ", "van der ", "O'", "é", "年", "aged ", "9", "CT of ", "x-ray", "tel. ", "phone: 1", "<image>",
    "dr. ", "dr. a", "12 / ", "617 ", "1-mar-", "1.1.", "acc# ", "call ", "Herr ", "Frau Dr. ", "John Smith, ",
)  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE)
def test_time_is_linear(piece):
    """A quadratic pattern would need minutes."""
    start = time.process_time()
    find((piece * (50_000 // len(piece)))[:50_000])
    assert time.process_time() - start < 2


@pytest.mark.parametrize("piece", [" ", "12/12/2014 ", "Dr. A", "x-ray"])
def test_a_megabyte(piece):
    start = time.process_time()
    find((piece * (1_000_000 // len(piece)))[:1_000_000])
    assert time.process_time() - start < 40


HEADERS = (
    ({"Modality": "CT"}, None),
    ({"Modality": "MR", "ImageType": ["ORIGINAL", "PRIMARY", "M"]}, None),
    ({"Modality": "DX", "BurnedInAnnotation": "NO"}, None),
    ({"Modality": "US", "BurnedInAnnotation": " no "}, None),
    ({"Modality": "CT", "BurnedInAnnotation": "YES"}, "burned-in annotation"),
    ({"Modality": "CT", "BurnedInAnnotation": "yes"}, "burned-in annotation"),
    ({"Modality": "US"}, "modality may burn in text"),
    ({"Modality": "us "}, "modality may burn in text"),
    ({"Modality": "US", "BurnedInAnnotation": "MAYBE"}, "modality may burn in text"),
    ({}, "modality may burn in text"),
    ({"Modality": "CT", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "modality may burn in text"),
    ({"Modality": "CT", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.7.4"}, "modality may burn in text"),
    ({"Modality": "CR", "ConversionType": "DF"}, "modality may burn in text"),
    ({"Modality": "CT", "ImageType": ["DERIVED", "SECONDARY", "MPR"]}, "modality may burn in text"),
    ({"Modality": "CT", "ImageType": ["DERIVED", "PRIMARY", "SCREEN SAVE"]}, "modality may burn in text"),
    ({"Modality": "CT", "ImageType": "DERIVED\\PRIMARY\\DOSE_INFO"}, "modality may burn in text"),
    ({"Modality": "PT", "RecognizableVisualFeatures": "YES"}, "recognizable visual features"),
    *(({"Modality": modality}, "modality may burn in text") for modality in sorted(BURNS_TEXT)),
)


@pytest.mark.parametrize(("header", "reason"), HEADERS, ids=str)
def test_dicom_headers(header, reason):
    gate = Gate(DeidPolicy())
    if reason is None:
        gate.dicom(header, "clinic")
        assert gate.counts == {"dicom: pixels only": 1}
        return
    with pytest.raises(BadImage) as e:
        gate.dicom(header, "clinic")
    assert e.value.args[0] == reason
    assert gate.counts == {f"dicom {reason}: rejected": 1}


def test_a_source_is_allowed_by_name_but_never_a_face():
    gate = Gate(DeidPolicy(allow_burned_in=("open_us",)))
    gate.dicom({"Modality": "US"}, "open_us")
    gate.dicom({"Modality": "CT", "BurnedInAnnotation": "YES"}, "open_us")
    with pytest.raises(BadImage, match="modality may burn in text"):
        gate.dicom({"Modality": "US"}, "open_us_2")
    with pytest.raises(BadImage, match="recognizable"):
        gate.dicom({"Modality": "US", "RecognizableVisualFeatures": "YES"}, "open_us")
    assert gate.counts == {
        "dicom modality may burn in text: allowed by name": 1,
        "dicom burned-in annotation: allowed by name": 1,
        "dicom modality may burn in text: rejected": 1,
        "dicom recognizable visual features: rejected": 1,
    }
