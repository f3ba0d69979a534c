"""What a run says of itself: after every epoch, now and then within one, and at its end."""

from dataclasses import asdict, dataclass, field
from typing import Any

from rbe.train.budget import Share
from rbe.train.networks import Part


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to.

    >>> Epoch(loss=0.21, validation=0.97, turned=None, rates={"dense": 1e-3}).validation
    0.97

    Attributes:
        loss: mean over the epoch; validation: the metric after it.
        turned: share of the signs that differ from those at the beginning; None where there are none.
        rates: learning rates at its end, by role.
    """

    loss: float
    validation: float
    turned: float | None
    rates: dict[str, float]


@dataclass(frozen=True)
class Progress:
    """Where a run is; what `train` tells.

    >>> p = Progress(2, 30, 0, 430, 0.3, 0.96, None, 12.0, 168.0, "accuracy", ())
    >>> f"{p.metric} {p.validation} after {p.epoch} of {p.epochs} epochs, {p.left / 60:.1f} minutes left"
    'accuracy 0.96 after 2 of 30 epochs, 2.8 minutes left'

    Attributes:
        epoch, epochs: done, and in all.
        step, steps: done of the epoch after it, and of every epoch; 0 when an epoch has just ended.
        loss: mean over the steps so far of this epoch, or of the one that has ended.
        validation: the metric after the last whole epoch, accuracy in [0, 1]; None before.
        best: so far, of networks that could be kept; None while there is none.
        seconds: of all sessions of this run; left: forecast.
        metric: its name.
        history: of all whole epochs.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    validation: float | None
    best: float | None
    seconds: float
    left: float
    metric: str
    history: tuple[Epoch, ...]


@dataclass(frozen=True)
class Result:
    """What a run came to; what `train` returns.

    >>> r = Result("run", "accuracy", 0.9, 0.91, 3, 1024, 64, 80, 64.0, 51.4, 2.0, (0.5, 0.8, 0.91))
    >>> f"{r.metric} {r.value} on test, epoch {r.epoch} of {len(r.curve)}, {r.ratio:.0f}:1 in {r.bytes} bytes"
    'accuracy 0.9 on test, epoch 3 of 3, 64:1 in 80 bytes'

    Attributes:
        name: of the run.
        metric: "accuracy" in [0, 1], "bits_per_character", "bleu" or "perplexity".
        value: of the metric on the test split, of the epoch that was best on validation.
        validation: the metric there.
        epoch: the best one.
        weights: of the matrices.
        seed_bytes, bytes: of the seeds; of everything that is stored.
        file_bytes: of `model.rbe`, its header included; 0 for runs of before there was one.
        ratio: 4 weights / seed_bytes, against float32; whole_ratio: the same with all bytes on both sides.
        seconds: of training.
        curve: the validation metric by epoch.
        plan: what each matrix got, where a number of bytes was divided.
        parts: weights and bytes by pattern and format; of runs of before it was kept none.
        inputs: what the network takes. images: `mean` and `deviation`, for (pixels / 255 - mean) / deviation.
            characters: `symbols`, whose places stand for them. translation, language: `tokenizer`, a file beside the
            network.
    """

    name: str
    metric: str
    value: float
    validation: float
    epoch: int
    weights: int
    seed_bytes: int
    bytes: int
    ratio: float
    whole_ratio: float
    seconds: float
    curve: tuple[float, ...]
    plan: tuple[Share, ...] = ()
    parts: tuple[Part, ...] = ()
    file_bytes: int = 0
    inputs: dict[str, Any] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """The value, for runs whose metric is accuracy."""
        return self.value

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; the metric stands also under its own name."""
        return {
            **asdict(self),
            "curve": list(self.curve),
            "plan": [asdict(s) for s in self.plan],
            "parts": [{**asdict(part), "ratio": part.ratio} for part in self.parts],
            self.metric: self.value,
        }

    @classmethod
    def from_json(cls, about: dict[str, Any]) -> "Result":
        """The inverse of `to_json`.

        >>> result = Result("run", "accuracy", 0.9, 0.91, 3, 1024, 64, 80, 64.0, 51.4, 2.0, (0.5, 0.8, 0.91))
        >>> Result.from_json(result.to_json()) == result, result.accuracy
        (True, 0.9)
        """
        known = {k: v for k, v in about.items() if k in cls.__dataclass_fields__}
        plan = tuple(Share(**share) for share in known.pop("plan", ()))
        fields = Part.__dataclass_fields__
        parts = tuple(Part(**{k: v for k, v in part.items() if k in fields}) for part in known.pop("parts", ()))
        return cls(**{**known, "curve": tuple(known["curve"]), "plan": plan, "parts": parts})
