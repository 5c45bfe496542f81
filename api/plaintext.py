"""Logs are hostile: a model's or a library's output may hold terminal codes or bidi controls."""

from __future__ import annotations

import re

# ECMA-48: CSI … final byte; OSC, DCS, SOS, PM, APC … ST or BEL; other two-byte escapes
ANSI = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?"
    r"|\x1b[ -/]*[0-~]"
)
CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# Unicode's Bidi_Control characters: they reorder what a reader sees ("Trojan Source")
BIDI = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """`text` without terminal codes and controls; bidi controls are shown as `\\u202e`."""
    text = ANSI.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
    text = CONTROLS.sub("", text)
    return BIDI.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
