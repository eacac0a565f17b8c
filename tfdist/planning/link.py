"""What crosses a link between machines, and how long it takes: for a plan of machines that are not there yet."""

from __future__ import annotations

import dataclasses
import re

from tfdist.errors import ConfigError

_BITS = {"k": 1e3, "m": 1e6, "g": 1e9}
_SECS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
# TCP's and IP's headers, in packets of 1,500 bytes.
_PAYLOAD = 1448 / 1514


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """A link by which each machine reaches all others.

    Attributes:
        bytes_per_sec: That it carries in each direction.
        round_trip_secs: As `ping` shows it.
    """

    bytes_per_sec: float
    round_trip_secs: float = 0.0

    def all_reduce_secs(self, num_bytes: float, num_workers: int) -> float:
        """Returns how long a ring takes to add up so many bytes of each worker.

        Each of its 2 (n − 1) rounds asks a neighbour for 1/n of the bytes (Patarasuk and Yuan 2009).
        """
        rounds = 2 * (num_workers - 1)
        return rounds * (self.round_trip_secs + self.send_secs(num_bytes / num_workers))

    def send_secs(self, num_bytes: float) -> float:
        """Returns how long so many bytes take in one direction."""
        return num_bytes / (self.bytes_per_sec * _PAYLOAD)


def parse_link(text: str) -> Link:
    """Reads `100mbit,5ms`: what a link carries, and how long a packet takes there and back.

    Args:
        text: A number of kbit, mbit or gbit (each second), and one of us, ms or s, which may be missing.

    Raises:
        ConfigError: If it is something else.
    """
    found = re.fullmatch(
        r"(\d+\.?\d*)(k|m|g)bit(?:/s)?(?:,(\d+\.?\d*)(us|ms|s))?", text.replace(" ", "").lower()
    )
    if found is None or float(found[1]) <= 0:
        raise ConfigError(
            f"link={text!r}: write what it carries each second and its round trip, such as 100mbit,5ms or 10gbit,50us."
        )
    return Link(
        bytes_per_sec=float(found[1]) * _BITS[found[2]] / 8,
        round_trip_secs=float(found[3] or 0) * _SECS[found[4] or "s"],
    )
