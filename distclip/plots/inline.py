"""A figure as a part of an HTML page: an SVG whose colours are the page's, so that it fits a light and a dark one."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from matplotlib.figure import Figure

from distclip.plots import style
from distclip.plots.save import svg_bytes

# The colours of pictures as variables of CSS: on white, and on nearly black.
COLOURS = {
    style.INK: ("ink", "#e6e6e6"),
    style.GREY: ("grey", "#9a9a9a"),
    style.FAINT: ("faint", "#333333"),
    style.BLUE: ("blue", "#4a9fe0"),
    style.SKY: ("sky", "#8accf0"),
    style.GREEN: ("green", "#2cc495"),
    style.ORANGE: ("orange", "#f0b63a"),
    style.VERMILION: ("vermilion", "#ff8547"),
    style.PURPLE: ("purple", "#dc96bd"),
}
_REFERENCE = re.compile(r"url\(#([^)]*)\)")
_COLOUR = re.compile("|".join(COLOURS))


def inline_svg(figure: Figure, name: str, says: str) -> str:
    """The figure as an ``<svg>`` element.

    Args:
        figure: which.
        name: letters that no other picture of the page has: identifiers begin with it.
        says: what readers hear who do not see it.
    """
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    root = ElementTree.fromstring(svg_bytes(figure, letters=False))
    referred = {found for element in root.iter() for found in _references(element)}
    for parent in list(root.iter()):
        for child in list(parent):
            # Rules of this style sheet would be the whole page's.
            if child.tag.endswith(("}style", "}metadata")):
                parent.remove(child)
    for element in root.iter():
        _adapt(element, name, referred)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": says}
    return ElementTree.tostring(root, encoding="unicode")


def _references(element: ElementTree.Element) -> list[str]:
    found = [name for value in element.attrib.values() for name in _REFERENCE.findall(value)]
    return found + [value[1:] for key, value in element.attrib.items() if key.endswith("href") and value[:1] == "#"]


def _adapt(element: ElementTree.Element, name: str, referred: set[str]) -> None:
    """Names without namespaces, which HTML knows by itself; identifiers and colours of the page."""
    element.tag = element.tag.rpartition("}")[2]
    element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    if "id" in element.attrib:
        mine = element.attrib.pop("id")
        if mine in referred:
            element.attrib["id"] = name + mine
    for key, value in element.attrib.items():
        value = _REFERENCE.sub(rf"url(#{name}\1)", value)
        if key == "href" and value.startswith("#"):
            value = f"#{name}{value[1:]}"
        if key == "style":
            value = _COLOUR.sub(lambda found: f"var(--{COLOURS[found[0]][0]})", value)
        element.attrib[key] = value
