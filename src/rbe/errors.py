"""The library's own errors. Every message says what was asked, what was given, what is wrong and what to do."""


class RbeError(ValueError):
    """Something the user asked for cannot be done, and the message says why and what to do instead.

    >>> raise RbeError("encode: weight is 3-D (2, 3, 4); a seed matrix is 2-D: reshape it to (rows, columns) first")
    Traceback (most recent call last):
    rbe.errors.RbeError: encode: weight is 3-D (2, 3, 4); a seed matrix is 2-D: reshape it to (rows, columns) first
    """


class CorruptFile(RbeError):
    """A stored file does not hold what its checksums, header or index say it should."""
