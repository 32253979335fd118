"""Read TensorBoard files."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def events(path) -> EventAccumulator:
    accumulator = EventAccumulator(str(path), size_guidance={"images": 0, "histograms": 0, "scalars": 0})
    return accumulator.Reload()
