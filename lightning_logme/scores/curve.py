"""Evidence against the number of samples."""

from typing import NamedTuple


class CurvePoint(NamedTuple):
    """The score of the first n samples.

    Attributes:
        num_samples: n.
        logme: log of maximum evidence in nats per sample; NaN where there is none.
        gain: nats per sample above the score of useless features.
    """

    num_samples: int
    logme: float
    gain: float
