"""The page as text, and in a headless Chromium where there is one."""

import functools
import html
import json
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest

from datamodules.errors import DataError
from studies.page import MAX_ROWS, Details, FigureBlock, Page, Prose, Section, TableBlock, render_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
SVG = (
    '<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="{width}pt" height="150pt">'
    '<defs><clipPath id="clip"><rect width="{width}" height="150"/></clipPath></defs>'
    '<rect width="{width}" height="150" fill="white"/><rect clip-path="url(#clip)" width="600" height="9"/></svg>'
)
NASTY = "<img src='{site}/stolen.png'><script>stolen()</script> & \"quoted\" 'x' naïve 数 {{{{ 7 * 7 }}}}"
LONG = "CheXpert+MIMIC-CXR+NIH+PadChest_merged_at_1024_pixels_without_a_single_space"


def make_page(nasty="A & B <b>"):
    gains = pd.DataFrame(
        {
            "source": ["nih", nasty, "imagenet-21k", LONG, "scratch"],
            "n": [5, 10, 100, 20, 3],
            "gain": ["+3.0 [1.0, 5.0]", "−12.5 [−14, −11]", "–", "+0.4 [−1, 2]", "< 0.05"],
            "shots": ["full", "1", "10", "5", "100"],
            **{f"an extra column {i}": ["not distinguishable"] * 5 for i in range(5)},
        }
    )
    figure = FigureBlock(SVG.format(width=900), f"Gains. {nasty}", f"Gains of {nasty}", ["a b.png", "gains:1.pdf"])
    return Page(
        f"Does it help? {nasty}",
        ["A larger source helps: +3.0 points (95 % interval 1.0 to 5.0).", f"Of {LONG} no claim is made.", nasty],
        {"seeds": "5", nasty: nasty},
        [
            Section("Gains", [Prose(f"One.\nStill one.\n\n- first {nasty}\n- second"), figure]),
            Section(f"Tables {LONG}", [TableBlock(gains, "Gains over scratch.", files=["gains.csv", "gains.tex"])]),
            Section("More", [Details(f"All {nasty}", [figure, TableBlock(gains, "Again.", sortable=False)])]),
        ],
    )


