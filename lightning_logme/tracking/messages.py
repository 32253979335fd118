"""The messages of a validation: which labels it uses, what failed, and what was left out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_logme.features.extractor import HEAD, Extractor
from lightning_logme.features.labels import TargetSpec, describe_target
from lightning_logme.utilities.compat import rank_zero_info, rank_zero_warn

_MUCH_MEMORY = 2**30  # bytes


class Messages:
    """The messages of a callback about its validations.

    Args:
        name: prefix of the logged keys.

    Attributes:
        are_labels_reported: whether the labels in use have been reported.
    """

    def __init__(self, name: str) -> None:
        self.are_labels_reported = False
        self._name = name
        self._origin: tuple[str, str | None] = "", None
        self._reported: set[str] = set()  # messages that were already given

    def note_origin(self, batch: Any, target: TargetSpec) -> None:
        """Remember where the labels are, while they are still in the batch."""
        self._origin = describe_target(batch, target)

    def report_labels(self, poolings: Sequence[str]) -> None:
        """Report once which labels and pooling were inferred: a wrong guess would still give a plausible number."""
        self.are_labels_reported = True
        found, rivals = self._origin
        listed = [*poolings[:2], *(["…"] if len(poolings) > 2 else [])]
        rank_zero_info("; ".join([f"LogMECallback: the labels are {found}", *listed]) + ".")
        if rivals:
            rank_zero_warn(
                f"target: LogMECallback uses {found} as the labels, but {rivals} could be labels as well; give target=."
            )

    def warn_of_padding(self) -> None:
        """Warn once that padding is counted."""
        if "padding" not in self._reported:
            self._reported.add("padding")
            warnings.warn(
                f"{self._name}: the rows of a batch do not match the samples of the loader's sampler one by one, so "
                "padding cannot be detected and padded rows are counted.",
                stacklevel=2,
            )

    def check_memory(self, widths: Sequence[int]) -> None:
        """Warn once if the Gram matrices of features of these widths need much memory."""
        memory = sum(8 * width**2 for width in widths)
        if memory > _MUCH_MEMORY and "memory" not in self._reported:
            self._reported.add("memory")
            rank_zero_warn(
                f"{self._name} will hold {memory / 2**30:.1f} GiB in {len(widths)} matrices of D × D (with curve=True, "
                "for each point of the curve); score fewer layers to save memory."
            )

    def warn_of_errors(self, new: Mapping[str | None, str], batch_idx: int, is_final: bool) -> None:
        """Warn of new errors, once for each cause. ``is_final`` says that they will end the run."""
        for text in dict.fromkeys(new.values()):
            failed = [source for source in new if new[source] == text]
            is_all = None in failed or HEAD in failed
            key = self._name if is_all else " and ".join(f"{self._name}/{source}" for source in failed)
            what = "cannot be scored; the run will end after this validation, in all processes"
            if not is_final:
                verb = "is" if is_all or len(failed) == 1 else "are"
                what = f"{verb} NaN for this validation, after an error in batch {batch_idx}"
            warnings.warn(f"{key} {what}: {text}", stacklevel=2)

    def warn_of_dropped_guess(self, extractor: Extractor, reason: str) -> None:
        """Drop a head that was guessed wrongly, and warn."""
        head = extractor.head
        extractor.drop_guess()
        if head is not None and head.outputs == extractor.num_outputs:
            reason += f" K is still {head.outputs}, the number of outputs of that head; num_classes= changes it."
        rank_zero_warn(f"{self._name} is logged for {', '.join(extractor.names)} only: {reason}")

    def warn_of_unseen(
        self, all_unseen: Mapping[int, int], all_batches: Mapping[int, int], extractor: Extractor
    ) -> str | None:
        """Warn about batches in which no scored module was called, with likely causes.

        Args:
            all_unseen: the number of such batches, by loader.
            all_batches: the number of all batches, by loader.

        Returns:
            The reason why the other batches cannot be scored on their own, or None if they can.
        """
        obstacle = None
        head = extractor.head
        other = "it ran another network, such as an averaged copy: name its head with head="
        if head is not None and head.guess is not None:
            other = f"it ran another network, such as an averaged copy, or another head than '{head.guess}': give head="
        elif head is not None and any(capture.side == "output" for capture in head.captures):
            other = "it called submodules instead of self(…): name layers=[…], or give features="
        causes = [
            "validation_step left out its forward pass",
            other,
            "the model was compiled and run before the hooks were attached: call "
            'torch.compiler.set_stance("force_eager") or compile it again',
        ]
        causes = causes[::-1] if extractor.is_compiled else causes
        key = self._name if head is not None else f"{self._name}/{extractor.names[0]}"
        for loader, unseen in all_unseen.items():
            batches = all_batches[loader]
            where = f" of loader {loader}" if len(all_batches) > 1 else ""
            what = f"no scored module was called in {unseen} of {batches} batches{where}"
            if 0 < unseen < batches and not extractor.is_compiled:
                warnings.warn(f"{key}: {what}; these batches are left out.", stacklevel=2)
            elif unseen:
                if unseen < batches:  # compiled code may call hooks only for batches of one shape
                    obstacle = what
                warnings.warn(
                    f"{key} is NaN: {what}. Likely causes, most likely first: {'; '.join(causes)}.", stacklevel=2
                )
        return obstacle
