"""Builds build/site/: static pages from executed notebooks, tables and figures. Executes nothing, needs no network.

    python site/build_site.py --profile quick

A page for every notebook (its executed copy, else a line that says how to execute it) and for every file of docs/, the
report card, all figures, all tables and all sounds, and a contents page. Formulas become MathML, which browsers set
themselves; there is no script. Pictures and sounds are files beside the pages. What is built is checked before it
replaces the last site.
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
from bs4 import BeautifulSoup
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
PARTS = dict.fromkeys("mfrac mroot msub msup munder mover".split(), 2) | {"msubsup": 3, "munderover": 3}  # of MathML
CARDS = ("report_card", "chirplet_card", "drum_card", "cost_card", "theta_is_card", "claims")
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = {"report_card": "Report card", "figures": "Figures", "tables": "Tables", "listening": "Listening"}


class BrokenSite(ValueError):
    """What would have been built has faults; the message lists them."""


# ---- formulas -------------------------------------------------------------------------------------------------------


def mathml(tex: str, display: str = "inline") -> str:
    """A formula as a <math> element (display: "inline" or "block"). Raises ValueError where it does not convert."""
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


# ---- notebooks ------------------------------------------------------------------------------------------------------


def _plain(markdown: str) -> str:
    return " ".join(re.sub(r"[*`$#]", "", markdown).split())


def _cells(book: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """A notebook's own cells, without those that papermill injected."""
    return [cell for cell in book.cells if "injected-parameters" not in cell.metadata.get("tags", [])]


class _Media:
    """Moves the pictures and sounds of one executed notebook into folder/media and gives them their texts.

    players: its sounds, each as a line of HTML with its label.
    """

    def __init__(self, name: str, folder: Path):
        self.name, self.folder, self.players, self.heading, self.above = name, folder, [], name, ""
        (folder / "media").mkdir(exist_ok=True)

    def take_out(self, book: nbformat.NotebookNode) -> None:
        """Go through the notebook; drop what only a running kernel can use, and warnings."""
        book.cells = _cells(book)
        for number, cell in enumerate(book.cells):
            if cell.cell_type == "markdown":
                self.above = cell.source
                self.heading = _plain((re.findall(r"^#+ (.*)", cell.source, re.MULTILINE) or [self.heading])[-1])
            outputs = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]
            outputs = [out for out in outputs if "application/vnd.jupyter.widget-view+json" not in out.get("data", {})]
            label = self.heading
            for place, output in enumerate(outputs):
                data = output.get("data", {})
                if "text/markdown" in data:
                    self.above = data["text/markdown"]
                    label = _plain(self.above)
                if "image/png" in data:
                    after = [*outputs[place + 1 :], *book.cells[number + 1 :], {}][0]
                    below = after.get("data", {}).get("text/markdown") or after.get("source") or ""
                    self._picture(output, f"{self.name}_{number}_{place}.png", below)
                if "data:audio" in data.get("text/html", ""):
                    data["text/html"] = self._sounds(data["text/html"], label)
            if cell.cell_type == "code":
                cell.outputs = outputs

    def _picture(self, output: nbformat.NotebookNode, file: str, below: str) -> None:
        """Its text for those who do not see it: the caption that `figures` put into it, else the one in italics below
        it, else where it stands and what was said last before it."""
        png = base64.b64decode(output.data["image/png"])
        (self.folder / "media" / file).write_bytes(png)
        image, caption = Image.open(io.BytesIO(png)), re.match(r"\*([^*].*?)\*(?!\*)", below, re.DOTALL)
        said = f"Picture of the section “{self.heading}”. {_plain(self.above.strip().split(chr(10) * 2)[-1])}"
        text = image.info.get("Description") or (_plain(caption[1]) if caption else said)
        about = {"alt": text, "width": image.width, "height": image.height}
        output.metadata = nbformat.from_dict({"filenames": {"image/png": f"media/{file}"}, "image/png": about})

    def _sounds(self, html: str, label: str) -> str:
        """The output with players of files; one in a table is labelled by the heading above it and its column's."""
        soup = BeautifulSoup(html, "html.parser")
        for audio in soup.find_all("audio"):
            kind, sound = re.search(r'src="data:audio/(\w+);base64,([^"]+)"', str(audio)).groups()
            file = f"media/{self.name}_{len(self.players) + 1}.{kind}"
            (self.folder / file).write_bytes(base64.b64decode(sound))
            cell, said = audio.find_parent("td"), [audio.find_previous(re.compile("^h[1-6]$"))]
            if cell:
                said += audio.find_parent("table").find_all("th")[len(cell.find_previous_siblings("td")) :][:1]
            label = ", ".join(part.text for part in said if part) or label
            audio.clear()
            audio.attrs = {"controls": "", "preload": "metadata", "src": file, "aria-label": label}
            self.players.append(f"<p>{escape(label)}<br>{audio}</p>")
        return str(soup)


