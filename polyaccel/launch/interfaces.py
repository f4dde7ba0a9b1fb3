"""The network interface of one of this machine's addresses (Linux)."""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys
from pathlib import Path

_SIOCGIFADDR, _SIOCGIFNETMASK = 0x8915, 0x891B


def interface_of(address: str) -> str | None:
    """The name of the interface in whose network this own address is, such as eth0; None where that cannot be found out."""
    if sys.platform != "linux":
        return None
    own = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(own, ipaddress.IPv6Address):
        return _interface_of_ipv6(own)
    for _, name in socket.if_nameindex():
        network = _network(name)
        if network is not None and own in network:
            return name
    return None


def _network(name: str) -> ipaddress.IPv4Network | None:
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        request = struct.pack("256s", name.encode()[:15])
        try:
            address, mask = (
                socket.inet_ntoa(fcntl.ioctl(asking.fileno(), number, request)[20:24])
                for number in (_SIOCGIFADDR, _SIOCGIFNETMASK)
            )
        except OSError:
            return None  # it has no address
    return ipaddress.IPv4Network(f"{address}/{mask}", strict=False)


def _interface_of_ipv6(own: ipaddress.IPv6Address) -> str | None:
    try:
        lines = Path("/proc/net/if_inet6").read_text("ascii").splitlines()
    except OSError:
        return None
    return next((line.split()[5] for line in lines if int(line.split()[0], 16) == int(own)), None)
