"""inspect_data's page of a shard set: true figures, nothing from outside, nothing unescaped, usable with a keyboard and without scripts."""

import base64
import hashlib
import io
import itertools
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from megatron_infimed.data.chat import encode_batch, load_tokenizer
from megatron_infimed.data.shard_writer import ShardWriter
from megatron_infimed.data.shards import Shard
from megatron_infimed.errors import UserError
from megatron_infimed.intake.records import Record, Reject, Turn, make_record
from megatron_infimed.report import histogram as draw
from megatron_infimed.report.pictures import Thumbnails, originals
from megatron_infimed.report.rows import look, read_document, show
from megatron_infimed.report.shard import app, images_a_document, lengths, packed, page, shortened, summary, survey
from megatron_infimed.report.shardset import ShardSet
from tests.tiny import tiny_images, tiny_tokenizer

EVIL = "</script><script>alert('x')</script><img src=x onerror=alert(1)> \"' javascript:"
STYLE = Path(__file__).parents[2] / "megatron_infimed/report/shard_style.html"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def write(prefix, tokenizer, documents, images=(), rejects=(), settings=None, decisions=None):
    """documents: (id, source, question, answer, numbers of images)."""
    inputs = [{"name": f"{prefix.name}.jsonl {EVIL}", "bytes": 12345, "sha256": "ab" * 32, "source": "a"}]
    with ShardWriter(prefix, tokenizer, inputs=inputs, settings=settings) as writer:
        numbers = [writer.add_image(data) for data in images]
        for id, source, question, answer, pictures in documents:
            record = make_record(
                id=id,
                images=[b"x"] * len(pictures),
                turns=[Turn("user", "<image>" * len(pictures) + question), Turn("assistant", answer)],
                source=source,
            )
            assert isinstance(record, Record)
            segments = encode_batch(tokenizer, [record.turns])[0]
            writer.add_document(id, source, segments, [numbers[k] for k in pictures])
        for reject in rejects:
            writer.add_reject(reject)
        writer.tally.decisions.update(decisions or {})
        writer.finish()
    return prefix


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tiny_tokenizer(tmp_path_factory.mktemp("tok")))


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory, tokenizer):
    """Two shards: 30 documents with 0 to 2 images, one of which does not decode; 10 of text alone, some long."""
    folder = tmp_path_factory.mktemp("shards")
    images = [*tiny_images(8), b"not an image"]
    first = [(f"a{i}", ("vqa", EVIL)[i % 2], f"Which organ? {EVIL}", f"No. {i} {EVIL}", [i % 9, 8][: i % 3]) for i in range(30)]
    second = [(f"b{i} {EVIL}", "vqa", "word " * (60 * i), "yes", []) for i in range(10)]
    rejects = [Reject(f"r{i} {EVIL}", f"corrupt image {EVIL}", f"bytes {EVIL}", "vqa") for i in range(25)] + [Reject("z", "empty", "", "b")]
    one = write(folder / "one", tokenizer, first, images, rejects, {"deid": {"text": "redact"}}, {f"text date {EVIL}": 7})
    return [one, write(folder / "two", tokenizer, second, rejects=[Reject("y", "empty", "no turn", "b")])]


@pytest.fixture(scope="module")
def shards(prefixes, tokenizer):
    return ShardSet(prefixes, tokenizer)


@pytest.fixture(scope="module")
def html(shards):
    return page(survey(shards, rows=4, capacity=512, tokens_per_image=16))


class Page(HTMLParser):
    VOID = ("meta", "img", "br", "input", "rect", "line", "path")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.bad, self.script, self.words = [], [], [], "", ""
        self.feed(text)
        self.close()
        self.ids = [a["id"] for _, a in self.tags if "id" in a]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID and (not self.open or self.open.pop() != tag):
            self.bad.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.script += data
        elif self.open and self.open[-1] != "style":
            self.words += data

    def named(self, *names):
        return [(tag, a) for tag, a in self.tags if tag in names]