def _note(book: nbformat.NotebookNode, name: str, profile: str) -> str:
    """When the copy was executed, and whether the notebook has changed since."""
    on = f" {book.metadata.papermill.start_time[:10]}" if "papermill" in book.metadata else ""
    asked = nbformat.read(notebook_path(name), as_version=4)
    if [cell.source for cell in _cells(asked)] != [cell.source for cell in _cells(book)]:
        return f"*Executed{on}, profile {profile}. The notebook has changed since: {_command(name, profile)}*"
    return f"*Executed{on}, profile {profile}.*"


def _command(name: str, profile: str) -> str:
    return f"`python -m replication notebook {name} --profile {profile}` executes it."


# ---- pages ----------------------------------------------------------------------------------------------------------


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
    lines += [f"- [{name[:2]} · {titles[name]}]({name}.html){not_run.get(name, '')}" for name in notebook_names()]
    lines += ["", "## Results", ""] + [f"- [{title}]({page}.html)" for page, title in PAGES.items()]
    if (card := folder / "tables/report_card.csv").is_file():
        verdicts = pd.read_csv(card)["verdict"].value_counts()
        counts = ", ".join(f"{n} “{verdict}”" for verdict, n in verdicts.items())
        lines += ["", f"{verdicts.sum()} claims on granular sounds: {counts}."]
    lines += ["", "## Reading on", ""] + [f"- [{titles[path.stem]}]({path.stem}.html)" for path in DOCS]
    if (figure := folder / "figures/figure_1.png").is_file():
        lines += ["", _figure(figure)]
    return "\n".join(lines)


def _relink(soup: BeautifulSoup, profile: str) -> None:
    """Turn the links of a page of docs/ to pages of the site; where the site has no page only the text stays."""
    for link in soup.select("main a[href]:not(.anchor-link)"):
        *folders, file = link["href"].partition("#")[0].split("/")
        page = {"README.md": "index"}.get(file, Path(file).stem)
        if folders[-3:] == ["results", profile, "tables"]:
            link["href"] = "report_card.html" if page in CARDS else "tables.html"
        elif page == "index" or not folders and file:
            link["href"] = f"{page}.html"
        elif ":" not in link["href"]:
            link.unwrap()


def _page(
    exporter: _Exporter, book: nbformat.NotebookNode, name: str, title: str, pages: list[str], profile: str
) -> str:
    """One page: the notebook in the project's template, what scrolls by itself marked, names of notebooks as links."""
    html, _ = exporter.from_notebook_node(book, {"title": title, "pages": PAGES})
    soup = BeautifulSoup(html, "html.parser")
    if name in [path.stem for path in DOCS]:
        _relink(soup, profile)
    for image in soup.find_all("img"):
        image.wrap(soup.new_tag("a", href=image["src"]))
    for table in soup.find_all("table"):
        wide = table.wrap(soup.new_tag("div", attrs={"class": "wide", "tabindex": "0"}))
        if caption := table.caption:  # which would be cut off where the table scrolls
            caption.name = "p"
            wide.insert_before(caption.extract())
    named = {short: page for page in pages for short in (page, page.partition("_")[0]) if page[0].isdigit()}  # or `05`
    for code in soup.select("main :not(pre) > code"):
        if named.get(code.text, name) != name and not code.find_parent("a"):
            code.wrap(soup.new_tag("a", href=f"{named[code.text]}.html"))
    headings = soup.select("main h2[id]")
    if len(headings) > 2 and name != "index":
        listed = soup.new_tag("nav", attrs={"class": "here", "aria-label": "On this page"})
        for heading in headings:
            listed.append(soup.new_tag("a", href=f"#{heading['id']}", string=heading.text.removesuffix("¶")))
        (soup.h1 or headings[0]).insert_after(listed)
    return str(soup)


