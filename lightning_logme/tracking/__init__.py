"""The parts of :class:`~lightning_logme.LogMECallback`."""
