"""The rules of scoring, case by case."""

import pytest

from megatron_infimed.evaluate.score import is_right, normalise, score, wilson


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The  Left Lung.", "left lung"),
        ("X-ray", "x ray"),
        ("H&E", "h e"),
        ("An MRI, of the head!", "mri of head"),
        ("A", "a"),  # an option's letter is not an article
        ("1.5 cm", "1.5 cm"),
        ("-5.", "-5"),
        ("T2-weighted", "t2 weighted"),
        ("\uff23\uff34", "ct"),  # full-width letters
        ("<5", "<5"),
        (" ?! ", ""),
    ],
)
def test_normalise(text, wanted):
    assert normalise(text) == wanted


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("Yes.", "yes", True),
        ("yes, it is", "yes", False),
        ("", "yes", False),
        ("...", "?!", False),
        ("x ray", "X-ray", True),
        ("5", "-5", False),
        ("an eye", "the eye", True),
    ],
)
def test_is_right(prediction, answer, right):
    assert is_right(prediction, answer) is right


def test_wilson():
    low, high = wilson(50, 100)
    assert low == pytest.approx(0.4038, abs=1e-4) and high == pytest.approx(0.5962, abs=1e-4)  # textbook values
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1 and wilson(0, 0) == (0, 1)


def row(prediction, answer, kind="open", gray=None, **more):
    return {"prediction": prediction, "answer": answer, "kind": kind, **({} if gray is None else {"gray_prediction": gray}), **more}


def test_figures():
    rows = [
        row("ct", "ct", gray="ct", domain="medical", source_seen=True),
        row("mr", "ct", gray="ct", domain="medical", source_seen=False),
        row("mr", "mr", gray="ct", domain="natural", source_seen=False),
        row("a", "a", "either_or", gray="", choices=["a", "b"], source_seen=True),
        row("d", "c", "either_or", gray="", choices=["c", "d"], source_seen=True),
        row("e", "e", "either_or", gray="", choices=["e", "f"], source_seen=True),
        row("magnets", "magnets", "knowledge", gray="magnets", needs_image=False),
    ]
    figures = score(rows)
    seeing = figures["needs_image"]
    assert (seeing["n"], seeing["right"], seeing["accuracy"]) == (6, 4, 0.66667)
    assert (seeing["gray"], seeing["gap"]) == (0.33333, 0.33333) and seeing["gap_low"] < 0.33 < seeing["gap_high"]
    assert figures["by_kind"]["open"]["majority"] == 0.66667 and figures["by_kind"]["either_or"]["majority"] == 0.33333
    assert figures["by_kind"]["either_or"]["guess"] == 0.5 and figures["by_kind"]["open"]["guess"] == 0.66667
    assert seeing["majority"] == 0.5 and seeing["guess"] == 0.58333
    assert {k: c["n"] for k, c in figures["by_source"].items()} == {"seen": 4, "new": 2}
    assert {k: c["n"] for k, c in figures["by_domain"].items()} == {"medical": 2, "natural": 1}
    assert figures["all"]["n"] == 7 and figures["by_kind"]["knowledge"]["accuracy"] == 1


def test_without_gray_answers_there_is_no_gap_and_without_questions_no_figure():
    figures = score([row("a", "a")])
    assert "gap" not in figures["all"] and figures["by_domain"] == {} and figures["by_source"] == {}
    assert score([row("a", "a", needs_image=False)])["needs_image"] == {"n": 0, "right": 0}