def faults(folder: Path) -> list[str]:
    """What is wrong with the pages in `folder`: links to nothing, resources from outside, pictures without a text, too
    heavy."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.html"))}
    pages, found = {name: BeautifulSoup(text, "html.parser") for name, text in texts.items()}, []
    ids = {name: {element["id"] for element in soup.select("[id]")} for name, soup in pages.items()}
    for name, soup in pages.items():
        for element in soup.select("[src], [href]"):
            link = element.get("src") or element["href"]
            file, _, part = link.partition("#")
            if re.match(r"\w+:|//", link):
                found += [f"{name}: loads {link[:80]} from outside"] * (element.name != "a")
            elif not (folder / unquote(file or name)).is_file():
                found.append(f"{name}: link to {link}, which is not there")
            elif part and not {part, unquote(part)} & ids.get(file or name, set()):
                found.append(f"{name}: link to {link}, which is not there")
        found += [f"{name}: <script>"] * len(soup.select("script"))
        images = [(image["src"], image.get("alt")) for image in soup.select("img")]
        found += [f"{name}: picture {source[:80]} without a text" for source, text in images if not text]
        files = [folder / name, *(folder / source for source, _ in images)]
        weight = sum(file.stat().st_size for file in files if file.is_file())
        if weight > LIMIT_BYTES:
            found.append(f"{name}: {weight / 1e6:.1f} MB with its pictures, more than {LIMIT_BYTES / 1e6:g}")
    return found


def build(profile: str = "quick", output: Path = ROOT) -> Path:
    """Build output/build/site from output/executed/<profile>, results/<profile>/tables, figures/<profile>; return it.

    Raises ValueError for an unknown profile or a formula that does not convert, FileNotFoundError where no notebook was
    executed and BrokenSite for faults; then the site of before stays.
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
    for kind, source in {"tables": f"results/{profile}/tables", "figures": f"figures/{profile}"}.items():
        (folder / kind).mkdir()
        if (output / source).is_dir():
            shutil.copytree(output / source, folder / kind, dirs_exist_ok=True)
    light, dark = (HtmlFormatter(style=style).get_style_defs(".highlight") for style in ("default", "github-dark"))
    style = (HERE / "style.css").read_text(encoding="utf-8")
    style += f"\n{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"
    (folder / "style.css").write_text(style, encoding="utf-8")

    books, players = {}, ["# Listening", "Every sound of the notebooks."]
    for name in notebook_names():
        path = notebook_path(name) if name in missing else output / "executed" / profile / f"{name}.ipynb"
        book, media = nbformat.read(path, as_version=4), _Media(name, folder)
        title = re.search(r"^# (.*)", book.cells[0].source)[1]
        if name in missing:
            why = f"**Not run**: there is no executed copy. {_command(name, profile)}"
            book.cells = [new_markdown_cell(f"# {title}\n\n{why}")]
        else:
            note = _note(book, name, profile)
            media.take_out(book)
            players += [f"## [{title}]({name}.html)", *media.players] if media.players else []
            book.cells.insert(1, new_markdown_cell(note))
        books[name] = title, book
    tables = sorted((folder / "tables").glob("*.md"), key=_order)
    cards = [folder / "tables" / f"{name}.md" for name in CARDS if folder / "tables" / f"{name}.md" in tables]
    figures = sorted((folder / "figures").glob("*.png"), key=_order)
    texts = {
        "report_card": ["# Report card", *map(_table, cards)],
        "figures": ["# Figures", *map(_figure, figures)],
        "tables": ["# Tables", *(_table(path) for path in tables if path not in cards)],
        "listening": players,
    }
    not_yet = [f"Nothing yet: `make reproduce PROFILE={profile}` writes it."]
    texts = {page: "\n\n".join(parts + ([] if parts[1:] else not_yet)) for page, parts in texts.items()}
    texts |= {path.stem: path.read_text(encoding="utf-8") for path in DOCS}
    for page, text in texts.items():
        books[page] = _plain(text.partition("\n")[0]), new_notebook(cells=[new_markdown_cell(text)])
    titles = {name: title for name, (title, _) in books.items()}
    books["index"] = "Contents", new_notebook(cells=[new_markdown_cell(_contents(profile, titles, missing, folder))])
    template = (HERE / "page.html.j2").read_text(encoding="utf-8")
    exporter = _Exporter(
        template_name="basic", raw_template=template, exclude_input_prompt=True, exclude_output_prompt=True
    )
    for name, (title, book) in books.items():
        try:
            page = _page(exporter, book, name, title, list(books), profile)
        except ValueError as error:
            raise ValueError(f"page {name}: {error}") from error
        (folder / f"{name}.html").write_text(page, encoding="utf-8")


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