class Tree(HTMLParser):
    """Elements as (tag, attributes), and all text outside style and script."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text, self.hidden = [], "", False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.hidden = tag in ("style", "script")

    def handle_endtag(self, tag):
        self.hidden = False

    def handle_data(self, data):
        self.text += "" if self.hidden else data

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


# TEXT ----------------------------------------------------------------------------------------------------------------


def test_everything_from_users_is_escaped():
    nasty = NASTY.format(site="http://site.example")
    plain, tree = Tree(render_page(make_page("plain"))), Tree(render_page(make_page(nasty)))
    assert [tag for tag, _ in tree.elements] == [tag for tag, _ in plain.elements]
    assert tree.text.count(nasty) >= 8
    assert nasty in tree.of("img")[0]["alt"]
    assert "{{ 7 * 7 }}" in tree.text
    assert not re.search(r"""(?:src|href|url|@import)\s*[=(]?\s*["']?https?:""", render_page(make_page()))


def test_the_answer_comes_first_and_headings_are_in_order():
    tree = Tree(render_page(make_page()))
    words = " ".join(tree.text.split())
    answer = words.index("A larger source helps: +3.0 points (95\u00a0% interval 1.0 to 5.0).".replace("\u00a0", " "))
    assert words.index("Does it help?") < answer < words.index("seeds") < words.index("Gains over scratch.")
    levels = [int(tag[1]) for tag, _ in tree.elements if re.fullmatch(r"h\d", tag)]
    assert levels == [1, 2, 2, 2]
    ids = [attributes["id"] for _, attributes in tree.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    anchors = [link["href"] for link in tree.of("a") if link["href"].startswith("#")]
    assert [anchor[1:] for anchor in anchors] == [part["id"] for part in tree.of("section")]
    labelled = [attributes["aria-labelledby"] for _, attributes in tree.elements if "aria-labelledby" in attributes]
    assert set(labelled) <= set(ids)


def test_tables_and_figures_have_what_screen_readers_need():
    tree = Tree(render_page(make_page()))
    assert len(tree.of("caption")) == len(tree.of("table")) == 2
    assert {cell["scope"] for cell in tree.of("th")} == {"col", "row"}
    assert all(image["alt"] for image in tree.of("img"))
    assert "Table 1. Gains over scratch." in tree.text
    assert "Figure 2. Gains." in tree.text
    assert "lang" in tree.of("html")[0]
    boxes = [attributes for _, attributes in tree.elements if attributes.get("class") == "box"]
    assert len(boxes) == 4
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)  # arrow keys scroll them


def test_prose_has_paragraphs_and_lists():
    assert Prose("One\ntwo.\n\n\n- a\n- b\n\n- c\nno list").parts == ["One two.", ["a", "b"], "- c no list"]
    assert Prose("").parts == []


def test_files_are_linked_by_relative_addresses():
    block = TableBlock(pd.DataFrame({"a": [1]}), "", files=["a b.csv", "javascript:x.tex", "//site.example/x.csv"])
    tree = Tree(render_page(Page("t", [], {}, [Section("s", [block])])))
    assert [link["href"] for link in tree.of("a")][1:] == [
        "./a%20b.csv",
        "./javascript%3Ax.tex",
        "./site.example/x.csv",
    ]
    assert "a b.csv" in tree.text  # one of two files of its kind
    assert "LaTeX" in tree.text


def test_links_of_one_kind_bear_the_names_of_their_files():
    block = TableBlock(pd.DataFrame({"a": ["+1.0 [0.5, 1.5]"]}), "", files=["summary.csv", "gains.csv", "gains.tex"])
    text = Tree(render_page(Page("t", [], {}, [Section("s", [block])]))).text
    assert "summary.csv gains.csv LaTeX" in " ".join(text.split())
    assert "[0.5,\u00a01.5]" in text  # no line breaks an interval


def test_a_long_table_is_cut_and_says_so():
    frame = pd.DataFrame({"run": [f"run-{i}" for i in range(100_000)], "value": 0.5})
    page = render_page(Page("t", [], {}, [Section("s", [TableBlock(frame, "Rows.", files=["results.csv"])])]))
    tree = Tree(page)
    assert len(tree.of("tr")) == 1 + MAX_ROWS
    assert len(page) < 50_000
    assert "The first 200 of 100,000 rows. All of them: results.csv" in " ".join(tree.text.split())
    assert "sortable" not in str(tree.of("table"))  # the first of a few rows would not be the first of all
    short = render_page(Page("t", [], {}, [Section("s", [TableBlock(frame.head(MAX_ROWS), "Rows.")])]))
    assert "The first" not in Tree(short).text
    assert "sortable" in str(Tree(short).of("table"))


def test_empty_parts():
    page = render_page(Page("t", [], {}, [Section("s", [TableBlock(pd.DataFrame({"a": [], "b": []}), "None.")])]))
    assert len(Tree(page).of("tr")) == 1
    assert "<dl" not in page


def test_a_figure_keeps_its_size_and_comes_from_a_file(tmp_path):
    (tmp_path / "a.svg").write_text(SVG.format(width=300))
    address, width, height = FigureBlock(tmp_path / "a.svg", "", "").picture
    assert (width, height) == (400, 200)  # 4 / 3 pixels a point
    assert address.startswith("data:image/svg+xml;base64,")
    for wrong in ("<svg", "<svg xmlns='x'/>", "<svg width='1foot' height='2'/>"):
        with pytest.raises(DataError, match="cannot be shown"):
            render_page(Page("t", [], {}, [Section("s", [FigureBlock(wrong, "c", "a")])]))
    with pytest.raises(DataError, match=r"absent\.svg"):
        FigureBlock(tmp_path / "absent.svg", "", "").picture.count(0)


# CHROMIUM ------------------------------------------------------------------------------------------------------------

# Loads the page at two widths, as phones and screens would, tries it, and leaves what it found as text.
PROBE = """<!doctype html><body><script>
const results = {};
const frames = [360, 1280].map((width) => {
  const frame = document.createElement("iframe");
  Object.assign(frame.style, { width: width + "px", height: "900px", border: 0 });
  frame.src = "index.html";
  document.body.append(frame);
  return frame;
});
const column = (table, place) => [...table.tBodies[0].rows].map((row) => row.cells[place].textContent.trim());
addEventListener("load", () => {
  for (const frame of frames) {
    const inner = frame.contentDocument;
    inner.querySelectorAll("details").forEach((part) => { part.open = true; });
    const root = inner.documentElement;
    const boxes = [...inner.querySelectorAll(".box")];
    const text = [...inner.querySelectorAll("p")];
    results[parseInt(frame.style.width)] = {
      overflow: Math.max(root.scrollWidth, inner.body.scrollWidth) - root.clientWidth,
      scrolling: boxes.filter((box) => box.scrollWidth > box.clientWidth).length,
      images: [...inner.images].map((image) => image.naturalWidth),
      shown: [...inner.images].map((image) => Math.round(image.getBoundingClientRect().width)),
      answer: inner.querySelector(".answer p").getBoundingClientRect().bottom,
      letters: Math.max(...text.map((part) => part.clientWidth / parseFloat(getComputedStyle(part).fontSize))),
    };
  }
  const inner = frames[1].contentDocument;
  const table = inner.querySelector("table");
  const buttons = [...table.querySelectorAll("thead button")];
  results.buttons = [buttons.length, inner.querySelectorAll("table:not(.sortable) button").length];
  buttons[0].focus();
  results.focus = inner.activeElement === buttons[0] && buttons[0].type === "button";
  results.sorted = buttons.slice(0, 4).map((button, place) => [0, 1].map(() => {
    button.click();
    return [button.closest("th").getAttribute("aria-sort"), column(table, place)];
  }));
  results.marked = table.querySelectorAll("[aria-sort]").length;
  const out = document.createElement("pre");
  out.textContent = JSON.stringify(results);
  document.body.append(out);
});
</script>"""


@pytest.fixture
def site(tmp_path):
    """A server of a folder, that notes every request: (folder, address, paths asked for)."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield tmp_path, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def browse(folder, address, *options):
    """The document after its scripts have run, and what the console said."""
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            *(f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=4000"),
            *("--window-size=1400,1000", *options, "--dump-dom", address),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


@needs_chromium
def test_layout_and_sorting_in_chromium(site):
    folder, address, asked = site
    (folder / "index.html").write_text(render_page(make_page(NASTY.format(site=address))), encoding="utf-8")
    (folder / "probe.html").write_text(PROBE)
    document, console = browse(folder, f"{address}/probe.html")
    assert console == []
    assert set(asked) <= {"/probe.html", "/index.html", "/favicon.ico"}
    found = json.loads(html.unescape(re.search(r"<pre>(.*)</pre>", document, re.DOTALL)[1]))
    phone, screen = found["360"], found["1280"]
    for view in (phone, screen):
        assert view["overflow"] == 0
        assert view["images"] == [1200, 1200]  # both were decoded
        assert view["answer"] < 700
        assert view["letters"] < 40  # ems: a letter is about half as wide as it is high
    assert phone["scrolling"] == 4
    assert phone["shown"] == [900, 900]  # three quarters: smaller, its text could not be read
    assert all(width <= 1000 for width in screen["shown"])
    assert found["buttons"] == [9, 0]
    assert found["focus"] is True
    assert found["marked"] == 1
    nasty = NASTY.format(site=address)
    orders = [[[text.replace("\u00a0", " ") for text in order] for _, order in clicks] for clicks in found["sorted"]]
    assert [[way for way, _ in clicks] for clicks in found["sorted"]] == [["ascending", "descending"]] * 4
    assert orders[0][0] == [nasty, LONG, "imagenet-21k", "nih", "scratch"]
    assert orders[0][1] == orders[0][0][::-1]
    assert orders[1] == [["3", "5", "10", "20", "100"], ["100", "20", "10", "5", "3"]]
    gains = ["−12.5 [−14, −11]", "< 0.05", "+0.4 [−1, 2]", "+3.0 [1.0, 5.0]"]
    assert orders[2] == [[*gains, "–"], [*gains[::-1], "–"]]
    assert orders[3] == [["1", "5", "10", "100", "full"], ["100", "10", "5", "1", "full"]]


@needs_chromium
def test_no_script_is_needed(site):
    folder, address, _ = site
    (folder / "index.html").write_text(render_page(make_page()), encoding="utf-8")
    reader = "document.body.append(document.querySelector('iframe').contentDocument.body.innerText)"
    frame = "<iframe sandbox='allow-same-origin' src='index.html' width='900'></iframe>"
    (folder / "frame.html").write_text(f'<!doctype html><body onload="{reader}">{frame}')
    document, console = browse(folder, f"{address}/frame.html")
    assert len(console) == 1
    assert "sandboxed" in console[0]  # the page's script did not run
    assert "A larger source helps" in document
    assert "+0.4 [−1, 2]" in document.replace("\xa0", " ").replace("&nbsp;", " ")
    assert "↕" not in document


@needs_chromium
def test_chromium_would_have_told(site):
    """The checks above can fail: an image from elsewhere is asked for without the page's policy, stopped with it."""
    folder, address, asked = site
    page = render_page(make_page())
    policy = re.search(r"<meta http-equiv=\"Content-Security-Policy\".*?>", page)[0]
    evil = f"<img src='{address}/stolen.png'><script>console.log('ran')</script>"
    (folder / "open.html").write_text(f"<!doctype html>{evil}")
    (folder / "shut.html").write_text(f"<!doctype html>{policy}{evil}")
    _, console = browse(folder, f"{address}/open.html")
    assert "/stolen.png" in asked
    assert any("ran" in line for line in console)
    asked.clear()
    _, console = browse(folder, f"{address}/shut.html")
    assert "/stolen.png" not in asked
    assert len(console) == 2  # the picture and the script, both refused
