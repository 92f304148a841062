"""Sampling noise that is a function of (seed, position) and of nothing else.

A generator that is stepped would give a row other noise whenever ids are rolled back, a row is resumed or
its batch-mates change. Here the noise of the id at a position is looked up, not drawn: it is output number
``position`` of the SplitMix64 generator (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
Generators", OOPSLA 2014), whose n-th output is ``mix(state + (n + 1) * gamma)`` and so needs no stepping.
Its state is ``mix(seed)``, which keeps neighbouring seeds from sharing outputs at shifted positions.
"""

from __future__ import annotations

_WORD = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


def uniform(seed: int, position: int) -> float:
    """The noise of the id at ``position`` (counted from 0 in the row) under the 64-bit key ``seed``.

    One of the 2**53 evenly spaced values between 0 and 1, both ends left out.
    """
    bits = _mix(_mix(seed & _WORD) + (position + 1) * _GAMMA)
    return ((bits >> 11) + 0.5) * 2.0**-53


def _mix(word: int) -> int:
    """SplitMix64's finaliser (variant 13 of Stafford's mixers): a bijection of 64-bit words."""
    word &= _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)
