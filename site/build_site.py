"""Builds build/site/: static pages from executed notebooks, tables and figures. Executes nothing, needs no network.

    python site/build_site.py --profile quick

A page for every notebook (its executed copy, else a line that says how to execute it), the report card, all figures, all tables
and all sounds, and a contents page. Formulas become MathML, which browsers set themselves; there is no script. Pictures and
sounds are files beside the pages. What is built is checked before it replaces the last site.
"""

from __future__ import annotations

import argparse
import base64
import io
import re
import shutil
import sys
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote
from xml.etree import ElementTree

import nbformat
import pandas as pd
from bs4 import BeautifulSoup, Tag
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat.v4 import new_markdown_cell, new_notebook
from PIL import Image
from pygments.formatters import HtmlFormatter

from replication.notebooks import notebook_names, notebook_path
from replication.records import ROOT
from replication.tables import profile_note
from replication.tasks import PROFILES, check_name

HERE = Path(__file__).parent
LIMIT_BYTES = 5_000_000  # of a page with its pictures
PARTS = {
    "mfrac": 2,
    "mroot": 2,
    "msub": 2,
    "msup": 2,
    "munder": 2,
    "mover": 2,
    "msubsup": 3,
    "munderover": 3,
}  # of MathML
CARDS = ("report_card", "chirplet_card", "drum_card", "cost_card", "theta_is_card", "claims")
PAGES = {"report_card": "Report card", "figures": "Figures", "tables": "Tables", "listening": "Listening"}


class BrokenSite(ValueError):
    """What would have been built has faults; the message lists them."""


# ---- formulas -----------------------------------------------------------------------------------------------------------


def mathml(tex: str, display: str = "inline") -> str:
    """A formula as a <math> element. display: "inline" or "block". Raises ValueError for one that does not convert whole."""
    try:
        math = convert(tex.replace("''", r"^{\prime\prime}"), display=display)
        math = math.replace(' xmlns="http://www.w3.org/1998/Math/MathML"', "")  # a heading's goes through ElementTree
        broken = [part for part in ElementTree.fromstring(math).iter() if len(part) != PARTS.get(part.tag, len(part))]
    except Exception as error:
        raise ValueError(f"the formula {tex!r} does not convert: {type(error).__name__}: {error}") from error
    # latex2mathml 3.81 leaves the \| of \big\| as it is, and sets bars as if they were relations
    bars = {r"\|": "‖", "&#x02016;": "‖", "|": "|", "&#x0007C;": "|"}
    bar = r'<mo(?! stretchy="true")[^>]*>(' + "|".join(map(re.escape, bars)) + ")</mo>"
    math = re.sub(bar, lambda found: f"<mi>{bars[found[1]]}</mi>", math).replace("<mi>;</mi>", "<mo>;</mo>")
    if broken or "\\" in math:  # it hands a command back that it does not know
        raise ValueError(f"the formula {tex!r} lacks a part, or has a command that latex2mathml does not know")
    return math


class _Renderer(IPythonRenderer):
    def inline_math(self, body: str) -> str:
        return mathml(body)

    def block_math(self, body: str) -> str:
        return mathml(body, "block")

    def latex_environment(self, name: str, body: str) -> str:
        return mathml(f"\\begin{{{name}}}{body}\\end{{{name}}}", "block")


class _Exporter(HTMLExporter):
    def markdown2html(self, source: str) -> str:
        return MarkdownWithMath(renderer=_Renderer(escape=False)).render(source)


# ---- notebooks ----------------------------------------------------------------------------------------------------------


def _plain(markdown: str) -> str:
    return " ".join(re.sub(r"[*`$#]", "", markdown).split())


def _alternative(png: bytes, above: str, below: str, heading: str) -> str:
    """Text for those who do not see a picture: the caption that `figures` put into it, else the one in italics below it, else
    where it stands and what was said last before it."""
    caption = re.match(r"\*([^*].*?)\*(?!\*)", below, re.DOTALL)
    said = f"Picture of the section “{heading}”. {_plain(above.strip().split(chr(10) * 2)[-1])}"
    return Image.open(io.BytesIO(png)).info.get("Description") or (_plain(caption[1]) if caption else said)


