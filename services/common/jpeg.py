"""How many passes a JPEG makes over its pixels: `scans`.

A progressive file may have any number of them, and a few bytes each are enough to have a decoder go over every pixel
again. This module decodes none.
"""

import re

SIGNATURE = b"\xff\xd8"
# Between scans, and within a scan's header, markers are few; whoever walks them is not kept from ending.
MAX_MARKERS = 65_536
_SCAN, _END = 0xDA, 0xD9
# Within a scan 0xFF is followed by a stuffed zero, by a restart, or by itself; anything else is the next marker.
_MARKER = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")
_ALONE = {0x01, *range(0xD0, 0xD9)}


def scans(data: bytes) -> int:
    """The scans of the first picture in a file that begins with `SIGNATURE`; `MAX_MARKERS` for as many markers."""
    found, at = 0, len(SIGNATURE)
    for _ in range(MAX_MARKERS):
        # What lies between a segment and the next marker is a scan's data, or rubbish that decoders pass over.
        marker = _MARKER.search(data, at)
        if marker is None or marker[1][0] == _END:
            return found
        at = marker.end()
        if marker[1][0] in _ALONE:
            continue
        found += marker[1][0] == _SCAN
        at += max(2, int.from_bytes(data[at : at + 2], "big"))
    return MAX_MARKERS