def test_the_page_stands_alone_and_escapes_what_it_shows(html):
    found = Page(html)
    assert not found.bad and not found.open  # well-formed
    assert len(found.ids) == len(set(found.ids))
    assert not found.named("link", "iframe", "object", "base", "form", "embed")
    for tag, attrs in found.tags:
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        for name in ("href", "src", "srcset", "action", "data", "poster", "xlink:href"):
            if name in attrs:
                assert attrs[name].startswith("#") if tag == "a" else attrs[name].startswith("data:image/jpeg;base64,"), attrs
    assert not re.search(r"https?://|url\(|@import", re.sub('base64,[^"]*', "", html))
    assert "alert(1)" in found.words and len(found.named("script")) == 1  # EVIL is there, as text
    assert html.encode() and len(html) < 4_000_000


def test_a_document_s_text_is_shown_to_the_character(shards, html):
    found = look(shards, rows=4, capacity=512, tokens_per_image=16)
    docs = [doc for row in found.rows for doc in row.docs]
    for doc in docs:
        drawn = re.search(rf'id="d{doc.number}">.*?<div class="text">(.*?)</div>', html, re.S)
        assert drawn
        text = unescape(re.sub(r"<[^>]*>", "", re.sub(r"<figure>.*?</figure>", "", drawn[1], flags=re.S)))
        assert text == "".join(s.text for s in doc.spans)
        assert "".join(unescape(m) for m in re.findall(r"<mark>(.*?)</mark>", drawn[1], re.S)) == "".join(
            s.text for s in doc.spans if s.kind == "target" and not s.special
        )
    assert len(docs) > 4


