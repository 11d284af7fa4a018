"""README.md from nbs/index.ipynb: `python tests/readme.py` writes it, `render()` says what it should be."""
import re
import shutil
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbformat import NotebookNode
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
IMAGES = "README_files"
SHOWN = ["text/markdown", "image/svg+xml", "image/png", "text/plain"]  # of an output's forms, the first there is


def visible(cell: NotebookNode) -> NotebookNode | None:
    "The cell as a reader sees it, without nbdev's `#|` directives; None if it is hidden."
    if cell.cell_type != "code": return cell if cell.cell_type == "markdown" else None
    lines = cell.source.splitlines()
    directives = {line.removeprefix("#|").strip() for line in lines if line.startswith("#|")}
    if directives & {"hide", "include: false"}: return None
    cell.source = "" if "echo: false" in directives else "\n".join(x for x in lines if not x.startswith("#|")).strip()
    return cell


def render() -> dict[str, bytes]:
    "README.md and its images: path from the root to content."
    notebook = nbformat.read(ROOT / "nbs/index.ipynb", as_version=4)
    notebook.cells = [cell for cell in map(visible, notebook.cells) if cell is not None]
    notebook.metadata["language_info"] = {"name": "python"}
    exporter = MarkdownExporter(config=Config({"NbConvertBase": {"display_data_priority": SHOWN}}))
    text, resources = exporter.from_notebook_node(notebook, {"unique_key": "plot", "output_files_dir": IMAGES})
    text = text.replace("```python\n\n```\n", "").replace("![png]", "![plot]")  # no empty source of `echo: false`
    text = re.sub(r"\n(?:[ \t]*\n){2,}", "\n\n", text).strip() + "\n"
    return {"README.md": text.encode(), **resources["outputs"]}


def present() -> dict[str, bytes]:
    "The same files as they are now."
    paths = [ROOT / "README.md", *(ROOT / IMAGES).glob("*")]
    return {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in paths if path.exists()}


def main() -> None:
    "Write the README and its images."
    files = render()
    shutil.rmtree(ROOT / IMAGES, ignore_errors=True)
    for name, content in files.items():
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(content)
    print("wrote", ", ".join(files))


if __name__ == "__main__":
    main()
