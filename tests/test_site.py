"""The site (site/build_site.py), from a tiny executed notebook made here."""

import base64
import contextlib
import io
import re
import subprocess
import sys
import wave

import nbformat
import pandas as pd
import pytest
from browser import CHROMIUM, Browser
from bs4 import BeautifulSoup
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from replication.figures import Plot, save_figure
from replication.notebooks import notebook_names
from replication.records import ROOT
from replication.tables import styled, write_table

sys.path.append(str(ROOT / "site"))
import build_site  # noqa: E402

FORMULAS = r"""Inline $\hat\theta_n = E(x_n; w) < 1$ and

$$L_p = \big\| \phi_p(x) - \phi_p(\tilde x) \big\|_2, \qquad
M = \underbrace{\textstyle\sum_n J_n}_{\text{how it bends}} . $$

\begin{align} a &= b \\ c &= d \end{align}"""
WIDGET = "application/vnd.jupyter.widget-"
TABLE = pd.DataFrame({"claim": ["a|b", "<i>"], "verdict": ["holds", "not run"]})
ALTERNATIVES = [
    "Figure 9: from the <caption> in the file. Profile quick: a [b].",
    "In italics, k = 2.",
    "Picture of the section “2. Sounds & more”. Last word.",
]


def wav() -> str:
    """Half a second."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(b"\0\0" * 4000)
    return base64.b64encode(stream.getvalue()).decode()


def output(kind: str, data: str):
    return new_output("display_data", {kind: data, "text/plain": "not to be seen"})


def picture(caption: str = ""):
    plot = Plot(Figure(figsize=(2, 1)), TABLE, caption)
    return output("image/png", base64.b64encode(plot._repr_png_()).decode())


def tiny_book() -> nbformat.NotebookNode:
    sound = (
        f'<audio  controls="controls" >\n<source src="data:audio/wav;base64,{wav()}" type="audio/wav" />\nno\n</audio>'
    )
    sounds = f"<h4>BD</h4><table><tr><th>P</th><th>MSS</th></tr><tr><td></td><td>{sound}</td></tr></table>"
    widget = {"model_id": "0", "version_major": 2, "version_minor": 0}
    outputs = [picture(), new_output("stream", name="stderr", text="a warning"), output(WIDGET + "view+json", widget)]
    outputs += [output("text/markdown", "**A label**")]
    outputs += [output("text/html", html) for html in (sound, styled(TABLE).to_html(), sounds)]
    label = output("text/markdown", "*In italics, $k = 2$.* More.")
    cells = [
        new_markdown_cell("# The title\n\nSee `05_granular`, `06`, `Adam` and [the paper](https://example.org/)."),
        new_code_cell("profile = 'injected'", metadata={"tags": ["injected-parameters"]}),
        new_markdown_cell("## 1. Formulas for $\\theta$\n\n" + FORMULAS),
        new_code_cell("draw()", outputs=[picture(ALTERNATIVES[0]), picture(), label]),
        new_markdown_cell("## 2. Sounds & more\n\nFirst.\n\nLast *word*."),
        new_code_cell("if x < 1: play()", outputs=outputs),
        new_markdown_cell("## 3. End"),
    ]
    metadata = {"widgets": {WIDGET + "state+json": {"state": {}}}, "papermill": {"start_time": "2026-01-02T03"}}
    return new_notebook(metadata=metadata, cells=cells)


def lay_out(folder, book) -> None:
    (folder / "executed/quick").mkdir(parents=True, exist_ok=True)
    nbformat.write(book, folder / "executed/quick/00_start_here.ipynb")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built once, with processes forbidden: what builds the site cannot start a kernel."""
    folder = tmp_path_factory.mktemp("output")
    lay_out(folder, tiny_book())
    write_table(TABLE, "table_1", "quick", folder, "A caption.")
    write_table(TABLE, "report_card", "quick", folder, "The claims.")
    for name in ("figure_10", "figure_2"):
        save_figure(Figure(figsize=(2, 1)), TABLE, name, "quick", folder, f"About [{name}].")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", lambda *_, **__: pytest.fail("the site started a process"))
        return build_site.build("quick", folder)


def read(path):
    """A page without its title."""
    soup = BeautifulSoup(path.read_text("utf-8"), "html.parser")
    soup.title.extract()
    return soup


def of(page, tag, attribute):
    return [element[attribute] for element in page.select(f"{tag}[{attribute}]")]


def test_every_page_is_there_and_nothing_comes_from_outside(site):
    """Links to nothing are refused: below."""
    names = ["index", *build_site.PAGES, *notebook_names(), *(path.stem for path in (ROOT / "docs").glob("*.md"))]
    assert {f"{name}.html" for name in names} == {path.name for path in site.glob("*.html")}
    for name in names:
        page = read(site / f"{name}.html")
        assert "style.css" in of(page, "link", "href") and "index.html" in of(page, "a", "href")
        links = [element.get("src") or element["href"] for element in page.select("[src], [href]")]
        outside = {link for link in links if ":" in link.partition("#")[0] or link.startswith("/")}
        assert outside == ({"https://example.org/"} if name == "00_start_here" else set())
        assert not page.select("script, iframe, object")
    assert not re.search(r"@import|url\(", (site / "style.css").read_text("utf-8"))


def test_pictures_and_sounds_are_files_with_a_text(site):
    page = read(site / "00_start_here.html")
    assert of(page, "img", "alt") == ALTERNATIVES
    assert all((site / file).read_bytes().startswith(b"\x89PNG") for file in of(page, "img", "src"))
    figures = read(site / "figures.html")
    assert of(figures, "img", "alt") == ["About (figure_2).", "About (figure_10)."]  # by number
    assert of(figures, "img", "src") == ["figures/figure_2.png", "figures/figure_10.png"]
    for name in ("00_start_here", "listening"):
        page = read(site / f"{name}.html")
        assert of(page, "audio[controls]", "aria-label") == ["A label", "BD, MSS"]
        assert [(site / file).read_bytes() for file in of(page, "audio", "src")] == 2 * [base64.b64decode(wav())]