def _label(audio: Tag) -> str:
    """Of a player in a table: the heading above it and its column's; else nothing."""
    cell, title = audio.find_parent("td"), audio.find_previous(re.compile("^h[1-6]$"))
    heads = audio.find_parent("table").find_all("th")[len(cell.find_previous_siblings("td")) :][:1] if cell else []
    return ", ".join(part.text for part in [title, *heads] if part)


def _take_out(book: nbformat.NotebookNode, name: str, folder: Path) -> list[str]:
    """Move pictures and sounds of an executed notebook into folder/media and give them their texts; drop what only a running
    kernel can use, and warnings. Returns the players, each as a line of HTML with its label."""
    (folder / "media").mkdir(exist_ok=True)
    players, above, heading = [], "", name
    book.cells = [cell for cell in book.cells if "injected-parameters" not in cell.metadata.get("tags", [])]

    for number, cell in enumerate(book.cells):
        if cell.cell_type == "markdown":
            above = cell.source
            heading = _plain((re.findall(r"^#+ (.*)", above, re.MULTILINE) or [heading])[-1])
            continue
        if cell.cell_type != "code":
            continue
        cell.outputs = [
            output
            for output in cell.outputs
            if output.get("name") != "stderr"
            and "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
        ]
        label = heading
        for place, output in enumerate(cell.outputs):
            data, after = output.get("data", {}), [*cell.outputs[place + 1 :], *book.cells[number + 1 :]][:1]
            if "text/markdown" in data:
                above = data["text/markdown"]
                label = _plain(above)
            if "image/png" in data:
                png, file = base64.b64decode(data["image/png"]), f"media/{name}_{number}_{place}.png"
                (folder / file).write_bytes(png)
                below = "".join(one.get("data", {}).get("text/markdown", "") or one.get("source", "") for one in after)
                width, height = Image.open(io.BytesIO(png)).size
                about = {"alt": _alternative(png, above, below, heading), "width": width, "height": height}
                output.metadata = nbformat.from_dict({"filenames": {"image/png": file}, "image/png": about})
            if "data:audio" in data.get("text/html", ""):
                soup = BeautifulSoup(data["text/html"], "html.parser")
                for audio in soup.find_all("audio"):
                    kind, sound = re.search(r'src="data:audio/(\w+);base64,([^"]+)"', str(audio)).groups()
                    file = f"media/{name}_{len(players) + 1}.{kind}"
                    (folder / file).write_bytes(base64.b64decode(sound))
                    audio.clear()
                    audio.attrs = {
                        "controls": "",
                        "preload": "metadata",
                        "src": file,
                        "aria-label": _label(audio) or label,
                    }
                    players.append(f"<p>{escape(audio['aria-label'])}<br>{audio}</p>")
                data["text/html"] = str(soup)
    return players


def _note(book: nbformat.NotebookNode, name: str, profile: str) -> str:
    """When the copy was executed, and whether the notebook has changed since."""
    on = f" {book.metadata.papermill.start_time[:10]}" if "papermill" in book.metadata else ""
    asked, done = (
        [cell.source for cell in copy.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
        for copy in (nbformat.read(notebook_path(name), as_version=4), book)
    )
    changed = "" if asked == done else f". The notebook has changed since: `{_command(name, profile)}` executes it anew"
    return f"*Executed{on}, profile {profile}{changed}.*"


def _command(name: str, profile: str) -> str:
    return f"python -m replication notebook {name} --profile {profile}"


# ---- pages --------------------------------------------------------------------------------------------------------------


def _order(path: Path) -> list:
    """Figure 2 before Figure 10, the paper's tables and figures before the others."""
    parts = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.stem)]
    return [not path.stem.startswith(("table_", "figure_")), *parts]


def _heading(path: Path) -> str:
    words = path.stem.replace("theta_is", "theta-IS").replace("_", " ")
    return f"## {words[0].upper()}{words[1:]}\n\n"


def _table(path: Path) -> str:
    """A table's Markdown file with a heading of its own and its numbers beside it."""
    text = re.sub(r"^\*\*.*?\*\* ?", "", path.read_text(encoding="utf-8"))
    return f"{_heading(path)}{text}\nNumbers: [{path.stem}.csv](tables/{path.stem}.csv)\n"


