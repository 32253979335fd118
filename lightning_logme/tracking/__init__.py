"""What :class:`~lightning_logme.LogMECallback` is made of."""
