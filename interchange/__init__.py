"""Collages in files of other tools: OpenRaster (`ora`), PSD (`psd`) and a collage folder as a zip (`folder`).

`work` opens and saves them by their kind, in a process that can be ended: every byte may be a stranger's.
"""