def test_only_its_own_script_may_run(html):
    found = Page(html)
    policy = next(a["content"] for _, a in found.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(found.script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert "alert" not in found.script


def test_a_keyboard_and_a_screen_reader_find_their_way(html):
    found = Page(html)
    assert all(a.get("alt") for _, a in found.named("img")) and found.named("img")
    levels = [int(tag[1]) for tag, _ in found.named("h1", "h2", "h3", "h4", "h5", "h6")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    targets = {a["href"][1:] for _, a in found.named("a")}
    assert targets <= set(found.ids) and {"main", "rows", "gallery"} <= targets
    labelled = {ref for _, a in found.tags for ref in a.get("aria-labelledby", "").split()}
    assert labelled <= set(found.ids)
    assert [len(found.named(tag)) for tag in ("header", "main", "footer", "nav")] == [1, 1, 1, 1]
    assert all("scope" in a for _, a in found.named("th"))
    assert dict(found.tags)["html"]["lang"] == "en"
    rows = [a for tag, a in found.tags if a.get("class") == "row"]
    assert len(rows) == 4 and all(a["tabindex"] == "-1" for a in rows)
    scrolled = [a for _, a in found.tags if a.get("class") == "scroll"]
    assert scrolled and all(
        a["tabindex"] == "0" and a["role"] == "region" and ("aria-label" in a or "aria-labelledby" in a) for a in scrolled
    )


def test_without_scripts_every_chart_is_shown_and_no_dead_control(html):
    found = Page(html)
    shown = [a for _, a in found.tags if a.get("data-group") == "lengths"]
    assert [a["data-shown"] for a in shown] == ["16", "64", "144", "256", "729"] and not any("hidden" in a for a in shown)
    assert all("hidden" in a for tag, a in found.tags if tag == "fieldset" or "data-script" in a)
    assert not found.named("button")
    assert html.count("prefers-reduced-motion") == 1 and "prefers-color-scheme: dark" in html


def contrast(a, b):
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_contrast_is_aa(dark):
    blocks = re.findall(r":root \{(.*?)\}", STYLE.read_text(), re.S)
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", blocks[dark]))
    words = [(ink, back) for ink in ("ink", "soft", "real", "bad", "image") for back in ("page", "card")]
    words += [("target-ink", "target-back"), ("ink", "target-back"), ("bad", "target-back")]
    for ink, back in words:
        assert contrast(colours[ink], colours[back]) >= 4.5, (ink, back)
    for mark in ("edge", "real", "target", "image", "bad"):  # parts of charts and outlines
        assert contrast(colours[mark], colours["card"]) >= 3, mark


def test_a_set_is_its_shards_end_to_end(shards, prefixes):
    one, two = map(Shard, prefixes)
    assert len(shards) == 40 and np.array_equal(shards.lengths(9), np.concatenate([one.lengths(9), two.lengths(9)]))
    for i in (0, 29, 30, 39):
        shard, k = shards.document(i)
        assert (shard.prefix, k) == ((one.prefix, i) if i < 30 else (two.prefix, i - 30))
    assert shards.image(8) == b"not an image"
    assert shards.totals["documents"] == 40 and shards.totals["rejected"] == 27 and shards.totals["text_tokens"] == shards.lengths(0).sum()
    assert {s: c["documents"] for s, c in shards.sources.items()} == {"vqa": 25, EVIL: 15}
    assert list(shards.rejects) == [f"corrupt image {EVIL}", "empty"] and [r["count"] for r in shards.rejects.values()] == [25, 2]
    assert len(shards.rejects[f"corrupt image {EVIL}"]["examples"]) == 20
    assert [e["id"] for e in shards.rejects["empty"]["examples"]] == ["z", "y"]
    assert shards.decisions == {f"text date {EVIL}": 7} and shards.policies == {one.prefix: {"text": "redact"}}


def test_refusals(prefixes, tokenizer, tmp_path):
    with pytest.raises(UserError, match="given more than once"):
        ShardSet([prefixes[0], str(prefixes[0])], tokenizer)
    other = load_tokenizer(tiny_tokenizer(tmp_path / "other", vocab_size=380))
    with pytest.raises(UserError, match="made with another tokenizer"):
        ShardSet(prefixes, other)
    with pytest.raises(UserError, match=r"none of 40 documents fits a row of 3 tokens; raise --capacity"):
        survey(ShardSet(prefixes, tokenizer), capacity=3)


def test_lengths_are_counted_at_every_resolution(shards):
    for found in lengths(shards, (16, 729), 512):
        values = shards.lengths(found.tokens_per_image)
        assert found.beyond == (values > 512).sum() == sum(b.count for b in found.histogram.bars if b.beyond)
        assert sum(b.count for b in found.histogram.bars) == len(values)
        assert found.quantiles[0] >= np.median(values) and found.quantiles[3] == values.max()
        assert found.mean == pytest.approx(values.mean())
        assert [label for _, label in found.histogram.marks] == ["row of 512"]
        for bar in found.histogram.bars:  # the label says what was counted
            ends = [int(n.replace(",", "")) for n in re.findall(r"[\d,]+", bar.label)]
            assert ((values >= ends[0]) & (values <= ends[-1])).sum() == bar.count
    same = lengths(shards, (16, 729), 512)
    assert same[0].histogram.ticks == same[1].histogram.ticks  # one axis, so switching compares


def test_packing_is_the_planner_s(shards):
    found = packed(shards, 512, 729, None, 0)
    assert found.too_long == (shards.lengths(729) > 512).sum() > 0 and found.documents == 40 - found.too_long
    assert found.rows >= found.lower_bound and found.fill == pytest.approx(
        shards.lengths(729)[shards.lengths(729) <= 512].sum() / (512 * found.rows)
    )
    few = packed(shards, 4096, 16, 1, 0)
    assert few.too_long == (shards.image_counts > 1).sum() and few.lower_bound >= few.images
    assert packed(shards, 3, 16, None, 0).rows == 0


@pytest.mark.parametrize("most", [0, 1, 8, 9, 16, 17, 1000])
def test_images_in_a_document(most):
    counts = np.concatenate([np.arange(most + 1), [0, 0]])
    chart = images_a_document(counts)
    assert sum(b.count for b in chart.bars) == len(counts) and chart.bars[0].count == 3
    for bar in chart.bars:
        ends = [int(n.replace(",", "")) for n in bar.label.split("–")]
        assert ((counts >= ends[0]) & (counts <= ends[-1])).sum() == bar.count
    assert max(b.left + b.width for b in chart.bars) <= 100.001


def test_originals_come_from_headers(shards):
    found = originals(shards, 5000, 0)
    assert (found.distinct, found.sampled, found.unreadable) == (9, 9, 1) and sum(found.formats.values()) == 8
    real = [Image.open(io.BytesIO(data)).size for data in tiny_images(8)]
    assert sorted(map(tuple, found.sizes.tolist())) == sorted(real)
    assert found.below(60) == sum(min(size) < 60 for size in real) and found.below(384) == 8
    half = originals(shards, 4, 1)
    assert half.sampled == 4 and half.sizes.tolist() == originals(shards, 4, 1).sizes.tolist()
    chart = draw.heat_map(found.sizes, marks=(224, 384))
    assert sum(int(label.rsplit(" ", 1)[1]) for *_, label in chart.cells) == 8
    assert all(0 <= x <= 100 - chart.side + 1e-6 and 0 <= y <= 100 - chart.side + 1e-6 for x, y, *_ in chart.cells)
    assert [label for _, label in chart.marks] == ["224", "384"]


def test_a_wide_picture_is_right_of_a_high_one():
    wide, high = draw.heat_map(np.array([[800, 100], [100, 800]]), marks=(224, 384)).cells[::-1]
    assert wide[0] > high[0] and wide[1] > high[1] and wide[3].endswith("high: 1")


def test_thumbnails_stay_within_their_budget(shards):
    shard, real = shards.shards[0], Thumbnails(64, 10**6)
    about, address = real.of(shard, 0)
    assert about.startswith("JPEG") and max(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))).size) <= 64
    tight = Thumbnails(64, len(address) + 1)
    assert [bool(tight.of(shard, k)[1]) for k in (0, 1, 2)] == [True, True, False] and tight.of(shard, 2)[0].startswith("PNG")
    assert real.of(shard, 8) == ("does not decode: UnidentifiedImageError", "")


