"""What a hosted model may be asked: requests and tokens a minute, and money in all."""

from dataclasses import dataclass

from distill_app.core.errors import EngineGone


@dataclass(frozen=True)
class Quota:
    """Limits of a hosted model; None is no limit.

    Args:
        max_cost: of one run, in the currency of the prices.
        price_in, price_out: of a million tokens that are read, and that are written.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_cost: float | None = None
    price_in: float = 0.0
    price_out: float = 0.0

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6


class Meter:
    """Keeps requests within a quota: each is announced at its most, and settled at what it was.

    Requests are spread evenly over the minute, since a burst is what servers turn down.
    """

    def __init__(self, quota: Quota) -> None:
        self.quota = quota
        self.spent = self.announced = 0.0  # money
        self._next_request = self._next_token = 0.0  # when the quota allows the next one, in seconds

    def announce(self, now: float, tokens_in: int, tokens_out: int) -> float:
        """Take a request into account; return the seconds to wait before it is sent.

        Raises:
            EngineGone: it might cost more than is left; it is not taken into account.
        """
        cost, limit = self.quota.cost(tokens_in, tokens_out), self.quota.max_cost
        if limit is not None and self.spent + self.announced + cost > limit:
            raise EngineGone(
                f"label.max_cost: found {self.spent:.2f} spent by this run and up to"
                f" {self.announced + cost:.2f} more for what is under way, expected no more than {limit:.2f};"
                " raise it and run again, what was answered stays"
            )
        self.announced += cost
        start = max(now, self._next_request, self._next_token)
        if self.quota.requests_per_minute:
            self._next_request = start + 60 / self.quota.requests_per_minute
        if self.quota.tokens_per_minute:
            self._next_token = start + 60 * (tokens_in + tokens_out) / self.quota.tokens_per_minute
        return start - now

    def settle(self, announced: tuple[int, int], used: tuple[int, int]) -> None:
        """Put what a request used, tokens read and written, in the place of what was announced."""
        self.announced = max(0.0, self.announced - self.quota.cost(*announced))
        self.spent += self.quota.cost(*used)
        if self.quota.tokens_per_minute:
            self._next_token -= 60 * (sum(announced) - sum(used)) / self.quota.tokens_per_minute
