"""The contact sheet: labelled pictures in rows on one canvas. The one module here that needs pillow."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

# Pixels. Small pictures are enlarged to about this side, so that a sheet of 128-pixel pictures can be read.
_TILE_SIDE = 256
_GAP = 12
_LABEL_HEIGHT = 24
_FONT_SIZE = 13
_PAPER, _INK = (250, 249, 246), (40, 40, 40)


def draw(rows: Sequence[Sequence[tuple[str, bytes]]]) -> bytes:
    """Draws rows of (label, encoded picture) as one PNG; each picture stands above its label.

    A single row of more than four pictures is folded, so that a sheet stays about as wide as a screen.
    """
    if len(rows) == 1 and len(rows[0]) > 4:
        rows = [rows[0][first : first + 4] for first in range(0, len(rows[0]), 4)]
    tiles = [[(label, _tile(data)) for label, data in row] for row in rows]
    width = max(tile.width for row in tiles for _, tile in row)
    height = max(tile.height for row in tiles for _, tile in row)
    columns = max(len(row) for row in tiles)
    sheet = Image.new(
        "RGB",
        (
            _GAP + columns * (width + _GAP),
            _GAP + len(tiles) * (height + _LABEL_HEIGHT + _GAP),
        ),
        _PAPER,
    )
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_SIZE)
    for i, row in enumerate(tiles):
        top = _GAP + i * (height + _LABEL_HEIGHT + _GAP)
        for j, (label, tile) in enumerate(row):
            left = _GAP + j * (width + _GAP)
            sheet.paste(tile, (left, top))
            while label and pen.textlength(label, font=font) > width:
                label = label[:-1]
            pen.text((left, top + height + 5), label, fill=_INK, font=font)
    encoded = io.BytesIO()
    sheet.save(encoded, "PNG", optimize=True)
    return encoded.getvalue()


def _tile(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as opened:
        picture = opened.convert("RGB")
    factor = -(-_TILE_SIDE // max(picture.size))
    if max(picture.size) > 2 * _TILE_SIDE:
        picture.thumbnail((2 * _TILE_SIDE, 2 * _TILE_SIDE), Image.Resampling.LANCZOS)
    size = (picture.width * factor, picture.height * factor)
    # Whole factors and hard pixel edges: the sheet shows what was drawn, not a smoothed version of it.
    return picture.resize(size, Image.Resampling.NEAREST)
