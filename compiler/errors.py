"""The errors that EdgeFormer raises on purpose; each says what is wrong, where, and what to do next."""

from __future__ import annotations


class EdgeFormerError(Exception):
    """Base of every error that EdgeFormer raises on purpose."""


class TargetError(EdgeFormerError):
    """A target is unknown, misspelt, or cannot run on this host."""


class FormatError(EdgeFormerError):
    """A file is damaged, truncated, or not of the format that its name claims."""


class TrustError(EdgeFormerError):
    """Native code lies where somebody else could have put it."""


class UnsupportedError(EdgeFormerError):
    """A known format asks for something that EdgeFormer does not implement."""


class BuildError(EdgeFormerError):
    """A tool chain failed to build or to load a kernel."""


class DeviceError(EdgeFormerError):
    """A device is missing, is gone, or its driver computes wrong results."""


class DeclinedError(EdgeFormerError):
    """A form that was asked for by name declined the problem; the reason is in the text."""


class CapacityError(EdgeFormerError):
    """Something does not fit: memory, context length, or disk."""