def test_a_picture_that_has_no_room_is_named(shards, monkeypatch):
    assert "page is full" not in page(survey(shards, capacity=512, tokens_per_image=16))
    monkeypatch.setattr("megatron_infimed.report.shard._ROWS_BUDGET", 1)
    assert "(not drawn: the page is full)" in page(survey(shards, capacity=512, tokens_per_image=16))


def test_a_document_is_read_as_stored(shards):
    doc = read_document(shards, 5, 16, Thumbnails(32, 10**6), most_pictures=1)
    assert (doc.id, doc.source, len(doc.images)) == ("a5", EVIL, 2) and doc.tokens == shards.lengths(16)[5]
    assert doc.images[0].thumbnail and not doc.images[1].thumbnail and "does not decode" in doc.images[1].about
    assert f"Which organ? {EVIL}" in "".join(s.text for s in doc.spans)
    assert f"No. 5 {EVIL}" in "".join(s.text for s in doc.spans if s.kind == "target")
    assert [s.text for s in doc.spans if s.special][:2] == ["<|im_start|>", "<|vision_start|>"]
    cut = shortened(doc.spans, 40)
    assert sum(len(s.text) for s in cut) <= 42 and cut[-1].text.endswith(" …")
    assert read_document(shards, 35, 16, None).name == f"5 of {shards.shards[1].prefix}"


def test_a_set_of_text_alone_and_nothing_rejected(tokenizer, tmp_path):
    prefix = write(tmp_path / "text", tokenizer, [(f"t{i}", "s", "What?", "That.", []) for i in range(3)])
    found = survey(ShardSet([prefix], tokenizer))
    text = page(found)
    assert "This set holds no image." in text and "Nothing was left out." in text and "<img" not in text and "De-identification" not in text
    assert not Page(text).bad and found.sizes is None and len(found.gallery) == 3


def test_no_image_decodes(tokenizer, tmp_path):
    prefix = write(tmp_path / "bad", tokenizer, [("a", "s", "What?", "That.", [0])], [b"%!PS-Adobe-3.0 EPSF-3.0"])
    text = page(survey(ShardSet([prefix], tokenizer)))
    assert "1 cannot be read" in text and "does not decode" in text and "<img" not in text


