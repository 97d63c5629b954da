"""English as files: what the frontends ask for before they fall back on the nodes' own words and pages.

    python tests/web/english.py      (make texts) writes locales/en/nodeDefs.json and web/docs/NODE/en.md

A page of another language than those in web/docs/NODE/ gets web/docs/NODE.md, which is where English is written.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from learned_rounding.hosts import ComfyServer, available_hosts

__all__ = ["LOCALE", "PAGES", "definitions", "english_titles", "is_plain"]

ROOT = Path(__file__).resolve().parents[2]
LOCALE = ROOT / "locales" / "en" / "nodeDefs.json"
PAGES = sorted((ROOT / "web" / "docs").glob("*.md"))
# Frontends read translations as messages of vue-i18n: placeholders, links and plurals.
_SYNTAX = frozenset("{}@|")


def is_plain(text: str) -> bool:
    """Whether a translation says what it says: nothing in it is syntax."""
    return not _SYNTAX & set(text)


def english_titles() -> dict[str, str]:
    """{node id: its English title}."""
    return {name: texts["display_name"] for name, texts in json.loads(LOCALE.read_text(encoding="utf-8")).items()}


def definitions(object_info: Mapping[str, Any]) -> dict[str, dict]:
    """The words of our nodes, in the form of nodeDefs.json. What is syntax there is left out: the page then shows the node's own."""
    return {name: _node(info) for name, info in sorted(object_info.items()) if name.startswith("LearnedRounding")}


def _node(info: Mapping[str, Any]) -> dict:
    inputs = {name: entry for group in ("required", "optional") for name, entry in info["input"].get(group, {}).items()}
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": {name: _slot(name, entry[1]["tooltip"]) for name, entry in inputs.items()},
        "outputs": {
            str(slot): _slot(*texts)
            for slot, texts in enumerate(zip(info["output_name"], info["output_tooltips"], strict=True))
        },
    }


def _slot(name: str, tooltip: str) -> dict[str, str]:
    return {key: text for key, text in {"name": name, "tooltip": tooltip}.items() if is_plain(text)}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    with ComfyServer(available_hosts()[-1]) as server:
        texts = definitions(server.object_info())
    LOCALE.parent.mkdir(exist_ok=True)
    LOCALE.write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for page in PAGES:
        page.with_suffix("").mkdir(exist_ok=True)
        (page.with_suffix("") / "en.md").write_text(page.read_text(encoding="utf-8"), encoding="utf-8")


if __name__ == "__main__":
    main()
