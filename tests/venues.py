"""Two exchanges that keep the promises of `ExchangePort`: paper, and Bybit's protocol over ccxt to a simulator; one market."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from xsmom_nb.clock import SimulatedClock
from xsmom_nb.config import Config, with_values
from xsmom_nb.exchange.bybit import BybitExchange, set_up
from xsmom_nb.exchange.journal import Journal
from xsmom_nb.exchange.limits import AddressGuard
from xsmom_nb.exchange.line import Line, RequestPace, require_addresses, strict_client
from xsmom_nb.exchange.pace import Pace
from xsmom_nb.exchange.paper import PaperExchange
from xsmom_nb.exchange.protocol import ApiKey
from xsmom_nb.exchange.public import Market
from xsmom_nb.exchange.recorded import RecordedMarket
from xsmom_nb.exchange.server import serving
from xsmom_nb.exchange.simulator import Simulator, Terms
from xsmom_nb.exchange.tape import Tape
from xsmom_nb.exchange.trading import TradingEngine
from xsmom_nb.market.panel import Panel
from xsmom_nb.ports import ExchangePort

HOUR = 3_600_000
USER = 7


@dataclass
class Venue:
    "An exchange in a test."

    name: str
    port: ExchangePort
    start_ms: int
    now_ms: Callable[[], int]
    advance: Callable[[int], None]  # takes ms
    simulator: Simulator | None = None  # behind the line, where there is one
    url: str = ""


def paper_config() -> Config:
    "Ten thousand, at three times leverage."
    return with_values(Config(), {"execution.leverage": 3, "paper.initial_equity": 10_000})


@contextmanager
def paper_venue(panel: Panel, start_ms: int, folder: Path) -> Iterator[Venue]:
    "The paper exchange over a recording."
    clock, config = SimulatedClock(start_ms), paper_config()
    market = RecordedMarket(panel, clock, config.paper.spread_bps)
    with PaperExchange(market, clock, config, f"sqlite:///{folder}/paper.sqlite") as port:
        yield Venue("paper", port, start_ms, clock.now_ms, clock.advance)


def simulated(panel: Panel, start_ms: int, config: Config | None = None) -> Simulator:
    "The simulator over a recording, with one account, its clock standing until it is moved."
    config = config or paper_config()
    pace = Pace(start_ms, time.monotonic, mode="paused")
    engine = TradingEngine(
        lambda clock: RecordedMarket(panel, clock, config.paper.spread_bps), config, start_ms, config.paper.seed)
    market = Market(Tape(panel), config.paper.spread_bps)
    return Simulator(market, pace, [ApiKey("the-key", "the-secret", user=USER)], {USER: engine})


def line_to(simulator: Simulator, url: str, **settings: object) -> Line:
    "A line to a simulator, on the simulator's time."
    addresses = dict.fromkeys(("spot", "futures", "v2", "public", "private"), url)
    given = {"apiKey": "the-key", "secret": "the-secret", "urls": {"api": addresses}, "timeout": 5_000, **settings}
    client = strict_client(simulator.pace, **given)
    require_addresses(client.urls["api"], is_simulator=True)
    return Line(client)


def unhurried(simulator: Simulator, journal: Path | None = None) -> Simulator:
    "The simulator without limits of rate, so that a test measures what it means to."
    simulator.terms = Terms(rate_limits=False, address_limit=None)
    simulator.guard = AddressGuard(None)
    simulator.journal = Journal(journal)
    return simulator


def quick_line(simulator: Simulator, url: str, **settings: object) -> Line:
    "A line that does not wait between requests."
    line, seconds = line_to(simulator, url, **settings), [0.0]

    def skip(wait: float) -> None:
        seconds[0] += wait

    return Line(line._client, RequestPace(lambda: seconds[0], skip))


@contextmanager
def bybit_venue(panel: Panel, start_ms: int, folder: Path) -> Iterator[Venue]:
    "Bybit's protocol, through ccxt and HTTP, to the simulator."
    simulator = simulated(panel, start_ms)
    with serving(simulator) as url:
        line = line_to(simulator, url)
        port = BybitExchange(line)
        set_up(line, [each.symbol for each in port.fetch_instruments()], leverage=3)
        pace = simulator.pace
        yield Venue("bybit", port, start_ms, pace.now_ms, lambda ms: pace.move(pace.now_ms() + ms), simulator, url)


VENUES = {"paper": paper_venue, "bybit": bybit_venue}