def test_formulas_are_mathml(site):
    page = read(site / "00_start_here.html")
    # in the heading, in the contents of the page none; two of the text, the environment, one in a caption
    assert sorted(of(page, "math", "display")) == ["block", "block", "inline", "inline", "inline"]
    assert "$" not in page.text and "\\" not in page.text
    assert page.text.count("‖") == 2 and "how\xa0it\xa0bends" in page.text
    for tex in (r"\foo x", r"x^", r"\frac{1}", r"\begin{pmatrix} a", "a & b"):
        with pytest.raises(ValueError) as raised:
            build_site.mathml(tex)
        assert repr(tex) in str(raised.value)


def test_code_is_folded_what_wants_a_kernel_is_gone_and_names_of_notebooks_are_links(site):
    page = read(site / "00_start_here.html")
    assert len(page.select("details")) == 2 and "if x < 1: play()" in page.text
    for gone in ("not to be seen", "a warning", "injected", "model_id"):
        assert gone not in (site / "00_start_here.html").read_text("utf-8")
    assert "a|b" in page.text and "<i>" in page.text  # the table's texts as they are
    links = of(page, "a", "href")
    assert {"05_granular.html", "06_chirplet.html"} <= set(links) and "Adam.html" not in links


def test_contents_documents_and_pages_of_what_was_not_run(site):
    page = read(site / "index.html")
    assert {path.name for path in site.glob("*.html")} <= {*of(page, "a", "href"), "index.html"}
    assert page.text.count("(not run)") == len(notebook_names()) - 1
    assert "2 claims on granular sounds: 1 “holds”, 1 “not run”" in page.text
    text = read(site / "05_granular.html").text
    assert "Not run" in text and "python -m replication notebook 05_granular --profile quick" in text
    assert "a|b" in read(site / "report_card.html").text and "A caption." in read(site / "tables.html").text
    page = read(site / "results.html")  # of docs/results.md
    assert {"importance.html", "report_card.html", "tables.html"} <= {*of(page, "a", "href")}
    assert "table_6_authors.md" in page.text  # of another profile: no link


def test_a_copy_of_another_state_of_the_notebook_says_so(site):
    text = read(site / "00_start_here.html").text
    assert "Executed 2026-01-02, profile quick. The notebook has changed since" in text
    book = nbformat.read(ROOT / "notebooks/00_start_here.ipynb", as_version=4)
    book.cells.insert(2, tiny_book().cells[1])
    assert build_site._note(book, "00_start_here", "quick") == "*Executed, profile quick.*"


def test_without_executed_notebooks_it_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="make reproduce PROFILE=smoke"):
        build_site.build("smoke", tmp_path)
    with pytest.raises(ValueError, match="unknown profile 'quik': did you mean 'quick'"):
        build_site.build("quik", tmp_path)


def test_a_faulty_site_is_refused_and_the_last_one_stays(tmp_path, monkeypatch):
    book = new_notebook(cells=[new_markdown_cell("# A title")])
    lay_out(tmp_path, book)
    last = build_site.build("quick", tmp_path)
    before = (last / "00_start_here.html").read_text("utf-8")
    faulty = ["[lost](nowhere.html)", "[part](index.html#no)", "<script>1</script>", "![](style.css)"]
    book.cells.append(new_markdown_cell("\n\n".join([*faulty, '<img src="https://example.org/a.png" alt="x">'])))
    lay_out(tmp_path, book)
    monkeypatch.setattr(build_site, "LIMIT_BYTES", 500)
    with pytest.raises(build_site.BrokenSite) as raised:
        build_site.build("quick", tmp_path)
    where = ("nowhere.html, which is not there", "index.html#no, which", "00_start_here.html: 0.0 MB with its pictures")
    for said in (*where, "from outside", "<script>", "css without a text"):
        assert said in str(raised.value)
    assert (last / "00_start_here.html").read_text("utf-8") == before


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
def test_in_a_browser(site, tmp_path):
    """Pages load without a complaint or a request outside, fit a phone, set their formulas; a player plays."""
    with contextlib.closing(Browser(tmp_path)) as browser:
        for page in sorted(site.glob("*.html")):
            for width in (1280, 390):
                browser.open(page, width)  # innerWidth grows with what is too wide, scrollWidth does not
                assert browser.value("document.documentElement.scrollWidth") <= width, page
                loaded = "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
                assert browser.value(loaded), page
        browser.open(site / "00_start_here.html")
        boxes = "[...document.querySelectorAll('math')].map(math => math.getBoundingClientRect())"
        sizes = browser.value(f"{boxes}.map(box => [box.width, box.height])")
        assert len(sizes) == 5 and all(width > 5 and height > 5 for width, height in sizes)
        top, bottom = "lastElementChild.getBoundingClientRect().top", "firstElementChild.getBoundingClientRect().bottom"
        under = f"(m => m.{top} > m.{bottom} - 3)(document.querySelector('munder'))"
        assert browser.value(under)  # set, not run on in a line
        played = """(async () => { const player = document.querySelector('audio'); await player.play();
            await new Promise(done => player.ontimeupdate = () => player.currentTime > 0 && done());
            return player.duration })()"""
        assert browser.value(played) == 0.5 and browser.said == [] and len(browser.asked) > 30
        assert all(address.startswith((site.as_uri(), "data:")) for address in browser.asked)
