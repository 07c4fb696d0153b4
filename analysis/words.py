"""What results are called, by domain; and the names of the pictures, for who announces them before they exist."""

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

    @property
    def column(self) -> str:
        """The unit of latency as part of a column's name."""
        return self.time.replace("µ", "u")


PAIRS = Words("pair", "pairs", "ms", 1.0)
SHOTS = Words("shot", "shots", "µs", 1000.0, rate="LER")
_OF = {"alphaqubit": SHOTS}


def words_of(domain: object) -> Words:
    """The words of a domain by its name; of any other than decoders those of image pairs."""
    return _OF.get(str(domain), PAIRS)
