"""
Free spans of a range of bytes: a sorted list of `(offset, bytes)`, no two adjacent. The tightest one is used first, and spans
join with their neighbours when they come back.
"""

from bisect import bisect_left, insort

Span = tuple[int, int]


def tightest(spans: list[Span], size: int) -> Span | None:
    """The smallest free span of at least `size` bytes, the first of several; None if there is none."""
    return min((span for span in spans if span[1] >= size), key=lambda span: (span[1], span[0]), default=None)


def cut(spans: list[Span], span: Span, size: int) -> Span:
    """Takes the first `size` bytes of a free span out of the list."""
    offset, available = span
    spans.remove(span)
    if available > size:
        insort(spans, (offset + size, available - size))
    return offset, size


def join(spans: list[Span], span: Span) -> None:
    """Puts a span that was cut, or that is new, into the list."""
    start, stop = span[0], sum(span)
    at = bisect_left(spans, (start, 0))
    if at < len(spans) and spans[at][0] == stop:
        stop += spans.pop(at)[1]
    if at > 0 and sum(spans[at - 1]) == start:
        start = spans.pop(at - 1)[0]
    insort(spans, (start, stop - start))
