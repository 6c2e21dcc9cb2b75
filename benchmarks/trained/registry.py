"""All networks of the table; each family is a module with its ``NETWORKS``."""

from __future__ import annotations

from benchmarks.trained import bats, faces, language, pictures, pitch, quality, reading, speech
from benchmarks.trained.network import Network

NETWORKS: dict[str, Network] = {
    network.name: network for family in (pitch, faces, pictures, language, speech, quality, bats, reading) for network in family.NETWORKS
}
