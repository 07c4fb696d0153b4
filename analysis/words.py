"""What results are called, by domain; what may lie across a picture; and the names of the pictures, for who announces
them before they exist.
"""

from dataclasses import dataclass

PICTURES = ("pareto.csv", "pareto.png", "pareto.html", "curves.png")


@dataclass(frozen=True)
class Words:
    """sample, samples: one and many of what quality is measured on. time: the unit of latency; per_ms: how many of it
    make a millisecond. rate: what the quality axis shows besides the drop, "" for the drop alone.
    """

    sample: str
    samples: str
    time: str
    per_ms: float
    rate: str = ""


PAIRS = Words("pair", "pairs", "ms", 1.0)
SHOTS = Words("shot", "shots", "µs", 1000.0, rate="LER")
_OF = {"alphaqubit": SHOTS}


def words_of(domain: object) -> Words:
    """The words of a domain by its name; of any other than decoders those of image pairs."""
    return _OF.get(str(domain), PAIRS)


@dataclass(frozen=True)
class Measure:
    """What lies across. name: as a reader calls it, key: the record's field, with its interval's ends where one was
    measured; unit: of the picture, factor: how many of it make one of the field's. better: what less of it is.
    subject: what quality is held against.
    """

    name: str
    key: str
    lo: str
    hi: str
    unit: str
    factor: float
    better: str
    title: str
    subject: str

    @property
    def column(self) -> str:
        """The name of the column that holds x."""
        return f"x_{self.unit.replace('µ', 'u')}"


ACROSS = ("p50", "p95", "size_MB", "params_M", "gpu_hours")  # what --x takes


def measure_of(name: str, words: Words, hours: str = "gpu_hours") -> Measure:
    """One of ``ACROSS`` in a domain's words. hours: the field that counts them, cpu_hours where there was no GPU."""
    if name in ("p50", "p95"):
        title = f"{name} latency per {words.sample} ({words.time})"
        key = f"t_pair_{name}_ms"
        subject = "latency" if name == "p50" else "p95 latency"
        return Measure(name, key, f"{name}_lo", f"{name}_hi", words.time, words.per_ms, "faster", title, subject)
    if name == "gpu_hours":
        said = f"{hours.removesuffix('_hours').upper()}-hours"
        return Measure(said, hours, "", "", "h", 1.0, "cheaper", f"{said} of its own training", said)
    unit, what = {"size_MB": ("MB", "size on disk"), "params_M": ("M", "parameters")}[name]
    return Measure(name.partition("_")[0], name, "", "", unit, 1.0, "smaller", f"{what} ({unit})", what)
