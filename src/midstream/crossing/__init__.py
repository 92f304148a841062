"""Python values and signatures as JSON, between the host and the code in a sandbox, and in records.

Both sides use these modules, so they need nothing but the standard library; numpy and Pillow are used where
they are there.
"""

from midstream.crossing.faults import describe_exception, exception_of
from midstream.crossing.plain import images_in, plain_json
from midstream.crossing.signatures import Offer, checker, signature_text
from midstream.crossing.texts import CrossingError
from midstream.crossing.values import from_json, to_json

__all__ = [
    "CrossingError",
    "Offer",
    "checker",
    "describe_exception",
    "exception_of",
    "from_json",
    "images_in",
    "plain_json",
    "signature_text",
    "to_json",
]