def _figure(path: Path) -> str:
    caption = Image.open(path).info.get("Description", path.stem)
    files = ", ".join(f"[{kind}](figures/{path.stem}.{kind})" for kind in ("pdf", "csv"))
    text = caption.replace("[", "(").replace("]", ")")
    return f"{_heading(path)}![{text}](figures/{path.name})\n\n{caption} Files: {files}\n"


def _contents(profile: str, titles: dict[str, str], missing: list[str], folder: Path) -> str:
    intro = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## ")[0]
    lines = [intro, "", profile_note(profile), "", "## Notebooks", ""]
    not_run = dict.fromkeys(missing, " (not run)")
    lines += [f"- [{name[:2]} · {title}]({name}.html){not_run.get(name, '')}" for name, title in titles.items()]
    lines += ["", "## Results", ""] + [f"- [{title}]({page}.html)" for page, title in PAGES.items()]
    card = folder / "tables" / "report_card.csv"
    if card.is_file():
        verdicts = pd.read_csv(card)["verdict"].value_counts()
        counts = ", ".join(f"{n} “{verdict}”" for verdict, n in verdicts.items())
        lines += ["", f"{verdicts.sum()} claims on granular sounds: {counts}."]
    if (folder / "figures" / "figure_1.png").is_file():
        lines += ["", _figure(folder / "figures" / "figure_1.png")]
    return "\n".join(lines)


def _page(
    exporter: _Exporter, book: nbformat.NotebookNode, name: str, title: str, pages: list[str], folder: Path
) -> None:
    """Write one page: the notebook in the project's template, what scrolls by itself marked, names of notebooks as links."""
    html, _ = exporter.from_notebook_node(book, {"title": title, "pages": PAGES})
    soup = BeautifulSoup(html, "html.parser")
    for image in soup.find_all("img"):
        image.wrap(soup.new_tag("a", href=image["src"]))
    for table in soup.find_all("table"):
        wide = table.wrap(soup.new_tag("div", attrs={"class": "wide", "tabindex": "0"}))
        if caption := table.caption:  # which would be cut off where the table scrolls
            caption.name = "p"
            wide.insert_before(caption.extract())
    named = {short: page for page in pages for short in (page, page.partition("_")[0])}  # `05_granular` or `05`
    for code in soup.select("main :not(pre) > code"):
        if named.get(code.text, name) != name and not code.find_parent("a"):
            code.wrap(soup.new_tag("a", href=f"{named[code.text]}.html"))
    headings = soup.select("main h2[id]")
    if len(headings) > 2 and name != "index":
        listed = soup.new_tag("nav", attrs={"class": "here", "aria-label": "On this page"})
        for heading in headings:
            link = soup.new_tag("a", href=f"#{heading['id']}")
            link.string = heading.text.removesuffix("¶")
            listed.append(link)
        (soup.h1 or headings[0]).insert_after(listed)
    (folder / f"{name}.html").write_text(str(soup), encoding="utf-8")


def faults(folder: Path) -> list[str]:
    """What is wrong with the pages in `folder`: links to nothing, resources from outside, pictures without a text, too heavy."""
    pages = {
        path.name: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        for path in sorted(folder.glob("*.html"))
    }
    ids = {name: {element["id"] for element in soup.select("[id]")} for name, soup in pages.items()}
    found = []
    for name, soup in pages.items():
        for element in soup.select("[src], [href]"):
            link = element.get("src") or element["href"]
            file, _, part = link.partition("#")
            there = (folder / unquote(file or name)).is_file()
            if re.match(r"\w+:|//", link):
                if element.name != "a":
                    found.append(f"{name}: loads {link[:80]} from outside")
            elif not there or part and not {part, unquote(part)} & ids.get(file or name, set()):
                found.append(f"{name}: link to {link}, which is not there")
        found += [f"{name}: <script>" for _ in soup.select("script")]
        found += [
            f"{name}: picture {image['src'][:80]} without a text"
            for image in soup.select("img")
            if not image.get("alt")
        ]
        weight = (folder / name).stat().st_size
        weight += sum(
            (folder / image["src"]).stat().st_size for image in soup.select("img") if (folder / image["src"]).is_file()
        )
        if weight > LIMIT_BYTES:
            found.append(f"{name}: {weight / 1e6:.1f} MB with its pictures, more than {LIMIT_BYTES / 1e6:g}")
    return found


