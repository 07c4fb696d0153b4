"""The decoder's task loss and the distillation signals, each a scalar.

K logits (..., K) are K independent flips ('observable', 'xz') or, for 'ixyz', the classes of one choice. Features come
as :meth:`trainables.alphaqubit.model.Decoder.features` gives them. A teacher's tensors get no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from engines.errors import InputError
from trainables.alphaqubit.config import OUTPUTS, Config

FEATURES = ("transformer", "rnn")  # states, compared by squares; the other signals compare logits
SIGNALS = ("final", *FEATURES, "readout", "fused")
_TINY = 1e-8


def check_signals(names: Iterable[str]) -> None:
    """InputError for a name that is not one of SIGNALS."""
    for name in names:
        if name not in SIGNALS:
            raise InputError(f"signal {name!r} is unknown, use one of {', '.join(SIGNALS)}")


def label_loss(logits: Tensor, labels: Tensor, outputs: str) -> Tensor:
    """Cross entropy of logits (..., K) with labels in nats, mean over all flips: (..., K) bits, or for 'ixyz' the
    class (..., 1).
    """
    if logits.shape[-1] != OUTPUTS[outputs] or labels.shape != (
        *logits.shape[:-1],
        1 if outputs == "ixyz" else logits.shape[-1],
    ):
        raise InputError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} don't fit outputs={outputs!r}")
    if outputs == "ixyz":
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten().long())
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def task_loss(
    features: Mapping[str, Tensor],
    label: Tensor,
    outputs: str = "observable",
    round_labels: Tensor | None = None,
    round_weight: float = 0.0,
) -> Tensor:
    """Loss of the last logits against label (N, K), plus round_weight times that of the intermediate readouts.

    round_labels (N, R): the observable's flip right after round n = 1..R, that is after detector layer n - 1; with
    them features needs 'readout'. Only for outputs='observable'. The last layer is left to the label.
    """
    loss = label_loss(features["logits"], label, outputs)
    if round_labels is None or round_weight == 0:
        return loss
    if outputs != "observable":
        raise InputError(f"round labels with outputs={outputs!r}: they exist for outputs='observable' only")
    return loss + round_weight * label_loss(features["readout"][:, :-1], round_labels[..., None], outputs)


def next_stabilizer_loss(features: Mapping[str, Tensor], events: Tensor) -> Tensor:
    """Cross entropy in nats of the next layer's events, predicted by features['next'] (N, R, S), mean over all.

    events (N, R + 1, S) bits.
    """
    return F.binary_cross_entropy_with_logits(features["next"], events[:, 1:].to(features["next"].dtype))


def soft_loss(teacher: Tensor, student: Tensor, temperature: float, outputs: str = "observable") -> Tensor:
    """T^2 KL(teacher || student) in nats between distributions with logits (..., K) / T; mean over all flips.

    The derivative of the KL with respect to a student's logit is (p_student - p_teacher) / T, where the difference of
    softened probabilities is itself proportional to 1 / T for large T: T^2 keeps the gradient's size (Hinton et al.,
    arXiv:1503.02531, section 2.1). Raises InputError unless temperature > 0 and both have one shape.
    """
    if not temperature > 0:
        raise InputError(f"temperature={temperature} must be above 0")
    if teacher.shape != student.shape:
        raise InputError(
            f"teacher logits {tuple(teacher.shape)}, student logits {tuple(student.shape)}: expected one shape; "
            "distill between decoders of the same outputs and rounds"
        )
    t, s = teacher.detach().to(student.dtype) / temperature, student / temperature
    if outputs == "ixyz":
        log_t, log_s = t.log_softmax(-1), s.log_softmax(-1)
        kl = (log_t.exp() * (log_t - log_s)).sum(-1)
    else:
        kl = t.sigmoid() * (t - s) + F.softplus(s) - F.softplus(t)
    return temperature**2 * kl.mean()


def feature_loss(teacher: Tensor, student: Tensor, adapter: nn.Module | None = None) -> Tensor:
    """Mean square of teacher - adapter(student), in units of the teacher's own variance over shots.

    Both (N, ..., channels). In these units, predicting each entry's mean over the batch costs 1 whatever the scale of
    a teacher's states, and a batch of one shot has no unit: then the teacher's mean square serves.
    """
    teacher = teacher.detach().to(student.dtype)
    mapped = student if adapter is None else adapter(student)
    if mapped.shape != teacher.shape:
        raise InputError(
            f"teacher states {tuple(teacher.shape)}, student states {tuple(mapped.shape)}: expected one shape; "
            "an adapter is needed where the widths differ"
        )
    spread = teacher.var(0, correction=0).mean() if len(teacher) > 1 else teacher.square().mean()
    return (mapped - teacher).square().mean() / spread.clamp(min=_TINY)


def adapters(teacher: Config, student: Config, signals: Iterable[str]) -> nn.ModuleDict:
    """A linear map per feature signal from the student's width to the teacher's, only where these differ.

    Part of training alone: no state of it belongs into a checkpoint of the student.
    """
    names = list(signals)
    check_signals(names)
    if teacher.dim == student.dim:
        return nn.ModuleDict()
    return nn.ModuleDict({name: nn.Linear(student.dim, teacher.dim) for name in FEATURES if name in names})


def signal_loss(
    name: str,
    teacher: Mapping[str, Tensor],
    student: Mapping[str, Tensor],
    temperature: float,
    outputs: str = "observable",
    adapters: nn.ModuleDict | None = None,
) -> Tensor:
    """One distillation term, unweighted.

    'final': :func:`soft_loss` of 'logits'. 'readout': of 'readout' at every layer of detectors. 'fused': of the
    student's 'logits' towards the teacher's 'fused' (N, K), logits that were combined elsewhere. 'transformer', 'rnn':
    :func:`feature_loss` of those states, which no temperature reaches. InputError for another name.
    """
    check_signals([name])
    if name in FEATURES:
        adapter = adapters[name] if adapters is not None and name in adapters else None
        return feature_loss(teacher[name], student[name], adapter)
    sources = {"final": ("logits", "logits"), "readout": ("readout", "readout"), "fused": ("fused", "logits")}
    theirs, ours = sources[name]
    return soft_loss(teacher[theirs], student[ours], temperature, outputs)
