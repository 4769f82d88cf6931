"""Results of benchmarks: rows of figures and verdicts on targets, for the terminal and for the page."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from subjects import Run

# Above this share of its core, the load generator may limit the measurement.
TOO_BUSY = 0.8
OURS = "realtime"


def brief(value: float) -> str:
    """Format a number with at least three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@dataclass
class Row:
    """The figures of one subject, or of one size of this server, with one entry for each run.

    costs: microseconds of CPU time for each unit. idle: the part of the costs that the subject would use without load.
    p50, p99: milliseconds. busy, load: shares of a core used by the server and by the generator. more: other figures.
    """

    name: str
    size: int = 0
    costs: list[float] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)
    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    more: dict[str, list[float]] = field(default_factory=dict)

    def add(self, run: Run, units: float, **more: float) -> None:
        self.costs.append(1e6 * run.server / units)
        self.idle.append(1e6 * run.idle * run.seconds / units)
        self.busy.append(run.server / run.seconds)
        self.load.append(run.load)
        if run.quantiles:
            self.p50.append(run.quantiles[0])
            self.p99.append(run.quantiles[1])
        for name, value in more.items():
            self.more.setdefault(name, []).append(value)

    @property
    def cost(self) -> float:
        return median(self.costs)

    @property
    def spread(self) -> float:
        """Half the difference between the most expensive and the cheapest run, as a share of the cost."""
        return (max(self.costs) - min(self.costs)) / 2 / self.cost

    @property
    def drowned(self) -> bool:
        """Whether the generator was too busy: the server waited for it, and its cost contains more wake-ups."""
        return median(self.load) > TOO_BUSY


@dataclass
class Verdict:
    """A target and the measured value. what: the quantity."""

    what: str
    target: str
    found: str
    met: bool


@dataclass
class Table:
    """The figures of one benchmark. unit: of the costs. rows: in a comparison with peers, the first is this server."""

    name: str
    title: str
    unit: str
    rows: list[Row] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = [Row(**row) if isinstance(row, dict) else row for row in self.rows]
        self.verdicts = [Verdict(**one) if isinstance(one, dict) else one for one in self.verdicts]

    def row(self, name: str, size: int = 0) -> Row:
        """Return the row with this name; create it if necessary."""
        found = self.find(name)
        if found is None:
            found = Row(name, size)
            self.rows.append(found)
        return found

    def find(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    def ratio(self, name: str) -> float | None:
        """Return our cost divided by the cost of `name`, the median of the runs; None if either was not measured."""
        own, other = self.find(OURS), self.find(name)
        if own is None or other is None or own is other:
            return None
        return median(one / two for one, two in zip(own.costs, other.costs, strict=False))

    def judge(self, what: str, value: float, most: float, unit: str = "", digits: int = 1) -> None:
        """Record whether `value` is at most `most`."""
        found = f"{value:,.{digits}f}{unit}"
        self.verdicts.append(Verdict(what, f"≤ {most:,g}{unit}", found, met=value <= most))

    def judge_least(self, what: str, value: float, least: float, unit: str) -> None:
        self.verdicts.append(Verdict(what, f"≥ {least:,g}{unit}", f"{value:,.0f}{unit}", met=value >= least))

    def judge_ratio(self, name: str, most: float) -> None:
        ratio = self.ratio(name)
        if ratio is not None:
            self.judge(f"{self.name}: cost relative to {name}", ratio, most, digits=2)

    def judge_flat(self, what: str, within: float) -> None:
        """Record whether the costs of all rows are equal, up to the share `within`."""
        costs = [row.cost for row in self.rows]
        middle = (max(costs) + min(costs)) / 2
        off = (max(costs) - min(costs)) / 2 / middle
        self.verdicts.append(Verdict(what, f"flat, ± {within:.0%}", f"± {off:.1%}", met=off <= within))

    def print_head(self) -> None:
        print(f"\n{self.title}")
        for name, why in self.left_out.items():
            print(f"    {name} is left out: {why}")
        head = f"{'CPU µs ' + self.unit:>24}{'spread':>8}{'idle':>8}{'p50 ms':>9}{'p99 ms':>9}{'server':>8}{'load':>6}"
        print(f"{'':28}{head}", flush=True)

    def print_row(self, row: Row) -> None:
        times = "".join(f"{median(each):9.2f}" if each else f"{'':9}" for each in (row.p50, row.p99))
        shares = f"{median(row.busy):8.0%}{median(row.load):6.0%}{'!' if row.drowned else ' '}"
        more = "".join(f"  {brief(median(values))} {name}" for name, values in row.more.items())
        figures = f"{row.cost:24.2f}{'±':>3}{row.spread:5.0%}{median(row.idle):8.2f}"
        print(f"{row.name:28}{figures}{times}{shares}{more}", flush=True)

    def print_foot(self) -> None:
        if any(row.drowned for row in self.rows):
            print(f"    ! the generator used over {TOO_BUSY:.0%} of its core, so the server waited for it")
        for row in self.rows:
            ratio = self.ratio(row.name)
            if ratio is not None:
                print(f"    cost of realtime / cost of {row.name}: {ratio:.2f}")
        print_verdicts(self.verdicts)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def print_verdicts(verdicts: list[Verdict]) -> None:
    for one in verdicts:
        print(f"    {'met    ' if one.met else 'NOT MET'}  {one.what}: {one.found} ({one.target})", flush=True)
