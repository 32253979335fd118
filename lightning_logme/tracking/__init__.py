"""The modules behind :class:`~lightning_logme.LogMECallback`."""
