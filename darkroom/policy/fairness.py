"""How much compute each tenant has had lately. Pure: no clock."""

_HALF_LIFE_S = 30.0
"""Half of what a tenant had is forgotten after this long: fairness looks back about a minute."""
_NEGLIGIBLE_S = 1e-6


class ServedTime:
    """Compute seconds by tenant, decaying exponentially."""

    def __init__(self) -> None:
        self._served_s: dict[str, float] = {}
        self._at_s = 0.0

    def add(self, tenant: str, seconds: float, now_s: float) -> None:
        """Adds what the tenant just had."""
        self._decay(now_s)
        self._served_s[tenant] = self._served_s.get(tenant, 0.0) + seconds

    def read(self, now_s: float) -> dict[str, float]:
        """Seconds by tenant as of now; a tenant without an entry had next to nothing."""
        self._decay(now_s)
        return self._served_s

    def _decay(self, now_s: float) -> None:
        if now_s - self._at_s < _HALF_LIFE_S / 100:
            return  # within a hundredth of a half-life nothing changes order
        factor = 0.5 ** ((now_s - self._at_s) / _HALF_LIFE_S)
        self._at_s = now_s
        decayed = {tenant: seconds * factor for tenant, seconds in self._served_s.items()}
        self._served_s = {tenant: seconds for tenant, seconds in decayed.items() if seconds > _NEGLIGIBLE_S}