def build(profile: str = "quick", output: Path = ROOT) -> Path:
    """Build output/build/site from output/executed/<profile>, results/<profile>/tables and figures/<profile>; return it.

    Raises ValueError for an unknown profile or a formula that does not convert, FileNotFoundError where no notebook was executed
    and BrokenSite for faults; then the site of before stays.
    """
    check_name("profile", profile, PROFILES)
    executed, site = output / "executed" / profile, output / "build" / "site"
    missing = [name for name in notebook_names() if not (executed / f"{name}.ipynb").is_file()]
    if len(missing) == len(notebook_names()):
        todo = f"`make reproduce PROFILE={profile}` executes them, the site does not"
        raise FileNotFoundError(f"no executed notebook in {executed}: {todo}")
    site.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".site-", dir=site.parent) as temporary:
        folder = Path(temporary) / "site"
        folder.mkdir()
        _write(folder, profile, output, missing)
        if found := faults(folder):
            raise BrokenSite(f"the site would have {len(found)} faults:\n" + "\n".join(found))
        shutil.rmtree(site, ignore_errors=True)
        folder.rename(site)
    return site


def _write(folder: Path, profile: str, output: Path, missing: list[str]) -> None:
    """Write all pages and their files into `folder`; missing: notebooks without an executed copy."""
    for kind, source in {
        "tables": output / "results" / profile / "tables",
        "figures": output / "figures" / profile,
    }.items():
        shutil.copytree(source, folder / kind) if source.is_dir() else (folder / kind).mkdir()
    light, dark = (HtmlFormatter(style=style).get_style_defs(".highlight") for style in ("default", "github-dark"))
    style = f"{(HERE / 'style.css').read_text(encoding='utf-8')}\n{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"
    (folder / "style.css").write_text(style, encoding="utf-8")

    books, players = {}, ["# Listening", "Every sound of the notebooks."]
    for name in notebook_names():
        path = notebook_path(name) if name in missing else output / "executed" / profile / f"{name}.ipynb"
        book = nbformat.read(path, as_version=4)
        title = re.search(r"^# (.*)", book.cells[0].source)[1]
        if name in missing:
            book.cells = [
                new_markdown_cell(f"# {title}\n\n**Not run**: there is no executed copy. `{_command(name, profile)}`")
            ]
        else:
            note = _note(book, name, profile)
            sounds = _take_out(book, name, folder)
            players += [f"## [{title}]({name}.html)", *sounds] if sounds else []
            book.cells.insert(1, new_markdown_cell(note))
        books[name] = title, book
    tables = sorted((folder / "tables").glob("*.md"), key=_order)
    cards = [folder / "tables" / f"{name}.md" for name in CARDS if folder / "tables" / f"{name}.md" in tables]
    not_yet = f"Nothing yet: `make reproduce PROFILE={profile}` writes it."
    texts = {
        "report_card": ["# Report card", *map(_table, cards)],
        "figures": ["# Figures", *map(_figure, sorted((folder / "figures").glob("*.png"), key=_order))],
        "tables": ["# Tables", *(_table(path) for path in tables if path not in cards)],
        "listening": players,
    }
    for page, parts in texts.items():
        books[page] = (
            PAGES[page],
            new_notebook(cells=[new_markdown_cell("\n\n".join([*parts, "" if parts[1:] else not_yet]))]),
        )
    titles = {name: title for name, (title, _) in books.items() if name not in PAGES}
    books["index"] = "Contents", new_notebook(cells=[new_markdown_cell(_contents(profile, titles, missing, folder))])
    exporter = _Exporter(
        template_name="basic",
        raw_template=(HERE / "page.html.j2").read_text(encoding="utf-8"),
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    for name, (title, book) in books.items():
        try:
            _page(exporter, book, name, title, list(books), folder)
        except ValueError as error:
            raise ValueError(f"page {name}: {error}") from error


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", default="quick", help=f"{', '.join(PROFILES)} (default quick)")
    parser.add_argument(
        "--output", type=lambda text: Path(text).absolute(), default=ROOT, help="folder that holds executed/"
    )
    args = parser.parse_args(arguments)
    try:
        print(f"built: {build(args.profile, args.output) / 'index.html'}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
