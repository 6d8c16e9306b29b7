"""Checks of HTML reports."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ET


def check_single_file(page: str) -> list[ET.Element]:
    """Check that a page loads no other file and runs no script. Return its SVG pictures."""
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(source.startswith("data:") for source in sources)
    assert "url(" not in page
    assert "<script" not in page
    prefix = "data:image/svg+xml;base64,"
    pictures = [ET.fromstring(base64.b64decode(s.removeprefix(prefix))) for s in sources if s.startswith(prefix)]
    assert all(picture.tag == "{http://www.w3.org/2000/svg}svg" for picture in pictures)
    assert len(pictures) == page.count("<img") == page.count("<figcaption>")
    return pictures
