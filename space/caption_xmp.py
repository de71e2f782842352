"""Write captions into XMP sidecars, as descriptions and alt texts for photo managers."""

from collections.abc import Iterator
from pathlib import Path
from xml.dom import minidom

import storyteller_utils as st

MACHINE = "Neural Storyteller (machine)"  # who wrote a description, in photoshop:CaptionWriter
XMP = {
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "dc": "http://purl.org/dc/elements/1.1/",
    "Iptc4xmpCore": "http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/",
    "photoshop": "http://ns.adobe.com/photoshop/1.0/",
    "storyteller": "urn:neural-storyteller",
}
DESCRIPTIONS = (("dc", "description"), ("Iptc4xmpCore", "AltTextAccessibility"))
WRITER, CAPTION = ("photoshop", "CaptionWriter"), ("storyteller", "caption")
EMPTY_SIDECAR = (
    f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{XMP["rdf"]}"></rdf:RDF></x:xmpmeta>'
)


def sidecar(photo: Path) -> Path:
    """Return the path of a photo's sidecar."""
    return photo.with_name(photo.name + ".xmp")


def is_captioned(photo: Path) -> bool:
    """Return whether a photo's sidecar holds a caption of ours."""
    path = sidecar(photo)
    return path.is_file() and MACHINE in path.read_text(encoding="utf-8", errors="replace")


def write_sidecar(photo: Path, text: str, replace: bool = False) -> bool:
    """Write a caption into photo.jpg.xmp: description and alt text, marked as made by a machine.

    Anything else in a sidecar stays, and so does a person's description, unless `replace`.
    Returns whether it was written; raises ValueError for a sidecar that is not XMP.
    """
    path = sidecar(photo)
    try:
        document = minidom.parse(str(path)) if path.exists() else minidom.parseString(EMPTY_SIDECAR)
        rdf = document.getElementsByTagNameNS(XMP["rdf"], "RDF")[0]
    except Exception as error:
        raise ValueError(f"{path.name} is no XMP sidecar: {error}") from None
    nodes = [n for n in rdf.childNodes if n.nodeType == n.ELEMENT_NODE]
    written = {_property(node, *name) for node in nodes for name in DESCRIPTIONS}
    # What we wrote stands there twice: a description that a person has changed since differs.
    ours = {_property(node, *CAPTION) for node in nodes}
    if written - ours - {""} and not replace:
        return False
    for node in nodes:
        for name in (*DESCRIPTIONS, WRITER, CAPTION):
            _remove(node, *name)
    node = rdf.appendChild(document.createElement("rdf:Description"))
    for prefix, uri in XMP.items():
        node.setAttribute(f"xmlns:{prefix}", uri)
    node.setAttribute("rdf:about", nodes[0].getAttributeNS(XMP["rdf"], "about") if nodes else "")
    node.setAttribute(":".join(WRITER), MACHINE)
    node.setAttribute(":".join(CAPTION), text)
    for name in DESCRIPTIONS:
        languages = node.appendChild(document.createElement(":".join(name)))
        item = languages.appendChild(document.createElement("rdf:Alt"))
        item = item.appendChild(document.createElement("rdf:li"))
        item.setAttribute("xml:lang", "x-default")
        item.appendChild(document.createTextNode(text))
    st.write_text(path, document.toxml() + "\n")
    return True


def _property(node, prefix: str, name: str) -> str:
    """Return the text of a property, which XMP may write as an element or as an attribute."""
    elements = node.getElementsByTagNameNS(XMP[prefix], name)
    texts = [e for element in elements for e in _texts(element)]
    return node.getAttributeNS(XMP[prefix], name) or "".join(texts).strip()


def _texts(node) -> Iterator[str]:
    for child in node.childNodes:
        yield child.data if child.nodeType == child.TEXT_NODE else "".join(_texts(child))


def _remove(node, prefix: str, name: str) -> None:
    if node.hasAttributeNS(XMP[prefix], name):
        node.removeAttributeNS(XMP[prefix], name)
    for element in node.getElementsByTagNameNS(XMP[prefix], name):
        element.parentNode.removeChild(element)
