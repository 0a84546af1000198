"""The network interface of a group of workers on several nodes."""

from __future__ import annotations

from orchestration.workers.node_group import interface_of


def test_the_interface_of_an_address_is_found_and_one_that_nobody_has_is_not() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") is None  # an address for documentation (RFC 5737)
    assert interface_of("::1") is None
