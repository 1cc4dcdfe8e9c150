"""Find a password inside the address of a server, and take it out.

The command line refuses an address that holds one (`cli.config.passwords`), and no message shows
one.
"""

from __future__ import annotations

import re

# A password ends at the last @, because people leave the @ and the / in it as they are. What has
# digits up to a slash is the port of an address whose path holds an @.
_USER = re.compile(r"(?P<before>://[^\s:/@\"']*:)(?!\d+/)(?P<secret>[^\s\"']+)(?=@)")
_OPTION = re.compile(r"(?P<before>[?&](?:ssl)?password=)(?P<secret>[^\s&\"']+)", re.IGNORECASE)


def has_password(address: str) -> bool:
    """Whether the text holds an address like ``scheme://user:password@host``."""
    return any(kind.search(address) for kind in (_USER, _OPTION))


def without_password(address: str) -> str:
    """The text with ``***`` in place of every password in an address."""
    for kind in (_USER, _OPTION):
        address = kind.sub(r"\g<before>***", address)
    return address