def test_the_terminal_is_not_steered_by_the_data(tokenizer, tmp_path):
    prefix = write(tmp_path / "esc", tokenizer, [("a\x1b[2J", "s", "x \x1b]0;owned\x07 y [bold]", "z\x9b31m", [])])
    out = io.StringIO()
    show(look(ShardSet([prefix], tokenizer)), Console(file=out, width=200))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", out.getvalue()) and "␛]0;owned␇ y [bold]" in out.getvalue()


def test_the_command(prefixes, tokenizer, tmp_path):
    tok = tiny_tokenizer(tmp_path / "tok")
    words = [*map(str, prefixes), "--tokenizer", str(tok), "--capacity", "512", "--rows", "2", "--tokens-per-image", "16"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert "documents" in shown.output and "rejected 27" in shown.output and "row 1: " in shown.output and "row 2: " not in shown.output
    drawn = CliRunner().invoke(app, [*words, "--html", str(tmp_path / "new/page.html")])
    assert drawn.exit_code == 0 and "drawn: " in drawn.output and (tmp_path / "new/page.html").read_text().count('class="row"') == 2
    table = io.StringIO()
    Console(file=table, width=200).print(summary(ShardSet(prefixes, tokenizer)))
    assert re.search(r"all\s+40", table.getvalue())
    with pytest.raises(UserError, match="cannot write there"):
        CliRunner().invoke(app, [*words, "--html", "/proc/none/page.html"], catch_exceptions=False)


DRIVE = """{
const log = [], key = (name, at) => (at ?? document.activeElement).dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true}));
const table = document.querySelector("table.sortable"), head = table.tHead.rows[0].cells[1];
const cell = () => table.tBodies[0].rows[0].cells[1].textContent;
head.querySelector("button").focus(); log.push(document.activeElement.tagName);
for (let i = 0; i < 2; i++) { document.activeElement.click(); log.push(head.getAttribute("aria-sort"), cell()); }
const shown = () => [...document.querySelectorAll("[data-group]")].filter(p => !p.hidden).map(p => p.dataset.shown).join();
log.push(shown()); document.querySelector("input[value='729']").click(); log.push(shown());
key("j"); log.push(document.activeElement.id || "elsewhere");
const rows = document.getElementById("rows"); rows.focus();
for (const name of ["j", "ArrowRight", "k", "ArrowLeft", "k"]) { key(name); log.push(document.activeElement.id); }
document.body.dataset.log = log.join(" ");
}"""


def test_flipped_bits_are_one_line_or_a_page(tokenizer, tmp_path):
    """Sizes and the manifest hold, the content does not: never a traceback."""
    prefix = write(tmp_path / "s", tokenizer, [(f"d{i}", "a", "What?", "A CT.", [i % 3]) for i in range(20)], tiny_images(3))
    tokenizer_path = tiny_tokenizer(tmp_path / "t")
    rng, refused = np.random.default_rng(0), 0
    for name in ("docs", "text.idx", "image.idx", "text.bin", "ids.jsonl") * 8:
        file = Path(f"{prefix}.{name}")
        good = file.read_bytes()
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
        file.write_bytes(bad)
        result = CliRunner().invoke(app, [str(prefix), "--tokenizer", str(tokenizer_path), "--html", str(tmp_path / "p.html")])
        assert result.exception is None or isinstance(result.exception, UserError | SystemExit), (name, result.exception)
        refused += isinstance(result.exception, UserError)
        file.write_bytes(good)
    assert refused


def test_sorting_switching_and_row_keys_in_a_browser(html, tmp_path):
    assert CHROMIUM, "no chromium here: apt-get install -y --no-install-recommends chromium"

    def dom(text):
        (tmp_path / "page.html").write_text(text)
        words = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--dump-dom"]
        words += [f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'page.html'}"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert "CONSOLE" not in done.stderr, done.stderr
        return done.stdout

    assert "<button" in dom(html)  # the policy lets the page's own script run
    policy = r'<meta http-equiv="Content-Security-Policy"[^>]*>'
    driven = dom(re.sub(policy, "", html).replace("</body>", f"<script>{DRIVE}</script></body>"))
    log = re.search(r'data-log="([^"]*)"', driven)
    assert log and log[1] == "BUTTON descending 25 ascending 15 16 729 elsewhere row0 row1 row0 row0 row0"
